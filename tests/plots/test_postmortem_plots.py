"""What the figures of the post-mortem show, against the verbs and against plain arithmetic."""

import io

import matplotlib
import numpy as np
import pandas as pd
import pytest
import xarray as xr

from hoanalysis import plots
from hoanalysis.analysis.compare import compare, differences
from hoanalysis.analysis.example import example
from hoanalysis.analysis.interactions import SHARES, shares
from hoanalysis.analysis.laplace import laplace
from hoanalysis.analysis.reinitialization import reinitialization
from hoanalysis.analysis.taylor_step import taylor_step
from hoanalysis.analysis.unsettled import unsettled
from hoanalysis.plots import frames
from tests.plots.test_weights import drawn


@pytest.fixture(autouse=True)
def _agg():
    with matplotlib.rc_context({"interactive": False}):
        yield


def lines(ax):
    return {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}


def ticks(ax):
    return [t.get_text() for t in ax.get_yticklabels()]


def unconditional(ds):
    return ds.assign_attrs(standard_errors="unconditional: with what the data do through the direction")


def colour_bar(ax):
    return next(other.get_ylabel() for other in ax.figure.axes if "2 standard errors of 0" in other.get_ylabel())


@pytest.mark.parametrize("name", ["matrix", "blocks", "third", "change", "errors"])
def test_marks_say_of_which_errors_they_are(name):
    ds = example(steps=2)
    assert "(errors with u held fixed, too small along the gradient)" in colour_bar(getattr(plots, name)(ds))
    told = colour_bar(getattr(plots, name)(unconditional(ds)))
    assert "(unconditional errors, with what the data do through u)" in told
    for word in ("held fixed", "unconditional"):  # other directions do not depend on these data
        assert word not in colour_bar(getattr(plots, name)(ds.assign_attrs(direction="weights")))


def test_each_share_is_drawn_and_the_two_that_coincide_are_told_apart():
    ds = example(steps=3)
    found, shown = shares(ds), lines(plots.shares(ds))
    names = {
        "between groups, scale-free": "off_diagonal",
        "between layers, scale-free": "off_block",
        "between groups, raw": "off_diagonal_raw",
        "between layers, raw": "off_block_raw",
    }
    assert set(names.values()) == set(SHARES)
    assert list(shown) == list(names)
    for label, name in names.items():
        np.testing.assert_allclose(shown[label].get_ydata(), found[name].values)
    groups, layers = shown["between groups, raw"], shown["between layers, raw"]
    assert groups.get_color() == layers.get_color()
    assert layers.get_markersize() > 2 * groups.get_markersize()  # a ring around a dot
    assert layers.get_markerfacecolor() == "none"
    assert (groups.get_linestyle(), layers.get_linestyle()) == ("-", "--")


def test_close_checkpoints_stand_apart_and_data_stay_in_steps():
    ds = example(steps=6).assign_coords(step=[0, 40, 80, 81, 82, 120])
    log = pd.DataFrame({"step": [0, 20, 40], "loss": [3.0, 2.0, 1.0]})
    ax = plots.loss(ds, log=log)
    np.testing.assert_array_equal(lines(ax)["summaries"].get_xdata(), [0, 40, 80, 81, 82, 120])
    x = ax.transData.transform(np.column_stack([[0, 20, 40, 80, 81, 82, 120], np.ones(7)]))[:, 0]
    np.testing.assert_allclose(np.diff(x[[0, 2, 3, 4, 5, 6]]), np.diff(x)[-1], rtol=1e-9)
    np.testing.assert_allclose(x[1], (x[0] + x[2]) / 2, rtol=1e-9)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "40", "80", "81", "82", "120"]
    assert ax.get_xlabel() == "step (checkpoints evenly spaced)"
    assert plots.loss(example(steps=6)).get_xscale() == "linear"
    back = ax.transData.inverted().transform([(x[0] - 50, 0), (x[-1] + 50, 0)])[:, 0]
    assert back[0] < 0
    assert back[1] > 120


def test_the_taylor_step_is_drawn_with_what_it_predicts():
    ds = example(4, steps=2)
    found, ax = taylor_step(ds), plots.taylor_step(ds, used=0.1)
    shown = drawn(ax)
    for i, step in enumerate((0, 10)):
        np.testing.assert_allclose(shown[f"step {step}"][0], found.learning_rates.values[i])
        np.testing.assert_allclose(shown[f"step {step}"][1], 2 * found.learning_rates_se.values[i])
        value, se = found.predicted.values[i], found.predicted_se.values[i]
        word = found.status.values[i].partition(":")[0]
        assert f"step {step}: predicted change of the loss {value:.3g} ± {se:.1g} ({word})" in ax.get_title()
    assert "used" in lines(ax)
    assert "order=3" in plots.taylor_step(example(order=2)).texts[0].get_text()


