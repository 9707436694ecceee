"""What the widgets offer beside a view, when they call back, and what a filling thread does and leaves alone."""

import asyncio
import threading

import numpy as np
import pytest
import torch

import hoanalysis as ho
from hoanalysis.analysis.example import example
from hoanalysis.errors import ArgumentError
from hoanalysis.explorer import State, background, session, widgets, words
from hoanalysis.explorer import _of_study as of_study
from tests.explorer.test_wiring import run, slow_problem

__all__ = ["run"]  # a fixture


@pytest.fixture(scope="module")
def ds():
    return example(layers=3, size=3, steps=4)


def test_what_does_nothing_in_a_view_is_hidden_or_disabled(ds):
    controls = ho.explore(ds, others={"other": ds}, state={"step": 20}).controls
    assert controls.epsilon.layout.display == "none"
    assert controls.slices[0].layout.display == "none"
    controls.regularization.value = "ridge"
    assert controls.epsilon.layout.display == ""
    assert not controls.block.disabled
    controls.order.value = 1
    assert controls.block.disabled
    controls.order.value = 3
    assert controls.slices[0].layout.display == ""
    assert "No group" not in controls.sentence.value  # the strongest slice has no name
    controls.compare_run.value = "other"
    assert controls.compare_step.options[0][0] == "the same step"
    controls.compare_step.value = 0
    controls.compare_run.value = ""
    assert "Nothing is subtracted" not in controls.sentence.value


def test_a_move_calls_back_once_and_a_state_moves_the_panel(ds, monkeypatch):
    explorer, shown = ho.explore(ds, state={"step": 0}), []
    controls, show = explorer.controls, explorer._show
    monkeypatch.setattr(explorer, "_show", lambda: (shown.append(1), show()))
    controls.grouping.value = "layer"
    controls.order.value = 3
    assert len(shown) == 2
    explorer.state = {"panel": "taylor"}
    assert controls.panel.selected_index == 2


def test_values_of_many_cells_and_the_static_picture_follow_once_it_is_settled(ds, monkeypatch):
    for name, value in (("AT_ONCE", 10), ("SETTLED", 0.05), ("IDLE", 0.05)):
        monkeypatch.setattr(widgets, name, value)
    explorer, kept = ho.explore(ds, state={"step": 0}), []
    controls = explorer.controls

    def keep():
        kept.append(explorer.state["step"])

    async def moved():
        explorer._display_id = "displayed"
        for step in (10, 20):
            controls.step.value = step
            assert controls.cells.value == ""
        for _ in range(400):
            await asyncio.sleep(0.05)
            if kept and controls.cells.value:
                break
        await asyncio.sleep(0.2)

    monkeypatch.setattr(explorer, "keep", keep)
    asyncio.run(moved())
    assert kept == [20]
    assert f"{ds.D2.values[2, 0, 1]:.4g}" in controls.cells.value


def test_results_that_were_not_asked_for_longest_are_dropped_first(ds, monkeypatch):
    monkeypatch.setattr(session, "KEPT", 2)
    held, made = session.Session(ds), []

    def ask(key):
        held._keep(key, lambda: made.append(key))

    for key in "abacbaa":
        ask(key)
    assert made == ["a", "b", "c", "b", "a"]


def test_names_and_others_in_the_line_of_code(ds):
    assert words.name_of(ds, {"_": ds, "_3": ds, "not a name": ds, "run": ds}) == "run"
    assert words.code(State(), "run", {"seed 1": "b"}) == "ho.explore(run, others={'seed 1': b}).figure()"


def test_an_epsilon_of_zero_is_refused():
    with pytest.raises(ArgumentError, match="epsilon must be positive"):
        State(epsilon=0.0)


def test_the_thread_works_on_a_copy_with_the_threads_of_the_kernel_and_once(run, tmp_path, monkeypatch):
    seen, go = [], threading.Event()

    def computed(run, problem, order, **options):
        seen.append((torch.get_num_threads(), problem.model, options))
        assert go.wait(60)

    monkeypatch.setattr(background, "summarize_run", computed)
    problem, before = slow_problem(0.0), torch.get_num_threads()
    torch.set_num_threads(before + 2)
    try:
        filling = background.Filling(problem, run, 2, tmp_path / "store", {"progress": True, "keep_batches": 4})
        filling.start()
        filling.start()
        go.set()
        filling.finish()
    finally:
        torch.set_num_threads(before)
    ((threads, model, options),) = seen
    assert threads == before + 2
    assert model is not problem.model
    assert options == {"store": tmp_path / "store", "progress": False, "keep_batches": 4}


def test_a_filled_store_is_read_again_only_when_it_has_grown_and_its_button_rests(run, tmp_path):
    explorer = ho.explore(slow_problem(0.0), run, 2, store=tmp_path / "store")
    explorer.filling.finish()
    explorer.poll()
    assert explorer.filling.grown() is None
    assert np.isfinite(explorer.session.ds.D2.values).all()
    assert explorer.controls.stop.disabled
    explorer.filling.error = ValueError("broken")
    explorer.poll()
    assert explorer.controls.progress.bar_style == "danger"
    explorer.filling.start()
    explorer.filling.finish()  # an error of before is not raised again


def test_what_is_given_goes_before_what_a_study_says(study, run):
    found = of_study(study, run, 1, {"keep_batches": 3})
    assert (found[1], found[2], found[3]["keep_batches"]) == (run, 1, 3)
    assert of_study(study, None, None, {})[2] == 2


def test_long_names_keep_both_ends_and_a_closed_line_is_made_anew(ds):
    label = "begin." + 60 * "x" + ".end"
    first = ho.explore(ds.ho.merge({label: ["layer0.weight"]})).controls
    told = first.cells.value
    assert "begin." in told
    assert ".end" in told
    assert label not in told
    first.pulse.line.close()
    assert ho.explore(ds).controls.pulse is not first.pulse
