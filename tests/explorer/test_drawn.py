"""What the panels draw, read off the axes: bars, bands, dots, frames and lines where the numbers are."""

import numpy as np
import pytest
from matplotlib.colors import SymLogNorm
from numpy.testing import assert_allclose

import hoanalysis as ho
from hoanalysis.analysis.example import example
from hoanalysis.explorer.session import TAUS


@pytest.fixture(scope="module")
def ds():
    return example(layers=3, size=3, steps=4)


def axes(ds, title, **state):
    return next(ax for ax in ho.explore(ds, state=state).figure().axes if ax.get_title().startswith(title))


def band(collection):
    """Lower and upper edge at each x of what fill_between drew."""
    vertices = collection.get_paths()[0].vertices
    found = np.unique(vertices[:, 0])
    edges = [vertices[vertices[:, 0] == x, 1] for x in found]
    return found, [e.min() for e in edges], [e.max() for e in edges]


def test_learning_rates_have_bars_of_two_standard_errors(ds):
    ax = axes(ds, "Learning rates", step=10, regularization="ridge", epsilon=0.5)
    expected = ds.sel(step=10).ho.learning_rates("ridge", 0.5)
    rates, errors = expected.learning_rates.values, expected.learning_rates_se.values
    assert_allclose(ax.lines[0].get_xdata(), rates)
    bars = np.array(ax.collections[0].get_segments())[:, :, 0]
    assert_allclose(bars, np.stack([rates - 2 * errors, rates + 2 * errors], 1), rtol=1e-6)


def test_bars_that_end_at_the_edge_of_a_logarithmic_axis_say_so(ds):
    """On it 0 is not to be seen; a rate that cannot be told from 0 must not look as if it could."""
    one = ds.sel(step=10).assign(D1=np.abs(ds.D1.sel(step=10)) * 10.0 ** np.arange(6))
    for factor, told in ((1e-9, False), (1e3, True)):
        ax = axes(one.assign(D1_se=factor * one.D1), "Pseudo-gradient", order=1)
        assert ax.get_xscale() == "log"
        assert ("ends at the left reaches 0" in ax.get_xlabel()) == told


def test_trajectories_have_bands_of_two_standard_errors_and_a_line_at_the_step(ds):
    a, b = ds.group.values[[0, 3]].tolist()
    ax = axes(ds, "Trajectories", step=20, entries=[[a, b]])
    values, errors = ds.D2.values[:, 0, 3], ds.D2_se.values[:, 0, 3]
    assert_allclose(ax.lines[0].get_xydata(), np.stack([ds.step, values], 1))
    x, low, high = band(ax.collections[0])
    assert_allclose(x, ds.step)
    assert_allclose(low, values - 2 * errors)
    assert_allclose(high, values + 2 * errors)
    assert [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == ":"] == [20]


def test_predictions_have_bands_of_two_standard_errors(ds):
    one = ds.sel(step=10)
    ax = axes(ds, "Taylor prediction", step=10, regularization="cubic")
    rates = one.ho.learning_rates("cubic").learning_rates
    for order in (1, 2, 3):
        expected = one.ho.taylor(-TAUS[30] * rates, order)
        assert_allclose(ax.lines[order - 1].get_ydata()[30], expected.item())
        x, low, high = band(ax.collections[order - 1])
        assert_allclose(x, TAUS)
        reach = 2 * expected.taylor_se.item()
        assert_allclose([low[30], high[30]], [expected.item() - reach, expected.item() + reach], rtol=1e-6)


def test_dots_are_on_what_two_errors_do_not_tell_from_zero_and_frames_on_both_cells_of_what_is_selected(ds):
    one = ds.sel(step=10)
    errors = 16 * one.D2_se
    masks = [(np.abs(one.D2) < k * errors).values for k in (1, 2)]
    assert masks[0].sum() < masks[1].sum() < 36
    a, b = ds.group.values[[1, 4]].tolist()
    ax = axes(one.assign(D2_se=errors), "Pseudo-Hessian", entries=[[a, b]])
    columns, rows = np.asarray(ax.collections[0].get_offsets()).T
    assert sorted(zip(rows, columns, strict=True)) == sorted(zip(*np.nonzero(masks[1]), strict=True))
    assert sorted(p.get_xy() for p in ax.patches) == [(0.5, 3.5), (3.5, 0.5)]


def test_colours_end_where_they_are_shared_and_are_logarithmic_where_linear_ones_would_be_white(ds):
    top = np.abs(ds.D2.values).max()
    last = np.abs(ds.D2.values[3]).max()
    assert top > 1.05 * last
    for shared, end in ((False, last), (True, top)):
        image = axes(ds, "Pseudo-Hessian", step=30, scale="linear", shared=shared).images[0]
        assert_allclose([image.norm.vmin, image.norm.vmax], [-end, end])
        assert not isinstance(image.norm, SymLogNorm)
    wide = 10.0 ** np.arange(6)
    steep = ds.sel(step=30).assign(D2=ds.D2.sel(step=30) * np.outer(wide, wide))
    assert isinstance(axes(steep, "Pseudo-Hessian").images[0].norm, SymLogNorm)
    assert not isinstance(axes(steep, "Pseudo-Hessian", scale="linear").images[0].norm, SymLogNorm)


def test_rates_of_another_run_stand_beside_their_own_groups_whatever_their_order(ds):
    turned = ds.isel(group=slice(None, None, -1), group2=slice(None, None, -1), group3=slice(None, None, -1))
    turned = turned.assign(D1=2 * turned.D1)
    explorer = ho.explore(ds, others={"turned": turned}, state={"step": 10, "compare_run": "turned"})
    ax = next(a for a in explorer.figure().axes if a.get_title().startswith("Learning rates"))
    rates = np.linalg.solve(ds.D2.sel(step=10), ds.D1.sel(step=10))
    assert_allclose(ax.lines[0].get_xdata(), rates)
    assert_allclose(ax.lines[1].get_xdata(), 2 * rates)


def test_of_many_groups_the_largest_are_drawn():
    rng, n = np.random.default_rng(0), 100
    names = [f"g{i}" for i in range(n)]
    slopes = rng.permutation(np.arange(1.0, n + 1)) * rng.choice([-1, 1], n)
    one = example(layers=1).isel(group=[0], group2=[0], group3=[0])[["loss", "D1"]].drop_dims("group")
    one = one.drop_dims(["group2", "group3"], errors="ignore").assign_coords(group=names).assign(D1=("group", slopes))
    ax = axes(one, "Pseudo-gradient", order=1)
    drawn = ax.lines[0].get_xdata()
    assert 10 < len(drawn) < n
    assert_allclose(drawn, slopes[np.abs(slopes) > n - len(drawn)])
    assert f"the {len(drawn)} largest of {n}" in ax.get_title()