def test_the_taylor_plot_follows_the_rates_that_are_asked_for():
    ds = example(4)
    step = taylor_step(ds)
    shown = lines(plots.taylor(ds, regularization="taylor"))
    at = int(np.flatnonzero(shown["order 3"].get_xdata() == 1)[0])
    np.testing.assert_allclose(shown["order 3"].get_ydata()[at], step.predicted.item(), rtol=1e-9)
    assert "along the Taylor step" in plots.taylor(ds, regularization="taylor").get_title()


def test_open_signs_are_the_nearest_of_the_verb():
    ds = example(1, steps=2)
    ds["D2_se"] = np.abs(ds.D2) * np.random.default_rng(0).uniform(0.2, 3.0, ds.D2.shape)
    ds["D2_se"].values[...] = np.maximum(ds.D2_se.values, ds.D2_se.values.swapaxes(1, 2))
    ds["D1_se"] = np.abs(ds.D1) * [2.0, 2.1, 2.2, 2.3]  # no ties
    rows = unsettled(ds.isel(step=1)).sort_values("times")
    rows = rows[rows["quantity"].isin(["D1", "D2", "learning_rates"])].head(5)
    ax = plots.unsettled(ds, top=5)
    np.testing.assert_allclose([p.get_width() for p in ax.patches], rows["times"].to_numpy()[order(ax, rows)])
    expected = {
        f"{r.quantity.replace('_', ' ')} of {' × '.join(g for g in (r.group, r.group2, r.group3) if g)}"
        for r in rows.itertuples()
    }
    assert set(ticks(ax)) == expected
    assert "errors with u held fixed" in ax.get_xlabel()
    assert "unconditional errors" in plots.unsettled(unconditional(ds)).get_xlabel()


def order(ax, rows):
    """The rows in the order in which the bars were made: by quantity, as they come up."""
    kinds = list(dict.fromkeys(rows["quantity"]))
    return np.argsort([kinds.index(q) for q in rows["quantity"]], kind="stable")


def test_a_dataset_whose_signs_are_settled_says_so():
    ds = example(1)
    names = [n for n in ds.data_vars if n.endswith("_se") or n.endswith("_batch") or n == "weight"]
    sure = ds.assign({n: ds[n] * 0 for n in names if n.endswith("_se")}).drop_vars([n for n in names if "_se" not in n])
    assert "every sign is settled" in plots.unsettled(sure).texts[0].get_text()


def test_differences_are_those_of_compare_in_standard_errors():
    ds = example(2, steps=3)
    found = compare(ds, ds, ("first", "last"))
    rows = differences(found)
    rows = rows[np.isfinite(rows["significance"])].head(6)
    ax = plots.differences(ds, top=6)
    widths = np.array([p.get_width() for p in ax.patches])
    np.testing.assert_allclose(widths, (rows["difference"] / rows["se"]).to_numpy()[order(ax, rows)])
    assert (widths < 0).any() or (rows["difference"] > 0).all()
    assert ax.get_title() == "What changed most surely, from step 0 to step 20"
    assert "loss" in ticks(plots.differences(ds, top=200))
    other = example(7)
    assert plots.differences(example(2), other=other).get_title().endswith("from a to b")
    assert "one checkpoint" in plots.differences(example(2)).texts[0].get_text()


def test_re_initialised_groups_by_order_and_measured():
    ds = example(3, steps=2).assign_attrs(direction="to:init")
    ds["change_removed"] = ds.D1 * 1.5
    ds["change_removed_se"] = abs(ds.D1) * 0.1
    found, shown = reinitialization(ds).isel(step=0), drawn(plots.reinitialization(ds, step=0))
    assert list(shown) == ["predicted, order 1", "predicted, order 2", "predicted, order 3", "measured"]
    for d in (1, 2, 3):
        np.testing.assert_allclose(shown[f"predicted, order {d}"][0], found.predicted.sel(order=d))
        np.testing.assert_allclose(shown[f"predicted, order {d}"][1], 2 * found.predicted_se.sel(order=d))
    np.testing.assert_allclose(shown["measured"][0], ds.change_removed[0])
    np.testing.assert_allclose(shown["measured"][1], 2 * ds.change_removed_se[0])
    for at, line in enumerate(c.lines[0] for c in plots.reinitialization(ds, step=0).containers):
        assert (np.abs(line.get_ydata() - np.arange(4)) < 0.5).all(), at  # within its row
    (text,) = plots.reinitialization(example()).texts
    assert text.get_text() == "this needs summaries along the direction 'to:init'"


