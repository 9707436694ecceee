"""A study along several directions: one page shows what the gradient says and what training did."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import hoanalysis as ho
from hoanalysis.notebook import autopsy_of, checkpoints, heading, rule_table, series
from tests.conftest import FACTORIES, write_study
from tests.reports.notebooks import text_of

DIRECTIONS = 'directions = ["gradient", "to:next", "weights"]\n'


def trained(folder: Path, module: str, extra: str = "", steps: int = 9) -> Path:
    """The small study of the tests, its checkpoints single steps of SGD with a rate that is raised at step 6."""
    study = write_study(folder, module, extra, steps=0)
    namespace: dict = {}
    exec(FACTORIES, namespace)
    model, data = namespace["model"](), namespace["data"]()
    rows = []
    for step in range(steps):
        rate = 0.1 if step < 6 else 30.0
        save_file({n: t.clone() for n, t in model.state_dict().items()}, folder / f"step_{step}.safetensors")
        rows.append(f"{step},1.0,{rate}")
        x, y = data[step % len(data)]
        grads = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads, strict=True):
                p -= rate * g
    (folder / "log.csv").write_text("step,loss,learning_rate\n" + "\n".join(rows) + "\n")
    return study


SECTIONS = ("Was each step predicted?", "Autopsy of the step from", "Suspects", "The learning rates that training used")


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("three")
    return ho.report(trained(folder / "run", "factories_steps_one", DIRECTIONS), folder / "out", progress=False).parent


def test_one_page_shows_the_gradient_and_the_steps_side_by_side(out: Path) -> None:
    text = text_of((out / "index.html").read_text())
    for word in (*SECTIONS, "The inverse", "solve H-bar eta = g-bar", "The run broke at step 6"):
        assert word in text, word
    assert "show step 6, the last before the loss climbed, in place of the last of the run, step 8" in text
    assert "Step 6: " in text
    assert "Step 8: " not in text  # no advice is about what is left behind the break
    assert "The rates come out low" in text
    assert "low rates: the gradient is over" in text
    files = {p.name for p in out.glob("*.nc")}
    assert files == {"summaries.nc", "summaries-to-next-canonical.nc", "summaries-weights-canonical.nc"}
    assert "from 0.1 to 30" in text
    assert ho.open_dataset(out / "summaries.nc").direction == "gradient"


def test_a_study_along_the_gradient_alone_has_no_such_section(study: Path, tmp_path: Path) -> None:
    text = text_of(ho.report(study, tmp_path / "out", progress=False).read_text())
    assert not any(section in text for section in SECTIONS)


def test_a_study_along_the_steps_alone_has_them_and_no_learning_rates_used(tmp_path: Path) -> None:
    study = trained(tmp_path / "run", "factories_steps_alone", 'directions = ["to:next"]\n')
    text = text_of(ho.report(study, tmp_path / "out", progress=False).read_text())
    for section in SECTIONS[:3]:
        assert section in text
    assert SECTIONS[3] not in text
    assert "learning rates that solve" not in text  # they would not be those of a training step


def test_the_table_of_checkpoints_fits_its_columns(out: Path) -> None:
    text = text_of((out / "index.html").read_text())
    ds = ho.open_dataset(out / "summaries.nc")
    frame = checkpoints(ds)
    assert frame.index.tolist() == list(range(9))
    for digest, check in zip(ds.sha256.values, ds.self_check.values, strict=True):
        assert digest[:12] in text
        assert digest[:13] not in text
        assert f"{check:.1e}" in text
    assert frame["self_check"].tolist() == [f"{v:.1e}" for v in ds.self_check.values]


def test_what_is_not_there_is_left_out(out: Path) -> None:
    ds = ho.open_dataset(out / "summaries.nc")
    found = series(ds, {"to:next": str(out / "summaries-to-next-canonical.nc"), "weights": str(out / "missing.nc")})
    assert set(found) == {"gradient", "to:next"}
    assert autopsy_of({"gradient": ds}, None) is None
    empty = found["to:next"].map(lambda a: a * float("nan"), keep_attrs=True)
    assert autopsy_of({"to:next": empty}, None) is None
    assert autopsy_of(found, None).step == 6
    table = rule_table(found["to:next"].ho.update_rule(found["gradient"]))
    assert list(table.columns) == ["steps 0 to 8"]
    assert list(table.index[3:]) == ds.group.values.tolist()


def test_headings_are_escaped() -> None:
    shown = heading("<b>", "a\u202eb").data
    assert "&lt;b&gt;" in shown
    assert "\u202e" not in shown


def test_a_direction_that_no_checkpoint_has_does_not_take_the_page_away(tmp_path: Path) -> None:
    study = trained(tmp_path / "run", "factories_steps_adam", 'directions = ["gradient", "adam"]\n')
    with pytest.raises(ho.errors.HoError, match="optimizer state"):
        ho.report(study, tmp_path / "out", progress=False)
    assert "The inverse" in text_of((tmp_path / "out" / "index.html").read_text())
