"""explore.ipynb and own_model.ipynb, executed by papermill: static pictures, no widget state, the asserted findings."""

from pathlib import Path

import nbformat
import papermill
import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore")  # of the kernel's machinery, in another process


def executed(name: str, folder: Path, monkeypatch, **parameters) -> nbformat.NotebookNode:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    papermill.execute_notebook(
        ROOT / "notebooks" / name, folder / name, parameters, cwd=str(ROOT / "notebooks"), progress_bar=False
    )
    return nbformat.read(folder / name, as_version=4)


def outputs(notebook: nbformat.NotebookNode) -> list:
    return [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]


def is_static(notebook: nbformat.NotebookNode) -> None:
    """One picture of an explorer with its sentence, and no trace of a widget."""
    assert "widgets" not in notebook.metadata
    data = [o.data for o in outputs(notebook) if "data" in o]
    assert not any("application/vnd.jupyter.widget-view+json" in d for d in data)
    pictures = [d for d in data if "image/png" in d]
    assert len(pictures) == 1
    assert "pseudo-Hessian" in pictures[0]["text/plain"]


def test_explore_computes_a_study_and_shows_it(study, tmp_path, monkeypatch):
    done = executed("explore.ipynb", tmp_path, monkeypatch, path=str(study.parent), store=str(tmp_path / "store"))
    is_static(done)
    text = "\n".join(str(o.get("text", "")) for o in outputs(done))
    assert "Step 20: pseudo-Hessian [loss] of 4 groups" in text
    assert "ho.explore(ho.open_store(" in text


def test_a_model_of_ones_own_from_hugging_face(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    done = executed("own_model.ipynb", tmp_path, monkeypatch, batches=3)
    is_static(done)
    text = "\n".join(str(o.get("text", "")) for o in outputs(done))
    assert "attn.c_attn.weight[q]" in text
    assert "engine tangents" in text
    null = text.split("no effect:")[1].split("\n")[0].split()
    assert null == [f"transformer.h.{layer}.attn.c_attn.bias[k]" for layer in (0, 1)]
    sentence = next(o.data["text/plain"] for o in outputs(done) if "image/png" in o.get("data", {}))
    assert "by the pattern" in sentence
