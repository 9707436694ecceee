"""The notebooks that are opened by hand, executed by papermill, with what they have to find."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import papermill
import pytest
import xarray as xr

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def optimizers():
    """benchmarks/optimizers.py"""
    spec = importlib.util.spec_from_file_location("optimizers", ROOT / "benchmarks" / "optimizers.py")
    sys.modules["optimizers"] = made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def said(executed: Path) -> str:
    """What the cells of a notebook printed or returned as text."""
    cells = nbformat.read(executed, as_version=4).cells
    outputs = [o for c in cells if c.cell_type == "code" for o in c.outputs]
    return "\n".join(str(o.get("text") or o.get("data", {}).get("text/plain", "")) for o in outputs)


@pytest.mark.filterwarnings("ignore")  # of the kernel's machinery, in another process
def test_the_tour_finds_the_step_and_the_learning_rate(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    papermill.execute_notebook(
        ROOT / "notebooks" / "tour.ipynb", tmp_path / "tour.ipynb", {"images": 256},
        cwd=str(ROOT / "notebooks"), progress_bar=False,
    )  # fmt: skip
    text = said(tmp_path / "tour.ipynb")
    assert "broke at step 120" in text
    assert "from 0.05 to 0.5" in text
    assert "engine tangents" in text


@pytest.mark.filterwarnings("ignore")
def test_the_optimizer_study_says_what_its_runs_show(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    target = tmp_path / "study.ipynb"
    papermill.execute_notebook(
        ROOT / "notebooks" / "optimizer_study.ipynb", target, cwd=str(ROOT / "notebooks"), progress_bar=False
    )
    with xr.open_dataset(ROOT / "data" / "optimizers" / "study.nc", engine="h5netcdf") as study:
        last = study.isel(record=-1).load()
    accuracy = {}
    for method, setting in (("SummaryNewton", 1.0), ("SGD, momentum 0.9", 0.01)):
        kept = (last.task == "lenet5-mnist") & (last.method == method) & (last.setting == setting) & (last.seed != 10)
        found = last.accuracy[kept.values]
        accuracy[method] = dict(zip(found.seed.values.tolist(), found.values.tolist(), strict=True))
    ours, sgd = accuracy.values()
    assert set(ours) == set(sgd) == {0, 1, 2, 20, 21, 22}
    gap = sum(ours.values()) / 6 - sum(sgd.values()) / 6
    text = said(target)
    assert f"SGD {sum(sgd.values()) / 6:.3f}: {100 * gap:+.1f} points" in text
    assert f"One point below SGD is {'reached' if gap >= -0.01 else 'NOT reached'}." in text
    assert text.count("loses: ") + text.count("wins: ") == 4


@pytest.mark.parametrize("method", ["SummaryNewton", "SummaryNewton, momentum", "SummaryNewton, as in the paper"])
def test_the_stored_study_is_of_the_optimizer_as_it_is(optimizers, monkeypatch, method):
    task, seed, record = "lenet5-mnist", 0, 1
    with xr.open_dataset(optimizers.STUDY, engine="h5netcdf") as study:
        found = (study.task == task) & (study.method == method) & (study.seed == seed)
        stored = study.isel(run=int(np.flatnonzero(found)[0]), record=record).load()
    monkeypatch.setitem(optimizers.TASKS, task, replace(optimizers.TASKS[task], steps=int(stored.step)))
    last = optimizers.train(task, method, float(stored.setting), seed)["rows"][-1]
    np.testing.assert_allclose((last["loss"], last["accuracy"]), (stored.loss, stored.accuracy), rtol=0.02)


def test_notebooks_hold_no_outputs_in_git():  # but for the one that shows the paper again, see test_paper_figures.py
    for path in set((ROOT / "notebooks").glob("*.ipynb")) - {ROOT / "notebooks" / "paper_figures.ipynb"}:
        cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
        assert not any(c.outputs or c.execution_count for c in cells), path.name
