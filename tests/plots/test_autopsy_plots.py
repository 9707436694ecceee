"""The waterfall and the prediction of steps, on a run that breaks; where there is nothing they say so."""

import dataclasses
import io

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from numpy.testing import assert_allclose

from hoanalysis.analysis.autopsy import autopsy
from hoanalysis.analysis.example import example
from hoanalysis.analysis.prediction import prediction
from hoanalysis.analysis.verdict import break_of
from hoanalysis.errors import ArgumentError
from hoanalysis.plots import autopsy as draw
from tests.analysis.trajectory import Cubic, summaries, train
from tests.plots.test_weights import drawn


@pytest.fixture(autouse=True)
def _agg():
    with matplotlib.rc_context({"interactive": False}):
        yield


@pytest.fixture(scope="module")
def ds():
    model = Cubic(third=0.3)
    points = train(model, 20, rates=0.02, momentum=0.0, change=(12, {"rates": 1.0}))
    return summaries(model, points, "to:next", labels=[*range(10), *range(50, 61)])


@pytest.mark.parametrize("top", [1, 5, 100])
def test_the_bars_lead_from_0_to_what_was_measured(ds, top):
    found = autopsy(ds)
    frame = draw.bars(found, top)
    parts = frame[~frame["whole"]]
    assert_allclose(parts["value"].sum(), found.measured, rtol=1e-10)
    ends = (parts["start"] + parts["value"]).to_numpy()
    assert_allclose(parts["start"].to_numpy()[1:], ends[:-1], atol=1e-12)
    assert parts["start"].iloc[0] == 0
    assert_allclose(ends[-2], found.predicted, rtol=1e-10)
    assert frame["label"].tolist()[-3:] == ["predicted", "unexplained", "measured"]
    assert frame["label"].iloc[0] == f"{found.terms['term'].iloc[0]}  (order {found.terms['order'].iloc[0]})"
    assert len(frame) == min(top, 34) + (top < 34) + 3


def test_the_waterfall_is_drawn_with_its_signs(ds):
    ax = draw.waterfall(ds, step=ds.step.values[12])
    frame = draw.bars(autopsy(ds, ds.step.values[12]))
    widths = [p.get_width() for p in ax.patches]
    assert_allclose(widths, frame["value"])
    for patch, row in zip(ax.patches, frame.itertuples(), strict=True):
        wanted = draw.WHOLE if row.whole else draw.UP if row.value > 0 else draw.DOWN
        assert_allclose(patch.get_facecolor(), matplotlib.colors.to_rgba(wanted))
    ax.figure.savefig(io.BytesIO(), dpi=40)
    with pytest.raises(ArgumentError, match="no step that starts at"):
        draw.waterfall(ds, step=99)


def test_what_each_group_did_is_what_the_autopsy_says(ds):
    found, shown = autopsy(ds, ds.step.values[12]), drawn(draw.contributions(ds, step=ds.step.values[12]))
    assert list(shown) == [f"Taylor polynomial of order {found.shares_order}"]
    values, bars = shown[f"Taylor polynomial of order {found.shares_order}"]
    np.testing.assert_allclose(values, found.shares["polynomial"])
    np.testing.assert_allclose(bars, 2 * found.shares["polynomial_se"])
    ax = draw.contributions(ds)
    assert [t.get_text() for t in ax.get_yticklabels()] == autopsy(ds).shares["group"].tolist()
    assert "leave out what the polynomial leaves out" in ax.get_xlabel()


def test_the_path_stands_beside_the_polynomial_where_it_is_measured(ds):
    found = autopsy(ds, ds.step.values[12])
    measured = dataclasses.replace(
        found, shares_by="path", shares=found.shares.assign(share=[4.0, 3.0, 2.0, 1.0], left_out=0.3, share_se=0.4)
    )
    frame = draw.did(measured)
    assert frame["quantity"].unique().tolist()[0] == "gradients along the step"
    np.testing.assert_allclose(frame["value"].to_numpy()[:4], [4, 3, 2, 1])
    np.testing.assert_allclose(frame["se"].to_numpy()[:4], 0.5)
    np.testing.assert_allclose(frame["value"].to_numpy()[4:], found.shares["polynomial"])


def test_the_break_is_marked_in_front_of_its_first_step():
    model = Cubic(third=0.05)
    points = train(model, 20, rates=0.02, momentum=0.0, change=(12, {"rates": 1.0}))
    ds = summaries(model, points, "to:next", labels=[*range(10), *range(50, 61)])
    ax, broke = draw.prediction(ds), break_of(ds)
    (line,) = [line for line in ax.lines if line.get_label().startswith("broke")]
    assert line.get_label() == f"broke at step {broke.step:g}"
    measured = next(line for line in ax.lines if line.get_label() == "measured")
    place = measured.get_xdata()[np.isfinite(measured.get_xdata())]
    steps = prediction(ds).step.values[prediction(ds).steps.values == 1]
    assert line.get_xdata()[0] == place[list(steps).index(broke.step)] - 0.5
    assert not any(line.get_label().startswith("broke") for line in draw.prediction(ds.isel(step=slice(0, 8))).lines)


def test_the_curves_are_the_measured_and_predicted_changes_of_single_steps(ds):
    ax = draw.prediction(ds)
    told = prediction(ds)
    single = told.steps.values == 1
    lines = {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}
    assert list(lines)[:4] == ["measured", "order 1", "order 2", "order 3"]
    y = lines["measured"].get_ydata()
    assert np.isnan(y).sum() == 2  # where steps are left out, and the step to the last checkpoint
    assert_allclose(y[np.isfinite(y)], told.measured.values[single & np.isfinite(told.measured.values)])
    y = lines["order 2"].get_ydata()
    assert_allclose(y[np.isfinite(y)], told.predicted.sel(order=2).values[single])
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "50"]
    ax.figure.savefig(io.BytesIO(), dpi=40)


@pytest.mark.parametrize("plot", [draw.waterfall, draw.contributions, draw.prediction])
def test_where_there_is_nothing_it_is_said(plot, ds):
    for one in (example(steps=3), example(), ds.map(lambda a: a * np.nan, keep_attrs=True)):
        figure = Figure()
        ax = plot(one, ax=figure.add_subplot())
        assert len(ax.texts) == 1
        assert ax.texts[0].get_text().startswith("no ")


@pytest.mark.parametrize("plot", [draw.waterfall, draw.contributions, draw.prediction])
def test_labels_that_would_break_a_figure(plot, ds):
    strange = ["a$b$", "<script>", "\u6f22\u5b57\n\u202e", "x" * 300]
    odd = ds.assign_coords({d: strange for d in ("group", "group2", "group3")})
    ax = plot(odd)
    ax.figure.savefig(io.BytesIO(), dpi=40)
    boxes = [t.get_window_extent() for t in ax.get_yticklabels()]
    assert min(b.x0 for b in boxes) >= -1


def test_a_single_checkpoint_with_the_change_measured_is_drawn(ds):
    one = ds.isel(step=3).assign(change_along=("tau", [0.1])).assign_coords(tau=[1.0])
    ax = draw.prediction(one)
    assert not ax.texts
    ax.figure.savefig(io.BytesIO(), dpi=40)
