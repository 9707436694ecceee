"""Every plot on every kind of Dataset, without arguments; the frames behind them; labels that would break a figure."""

import io
from itertools import pairwise

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hoanalysis import plots
from hoanalysis.analysis.example import example
from hoanalysis.analysis.merge import merge
from hoanalysis.analysis.steps import learning_rates
from hoanalysis.analysis.taylor_step import taylor_step
from hoanalysis.errors import ArgumentError
from hoanalysis.plots import frames, style

STRANGE = ["a$b$", "_hidden", "<script>", "\u6f22\u5b57\n\u202e", "x" * 300, "x" * 150 + "y" + "x" * 149]


@pytest.fixture(autouse=True)
def _agg():
    before = plt.get_fignums()
    with matplotlib.rc_context({"interactive": False}):
        yield
    assert plt.get_fignums() == before


def missing_one():
    ds = example(steps=3, order=2)
    for name in ("loss", "D1", "D2", "D3_diag", "D1_batch", "D2_batch", "weight"):
        ds[name][-1] = np.nan
    norm = ds.direction_norm.values.copy()
    norm[-1] = np.nan
    return ds.assign_coords(direction_norm=(("step", "group"), norm))


def strange_labels():
    ds = example(layers=3, steps=2)
    return ds.assign_coords({d: STRANGE for d in ("group", "group2", "group3")})


DATASETS = {
    "series": lambda: example(steps=3, order=2),
    "one checkpoint": lambda: example(order=2),
    "one group": lambda: merge(example(steps=2), 1),
    "one group, one checkpoint": lambda: merge(example(), 1),
    "one step in a series": lambda: example(steps=1),
    "a missing checkpoint": missing_one,
    "nothing computed": lambda: example(steps=2).map(lambda a: a * np.nan, keep_attrs=True),
    "no blocks": lambda: example(steps=2).drop_vars(["D1_batch", "D2_batch", "D3_batch", "weight"]),
    "other kinds": lambda: example().assign_coords(kind=("group", ["weight", "bias", "norm", "embedding"])),
    "strange labels": strange_labels,
    "many groups": lambda: example(layers=35, size=1, batches=3, order=2),
}


def shown(figure):
    """Every finite number that is drawn as data."""
    numbers = []
    for ax in figure.axes:
        if ax.get_label() == "<colorbar>":
            continue
        lines = [line for line in ax.lines if not np.array_equal(line.get_xydata()[:, 0], [0, 1])]  # no axhline
        numbers += [np.ravel(line.get_ydata()) for line in lines if len(line.get_xydata())]
        numbers += [np.ma.filled(mesh.get_array(), np.nan).ravel() for mesh in ax.collections if hasattr(mesh, "cmap")]
        numbers += [np.array([patch.get_width(), patch.get_height()]) for patch in ax.patches]
    found = np.concatenate([np.asarray(n, float) for n in numbers]) if numbers else np.zeros(0)
    return found[np.isfinite(found)]


def told(figure):
    """Every text of the figure but tick labels."""
    return [t.get_text() for ax in figure.axes for t in (*ax.texts, ax.title) if t.get_text()]


@pytest.mark.parametrize("make", DATASETS.values(), ids=DATASETS.keys())
@pytest.mark.parametrize("name", plots.__all__)
def test_every_plot_shows_numbers_or_says_why_not(name, make):
    ds = make()
    ax = getattr(plots, name)(ds)
    assert isinstance(ax, Axes)
    ax.figure.savefig(io.BytesIO(), dpi=40)
    assert all(text.strip() for text in told(ax.figure))
    assert told(ax.figure), "a title or a reason"
    assert len(shown(ax.figure)) or any(len(t) > 20 for t in told(ax.figure))


@pytest.mark.parametrize("name", ["learning_rates", "regularizer", "matrix", "errors", "third", "change"])
def test_labels_are_drawn_as_text(name):
    figure = getattr(plots, name)(strange_labels()).figure
    ticks = [t.get_text() for ax in figure.axes for axis in (ax.xaxis, ax.yaxis) for t in axis.get_ticklabels()]
    assert set(style.texts(STRANGE)) <= set(ticks)
    assert "<script>" in ticks


@pytest.mark.parametrize("name", plots.__all__)
def test_every_plot_draws_into_given_axes(name):
    figure = Figure(layout="constrained")
    ax = getattr(plots, name)(example(steps=2), ax=figure.add_subplot())
    assert ax.figure is figure
    figure.savefig(io.BytesIO(), dpi=40)


@pytest.mark.parametrize("name", plots.__all__)
@pytest.mark.parametrize("make", [strange_labels, lambda: example(steps=3, layers=9, order=2)], ids=["strange", "18"])
def test_no_label_is_cut_and_no_tick_labels_overlap(name, make):
    ax = getattr(plots, name)(make())
    figure = ax.figure
    figure.draw_without_rendering()
    frame = figure.bbox
    for axes in figure.axes:
        box = axes.get_tightbbox()
        assert box.x0 >= -1, axes.get_title()
        assert box.y0 >= -1, axes.get_title()
        assert box.x1 <= frame.x1 + 1, axes.get_title()
        assert box.y1 <= frame.y1 + 1, axes.get_title()
        for axis, at in ((axes.xaxis, 0), (axes.yaxis, 1)):
            boxes = [t.get_window_extent() for t in axis.get_ticklabels() if t.get_text() and t.get_visible()]
            ends = sorted((b.bounds[at], b.bounds[at] + b.bounds[at + 2]) for b in boxes)
            assert all(a[1] <= b[0] + 1 for a, b in pairwise(ends)), (name, axes.get_title(), ends)