def test_laplace_says_what_lies_between_layers():
    ds = example(3).assign_attrs(direction="weights")
    found = laplace(ds)
    told = f"{found.cross_layer.item():.2g} ± {found.cross_layer_se.item():.1g} of the correlations between layers"
    assert told in plots.laplace(ds).get_title()
    assert f"{found.information.item():.2g} ± {found.information_se.item():.1g} nats" in plots.laplace(ds).get_title()


def hessian(steps):
    """What `ho.curvature` returns of a run."""
    names = {
        "largest": 40.0,
        "largest_se": 1.0,
        "lowest": -3.0,
        "lowest_se": 0.5,
        "trace": 90.0,
        "trace_se": 2.0,
        "n_batches": 4,
    }
    return xr.Dataset({n: ("step", v * (1 + np.arange(len(steps)))) for n, v in names.items()}, {"step": list(steps)})


def test_the_full_hessian_stands_beside_the_edge_of_stability():
    ds, log = example(2, steps=3), pd.DataFrame({"step": [0, 10], "learning_rate": [0.1, 0.2], "momentum": [0.9, 0.5]})
    given = hessian([0, 20])
    ax = plots.curvature(ds, hessian=given, used=log, momentum=log)
    shown = lines(ax)
    np.testing.assert_allclose(shown["largest, of the Hessian"].get_xydata(), [[0, 40], [20, 80]])
    np.testing.assert_allclose(shown["lowest, of the Hessian"].get_ydata(), [-3, -6])
    own = np.linalg.eigvalsh(ds.D2[1] / np.outer(*[ds.direction_norm[1].values] * 2))
    np.testing.assert_allclose(shown["largest, along the groups"].get_ydata()[1], own[-1])
    np.testing.assert_allclose(shown["lowest, along the groups"].get_ydata()[1], own[0])
    np.testing.assert_allclose(shown["2 / learning rate"].get_ydata(), [2 / 0.1, 2 / 0.2, 2 / 0.2][: len(steps_of(ax))])
    edge = shown["2 (1 + momentum) / learning rate"]
    np.testing.assert_allclose(dict(zip(edge.get_xdata(), edge.get_ydata(), strict=True))[20], 2 * 1.5 / 0.2)
    np.testing.assert_allclose(dict(zip(edge.get_xdata(), edge.get_ydata(), strict=True))[0], 2 * 1.9 / 0.1)
    ax.figure.savefig(io.BytesIO(), dpi=40)


def steps_of(ax):
    return lines(ax)["2 / learning rate"].get_xdata()


def test_a_stored_hessian_is_found_in_the_dataset():
    ds, given = example(2, steps=2), hessian([0, 10])
    stored = ds.assign({f"hessian_{n}": given[n] for n in given.data_vars})
    found = frames.hessian_of(stored)
    assert set(found.data_vars) == set(given.data_vars)
    for name in given.data_vars:
        np.testing.assert_array_equal(found[name], given[name])
    np.testing.assert_allclose(lines(plots.curvature(stored))["largest, of the Hessian"].get_ydata(), [40, 80])
    assert plots.curvature(ds).get_title().startswith("Curvature of the loss along the groups")
    assert not any("of the Hessian" in name for name in lines(plots.curvature(ds)))


def test_momentum_moves_the_edge_beside_the_spectrum():
    ds = example(2, steps=3)
    shown = lines(plots.spectrum(ds, used=0.1, momentum=0.9))
    np.testing.assert_allclose(shown["2 / learning rate"].get_ydata(), 20.0)
    np.testing.assert_allclose(shown["2 (1 + 0.9) / learning rate"].get_ydata(), 38.0)
    assert "2 (1 + 0.9) / learning rate" not in lines(plots.spectrum(ds, used=0.1))


@pytest.mark.parametrize("name", ["spectrum", "curvature"])
def test_a_momentum_that_is_an_estimate_makes_the_edge_a_band(name):
    ds = example(2, steps=3)
    plain = getattr(plots, name)(ds, used=0.1, momentum=0.9)
    ax = getattr(plots, name)(ds, used=0.1, momentum=0.9, momentum_se=0.02)
    assert "2 (1 + 0.9 ± 0.02) / learning rate" in lines(ax)
    assert len(ax.collections) == len(plain.collections) + 1
    heights = ax.collections[-1].get_paths()[0].vertices[:, 1]
    np.testing.assert_allclose([heights.min(), heights.max()], [2 * 1.86 / 0.1, 2 * 1.94 / 0.1])
