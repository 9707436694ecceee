"""What heatmaps and partition curves show: the numbers of the verbs, and dots where nothing is told from 0."""

import numpy as np
import pytest

from hoanalysis import plots
from hoanalysis.analysis.coarsen import kept_share, suggest_partition
from hoanalysis.analysis.example import example
from hoanalysis.analysis.inverse import inverse, scale_free
from hoanalysis.errors import ArgumentError


def cells(ax):
    """The numbers of a heatmap, and where its dots are."""
    mesh, *marks = ax.collections
    shape = mesh.get_coordinates().shape[0] - 1, mesh.get_coordinates().shape[1] - 1
    dotted = np.zeros(shape, bool)
    for column, row in (xy for mark in marks for xy in np.asarray(mark.get_offsets())):
        dotted[int(row), int(column)] = True
    return np.ma.filled(mesh.get_array().reshape(shape), np.nan), dotted


def noisy():
    """About half of the entries of D2 and D3 are within 2 standard errors of 0, and so are derived ones."""
    ds = example(1)
    for name in ("D2", "D3"):
        odd = np.random.default_rng(1).random(ds[name].shape) < 0.5
        ds[f"{name}_se"] = np.abs(ds[name]) * np.where(odd, 0.4, 0.6)
        sums = ds[f"{name}_batch"]
        ds[f"{name}_batch"] = sums + 25 * np.random.default_rng(0).normal(size=sums.shape)
    return ds


MATRICES = {
    "H": lambda ds: (plots.matrix(ds), ds.D2.values, ds.D2_se.values),
    "inverse": lambda ds: (plots.matrix(ds, which="inverse"), inverse(ds).values, inverse(ds).inverse_se.values),
    "scale-free": lambda ds: (
        plots.matrix(ds, which="scale_free"),
        scale_free(ds).values,
        scale_free(ds).scale_free_se.values,
    ),
    "blocks": lambda ds: (plots.blocks(ds), ds.D2.values[::2, ::2], ds.D2_se.values[::2, ::2]),
    "third": lambda ds: (
        plots.third(ds, group="layer1.weight", scale_free=False),
        ds.D3.values[:, :, 2],
        ds.D3_se.values[:, :, 2],
    ),
    "change": lambda ds: (
        plots.change(ds, other=example(7), quantity="D2"),
        example(7).D2.values - ds.D2.values,
        np.hypot(ds.D2_se.values, example(7).D2_se.values),
    ),
}


@pytest.mark.parametrize("make", MATRICES.values(), ids=MATRICES.keys())
def test_every_matrix_shows_its_numbers_and_dots_what_is_not_told_from_zero(make):
    ax, values, errors = make(noisy())
    shown, dotted = cells(ax)
    np.testing.assert_allclose(shown, values, rtol=1e-12)
    expected = np.abs(values) < 2 * errors
    assert 0 < expected.sum() < expected.size
    np.testing.assert_array_equal(dotted, expected)
    assert any("dots: within 2 standard errors of 0" in other.get_ylabel() for other in ax.figure.axes)


def test_crosses_mark_the_same_entries():
    ds = noisy()
    shown, crossed = cells(plots.errors(ds))
    np.testing.assert_allclose(shown, ds.D2_se.values / np.abs(ds.D2.values), rtol=1e-12)
    np.testing.assert_array_equal(crossed, np.abs(ds.D2.values) < 2 * ds.D2_se.values)


def test_a_slice_of_the_third_order():
    ds = example(2, steps=2)
    ax = plots.third(ds, step=0)
    free = np.zeros((4, 4, 4))
    h, third = ds.D2.values[0], ds.D3.values[0]
    for s, t, u in np.ndindex(4, 4, 4):
        free[s, t, u] = third[s, t, u] / np.sqrt(abs(h[s, s] * h[t, t] * h[u, u]))
    largest = np.abs(free).sum((0, 1)).argmax()
    np.testing.assert_allclose(cells(ax)[0], free[:, :, largest], rtol=1e-12)
    assert ax.get_title() == f"Scale-free D3, slice of {ds.group.values[largest]}, step 0"
    assert any("loss^(-1/2)" in other.get_ylabel() for other in ax.figure.axes)
    with pytest.raises(ArgumentError, match=r"did you mean 'layer0\.bias'"):
        plots.third(ds, group="layer0.bia")


def test_changes_are_those_of_compare():
    ds = example(2, steps=3)
    expected = scale_free(ds).values
    ax = plots.change(ds)
    np.testing.assert_allclose(cells(ax)[0], expected[2] - expected[0], atol=1e-15)
    assert ax.get_title() == "Difference of the scale-free H-bar, from step 0 to step 20"
    np.testing.assert_allclose(cells(plots.change(ds, step=(10, 0)))[0], expected[0] - expected[1], atol=1e-15)
    other = example(7, steps=2)
    last = scale_free(other).values[1] - expected[2]
    np.testing.assert_allclose(cells(plots.change(ds, other=other))[0], last, atol=1e-15)
    with pytest.raises(ArgumentError, match="did you mean 'scale_free'"):
        plots.change(ds, quantity="scale_fre")


def test_partitions_are_drawn_with_what_they_keep():
    ds = example(2, layers=3)
    ax = plots.merging(ds)
    x, y = ax.lines[0].get_data()
    np.testing.assert_array_equal(x, [6, 5, 4, 3, 2, 1])
    np.testing.assert_allclose(y, [suggest_partition(ds, n).kept for n in range(6, 0, -1)], rtol=1e-9)
    drawn = {c.get_label(): np.ravel(c.lines[0].get_data()) for c in ax.containers}
    for name, groups in (("layer", 3), ("kind", 2)):
        np.testing.assert_allclose(drawn[f"by {name}"], [groups, kept_share(ds, name)[0]])
