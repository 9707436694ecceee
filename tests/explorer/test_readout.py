"""What the cells of the picture say when pointed at; where a section of a broken run opens; the sign of life."""

import re
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from lxml import html

import hoanalysis as ho
from hoanalysis import notebook as nb
from hoanalysis.analysis.example import example
from hoanalysis.explorer import pulse, readout


@pytest.fixture(scope="module")
def ds():
    return example(layers=3, size=3, steps=4)


def texts(controls) -> list[list[str]]:
    """The texts of the cells, row by row."""
    return [[cell.get("t") for cell in row] for row in html.fromstring(controls.cells.value)]


def test_every_cell_tells_names_value_and_error(ds):
    controls = ho.explore(ds, state={"step": 20}).controls
    names, one, doubtful = ds.group.values.tolist(), ds.sel(step=20), 0
    for i, row in enumerate(texts(controls)):
        for j, text in enumerate(row):
            value, se = one.D2.values[i, j], one.D2_se.values[i, j]
            doubt = ", within 2 standard errors of 0" if abs(value) < 2 * se else ""
            doubtful += bool(doubt)
            assert text == f"{names[i]} × {names[j]}: {value:.4g} ± {se:.2g} [loss]{doubt}"
    assert 0 < doubtful < 36


def test_cells_follow_block_slice_mask_and_message(ds):
    explorer = ho.explore(ds, state={"step": 0, "block": "WB", "order": 3, "slices": ["layer1.bias"]})
    controls, names = explorer.controls, ds.group.values.tolist()
    expected = ds.D3.sel(step=0, group3="layer1.bias").values[::2, 1::2]
    for mask in (False, True):  # what is hidden is told nevertheless
        controls.mask.value = mask
        told = texts(controls)
        assert [[t.split(": ")[0] for t in row] for row in told] == [
            [f"{a} × {b} × layer1.bias" for b in names[1::2]] for a in names[::2]
        ]
        values = [[float(re.search(r": (\S+) ±", t)[1]) for t in row] for row in told]
        np.testing.assert_allclose(values, expected, rtol=1e-3)
    controls.order.value = 1  # a vector, which has an axis to be read
    assert controls.cells.value == ""


def test_names_in_cells_are_escaped_and_many_cells_are_left_out(ds, monkeypatch):
    odd = ds.ho.merge({"\"'><img src=x onerror=alert(1)>\u202e": ["layer0.weight"]})
    controls = ho.explore(odd).controls
    assert "<img" not in controls.cells.value
    assert texts(controls)[0][0].startswith("\"'><img src=x onerror=alert(1)>\N{WHITE SQUARE} × ")
    monkeypatch.setattr(readout, "CELLS", 35)
    controls.step.value = 0
    assert controls.cells.value == ""


def test_the_line_is_renewed_until_it_is_ended(monkeypatch):
    monkeypatch.setattr(pulse, "BEAT", 0.01)
    beating, seen, enough = pulse.Pulse(), [], threading.Event()
    beating.line.observe(lambda change: (seen.append(change["new"]), len(seen) > 3 and enough.set()), "value")
    beating.start()
    beating.start()
    assert enough.wait(20)
    beating._ended.set()
    beating._thread.join(20)
    assert seen[:4] == [f"<span class='ho-pulse' data-beat='{k}'></span>" for k in range(1, 5)]  # of one thread


def test_a_message_stays_when_a_clock_calls(ds):
    explorer = ho.explore(ds)
    controls = explorer.controls
    controls.grouping.value, controls.pattern.value = "pattern", "zzz*"
    assert "matches no group" in controls.message.value
    explorer._guarded(lambda: None, asked=False)()
    assert "matches no group" in controls.message.value
    explorer._guarded(lambda: None)()
    assert controls.message.value == ""


def test_a_section_of_a_broken_run_opens_where_its_static_picture_is(ds, monkeypatch):
    broke = SimpleNamespace(step=20.0)
    seen, shown = nb.until(ds, broke), []
    monkeypatch.setattr(nb, "live", lambda: True)
    monkeypatch.setattr(nb, "display", shown.append)
    nb.view(ds, {"matrix": "inverse"}, lambda: None, seen)
    nb.view(ds, {}, lambda: None, nb.until(ds, None))
    assert shown[0].sentence.startswith("Step 20: inverse")
    assert shown[1].sentence.startswith("Step 30: ")
    assert (nb.opening(ds, ds), nb.opening(ds, seen)) == ({}, {"step": 20})


@pytest.mark.parametrize("counts", [8, [0, 8, 8, 0]])
def test_the_ends_of_a_series_with_one_count_of_batches_for_all(ds, counts):
    told = ds.drop_vars("n_batches", errors="ignore")
    told = told.assign_coords(n_batches=counts if np.isscalar(counts) else ("step", counts))
    expected = [0, 30] if np.isscalar(counts) else [10, 20]
    assert [one.step.item() for one in nb.ends(told)] == expected