def test_an_interactive_session_owns_its_figures():
    with matplotlib.rc_context({"interactive": True}):
        ax = plots.loss(example())
    assert plt.get_fignums()
    plt.close(ax.figure)


def test_the_papers_legend():
    ax = plots.matrix(example(steps=2), scale="linear")
    mesh = ax.collections[0]
    assert mesh.norm.vmin == -mesh.norm.vmax
    np.testing.assert_allclose(mesh.cmap(mesh.norm(0.0))[:3], 1, atol=0.05)
    red, blue = mesh.cmap(mesh.norm(mesh.norm.vmax)), mesh.cmap(mesh.norm(mesh.norm.vmin))
    assert red[0] > 2 * max(red[1], red[2])
    assert blue[2] > 2 * blue[0]
    np.testing.assert_allclose(mesh.get_array().reshape(4, 4), example(steps=2).D2.values[-1])


def test_a_shared_limit_and_a_signed_log_scale():
    ds = example(steps=2)
    assert plots.matrix(ds, limit=1e3, scale="linear").collections[0].norm.vmax == 1e3
    norm = plots.matrix(ds, scale="log").collections[0].norm
    np.testing.assert_allclose([norm(0.0), norm(norm.vmax), norm(norm.vmin)], [0.5, 1, 0], atol=1e-12)
    with pytest.raises(ArgumentError, match="'linear' or 'log'"):
        plots.matrix(ds, scale="cubic")


def test_dots_mark_what_is_not_told_from_zero():
    ds = example()
    ds.D2_se[:] = 0.0
    assert len(plots.matrix(ds).collections) == 1
    ds.D2_se[0, 1] = np.abs(ds.D2.values[0, 1])
    np.testing.assert_allclose(plots.matrix(ds).collections[1].get_offsets(), [[1.5, 0.5]])


def test_steps_are_chosen_by_label_and_missing_ones_are_skipped():
    ds = missing_one()
    assert frames.step_of(frames.at_step(ds)) == 10
    assert frames.step_of(frames.at_step(ds, "first")) == 0
    assert frames.step_of(frames.at_step(ds, 20)) == 20
    with pytest.raises(ArgumentError, match="'0', '10', '20'"):
        frames.at_step(ds, 7)


def test_the_frame_of_rates_is_that_of_the_verb():
    ds = example(steps=3)
    frame, found = frames.rates(ds, "ridge"), learning_rates(ds, "ridge")
    assert frame.step.unique().tolist() == [0, 20]
    np.testing.assert_allclose(frame[frame.step == 20].value, found.learning_rates.values[2])
    np.testing.assert_allclose(frame[frame.step == 20].se, found.learning_rates_se.values[2])


def test_the_taylor_step_is_drawn_in_the_same_way():
    ds = example(4, steps=2)
    frame, found = frames.rates(ds, "taylor"), taylor_step(ds)
    np.testing.assert_allclose(frame[frame.step == 10].value, found.learning_rates.values[1])
    np.testing.assert_allclose(frame[frame.step == 10].se, found.learning_rates_se.values[1])
    assert plots.learning_rates(ds, regularization="taylor").get_title() == "Learning rates, Taylor step"
    assert plots.learning_rates(ds, regularization="r").get_title() == "Learning rates, r regularization"


def test_the_used_rate_is_the_one_logged_last():
    log = pd.DataFrame({"step": [0, 10, 20], "learning_rate": [np.nan, 0.1, 0.05]})
    assert [frames.used_at(log, s) for s in (0, 10, 15, 99)] == [0.1, 0.1, 0.1, 0.05]
    assert frames.used_at(0.3, 5) == 0.3
    with pytest.raises(ArgumentError, match="learning_rate"):
        frames.used_at(log.drop(columns="learning_rate"), 0)


def test_used_rates_and_logged_losses_are_drawn():
    ds = example(steps=3)
    log = pd.DataFrame({"step": [0, 10, 20], "learning_rate": [0.2, 0.1, 0.05], "loss": 1.0, "test_loss": 2.0})
    labels = [t.get_text() for t in plots.learning_rates(ds, used=log).get_legend().get_texts()]
    assert labels[:2] == ["used at step 0", "used at step 20"]
    assert "used" in [t.get_text() for t in plots.learning_rates(ds, used=0.1).get_legend().get_texts()]
    labels = [t.get_text() for t in plots.loss(ds, log=log).get_legend().get_texts()]
    assert labels == ["summaries", "log: loss", "log: test_loss"]
    labels = [t.get_text() for t in plots.spectrum(ds, used=log).get_legend().get_texts()]
    assert labels[-1] == "2 / learning rate"


def test_labels_become_plain_text_and_stay_apart():
    shown = style.texts(STRANGE)
    assert len(set(shown)) == len(shown)
    assert shown[0] == r"a\$b\$"
    assert not shown[1].startswith("_")
    assert all(len(s) <= 50 and s.isprintable() for s in shown)


def test_the_loss_of_the_log_is_not_cut_off():
    """A training loss far below that on the data of the report."""
    ds = example(steps=4)
    ds["loss"].values[...] = [2.0, 1.0, 0.1, 0.02]
    log = pd.DataFrame({"step": ds.step.values, "loss": 1e-3 * ds.loss.values, "learning_rate": 0.1})
    low, high = plots.loss(ds, log=log).get_ylim()
    assert low < log["loss"].min()
    assert high > ds.loss.max()
