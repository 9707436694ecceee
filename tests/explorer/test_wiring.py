"""The widgets without a browser: setting a value gives the state, the sentence and the picture; errors are read."""

import io
import subprocess
import sys
import time

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

import hoanalysis as ho
from hoanalysis.analysis.example import example
from hoanalysis.explorer import figures
from tests.explorer.test_views import colours
from tests.test_summaries import make_problem


@pytest.fixture(scope="module")
def ds():
    return example(layers=3, size=3, steps=4)


@pytest.fixture
def explorer(ds):
    return ho.explore(ds, state={"step": 0})


def test_each_control_gives_its_state_and_another_picture(explorer, ds):
    controls = explorer.controls
    moves = [
        ("step", 20, "Step 20"),
        ("matrix", "scale_free", "scale-free"),
        ("grouping", "layer", "3 groups, by layer"),
        ("order", 3, "D3, slice of layer"),
        ("order", 2, "pseudo-Hessian"),
        ("grouping", "tensor", "6 groups, as stored"),
        ("block", "BB", "block BB"),
        ("scale", "linear", "block BB"),
        ("mask", True, "hidden"),
        ("compare_run", "this run", "minus this run, step 10"),
        ("compare_step", 0, "minus this run, step 0"),
        ("grouping", "blocks", "2 blocks"),
        ("n_blocks", 4, "4 blocks"),
        ("order", 1, "pseudo-gradient"),
    ]
    controls.mask.value = False
    for name, value, words in moves:
        before = controls.images["matrix"].value
        getattr(controls, name).value = value
        assert explorer.state.get(name, value) == value, name
        assert words.lower() in controls.sentence.value.lower() or name == "mask", (name, controls.sentence.value)
        assert controls.images["matrix"].value != before or name in ("mask", "scale"), name
        assert controls.message.value == ""


def test_a_picture_that_nothing_changed_is_not_drawn_again(explorer):
    controls = explorer.controls
    before = controls.images["matrix"].value
    controls.panel.selected_index = 1
    assert controls.images["matrix"].value is before
    assert controls.images["trajectories"].value != figures.BLANK
    assert controls.images["taylor"].value == figures.BLANK  # drawn when it is looked at
    assert explorer.state["panel"] == "trajectories"


def test_state_can_be_set_and_moves_the_controls(explorer, ds):
    controls = explorer.controls
    explorer.state = {"step": 30, "grouping": "kind", "scale": "linear"}
    assert (controls.step.value, controls.grouping.value) == (30, "kind")
    one = ds.ho.merge("kind").sel(step=30)
    assert_allclose(explorer.view.shown.values, one.D2)
    seen = colours(controls.images["matrix"].value).astype(int)
    assert (seen[0, 0, 0] > seen[0, 0, 2]) == (one.D2.values[0, 0] > 0)  # red where positive


def test_the_selected_entries_are_told_with_errors(explorer, ds):
    entry = ("layer0.weight", "layer1.weight")
    explorer.controls.entries.value = (entry,)
    row = explorer.table().iloc[0]
    one = ds.sel(step=0, group=entry[0], group2=entry[1])
    assert_allclose([row["value"], row["standard error"]], [one.D2.item(), one.D2_se.item()])
    assert f"{one.D2.item():.4g}" in explorer.controls.values.value


def test_entries_of_the_same_groups_in_other_numbers_are_not_confused(explorer, ds):
    a, b = ds.group.values[:2].tolist()
    explorer.state = {"step": 0, "order": 3, "slices": [a], "entries": [[a, b, a], [b, b, a], [a, a, a]]}
    expected = [ds.D3[0].sel(group=g, group2=h, group3=a).item() for g, h in ((a, b), (b, b), (a, a))]
    assert_allclose(explorer.table()["value"], expected)


def test_a_pattern_that_matches_nothing_is_said_and_stays_to_be_corrected(explorer):
    controls = explorer.controls
    controls.grouping.value = "pattern"
    picture = controls.images["matrix"].value
    controls.pattern.value = "zzz*"
    assert "matches no group" in controls.message.value
    assert (controls.pattern.value, controls.grouping.value) == ("zzz*", "pattern")
    assert controls.images["matrix"].value is picture
    controls.pattern.value = "layer0*"
    assert controls.message.value == ""
    assert "5 groups" in controls.sentence.value


def test_an_error_of_ours_reaches_the_user_too(explorer, monkeypatch):
    controls = explorer.controls
    monkeypatch.setattr(explorer.session, "view", lambda state: 1 / 0)
    controls.step.value = 10
    assert "ZeroDivisionError" in controls.message.value
    assert "role='alert'" in controls.message.value


def test_labels_are_escaped_wherever_they_go(ds):
    evil = "<img src=x onerror=alert(1)>"
    odd = ds.ho.merge({evil: ["layer0.weight"]})
    controls = ho.explore(odd).controls
    controls.compare_run.value = "this run"
    controls.export.click()
    for box in (controls.sentence, controls.values, controls.exported, controls.message):
        assert "<img" not in box.value


def test_the_export_button_gives_the_picture_and_the_line(explorer):
    explorer.controls.step.value = 10
    explorer.controls.export.click()
    assert "&#x27;step&#x27;: 10" in explorer.controls.exported.value
    assert "data:image/png;base64," in explorer.controls.exported.value


# ---- a store that is being filled


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.02)


@pytest.fixture
def run(study):
    from hoanalysis.study import StudySpec

    return StudySpec.read(study).run()


class Slow:
    """Batches that take their time."""

    def __init__(self, data, seconds):
        self.data, self.seconds = list(data), seconds

    def __iter__(self):
        for batch in self.data:
            time.sleep(self.seconds)
            yield batch


def slow_problem(seconds):
    import torch.nn.functional as F

    from tests.conftest import FACTORIES

    made: dict = {}
    exec(FACTORIES, made)
    return ho.Problem(made["model"](), Slow(made["data"](), seconds), loss=F.cross_entropy)


def test_the_background_fills_the_store_with_what_summarize_run_computes(run, tmp_path):
    problem = slow_problem(0.0)
    weights = {n: p.detach().clone() for n, p in problem.model.named_parameters()}
    explorer = ho.explore(problem, run, 2, store=tmp_path / "store", keep_batches=4).wait()
    expected = ho.summarize_run(run, problem, 2, store=tmp_path / "other", keep_batches=4, progress=False)
    assert_array_equal(explorer.session.ds.D2, expected.D2)
    assert_array_equal(explorer.session.ds.D2_se, expected.D2_se)
    for name, p in problem.model.named_parameters():
        assert_array_equal(p.detach(), weights[name])
    assert "ho.open_store(" in explorer.code
    figure = eval(explorer.code, {"ho": ho})
    assert figure.axes


def test_partial_results_are_shown_stopped_and_gone_on_with(run, tmp_path):
    explorer = ho.explore(slow_problem(0.05), run, 2, store=tmp_path / "store", keep_batches=4)
    controls, filling = explorer.controls, explorer.filling
    assert controls.progress_text.value == "0 of 3 checkpoints, computing"
    assert "This checkpoint is not computed." in controls.sentence.value
    wait_for(lambda: (explorer.poll(), controls.progress.value >= 1)[1])
    assert filling.running
    assert np.isfinite(explorer.session.ds.D2.values).any()
    assert not np.isfinite(explorer.session.ds.D2.values).all()
    controls.stop.click()
    wait_for(lambda: not filling.running, 10)
    explorer.poll()
    done = controls.progress.value
    assert 1 <= done < 3
    assert "stopped" in controls.progress_text.value
    assert controls.stop.description == "Go on"
    controls.stop.click()
    filling.finish()
    explorer.poll()
    assert "3 of 3 checkpoints, complete" in controls.progress_text.value
    assert "missing" not in str(controls.step.options)
    assert Image.open(io.BytesIO(controls.images["matrix"].value)).text["Cells"]


def test_what_ends_the_background_early_is_said(run, tmp_path):
    from hoanalysis.store.core import Store

    with Store.open(tmp_path / "store", mode="w"):
        explorer = ho.explore(slow_problem(0.0), run, 2, store=tmp_path / "store")
        wait_for(lambda: not explorer.filling.running)
        explorer.poll()
    assert "ended early" in explorer.controls.progress_text.value


def test_a_study_is_explored_by_its_path(study, tmp_path):
    explorer = ho.explore(study.parent, store=tmp_path / "store").wait()
    assert explorer.session.offer(explorer.view.state).computed == (0, 10, 20)


def test_nothing_to_explore_is_said():
    from hoanalysis.errors import ArgumentError

    with pytest.raises(ArgumentError, match="run= and store="):
        ho.explore(make_problem())
    with pytest.raises(ArgumentError, match="without order="):
        ho.explore(example(), order=2)


def test_without_torch(tmp_path, ds):
    from hoanalysis.store import export

    path = export(ds, tmp_path / "run.nc")
    script = (
        "import sys; sys.modules['torch'] = None\nimport hoanalysis as ho\n"
        f"e = ho.explore({str(path)!r}); e.controls.step.value = 10; e.figure(); print(e.sentence)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Step 10")
