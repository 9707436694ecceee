"""The paper's layout: every submatrix with its numbers, its dots and its relative errors, under the right names."""

import numpy as np
import pytest

from hoanalysis import plots
from hoanalysis.analysis.example import example
from hoanalysis.analysis.inverse import inverse

KINDS = {"WW": (0, 0), "BB": (1, 1), "WB": (0, 1)}


def noisy():
    """Some entries of H-bar and of its inverse are within 2 standard errors of 0, the others are not."""
    ds = example(steps=3, order=2)
    ds["D2_se"] = np.abs(ds.D2) * np.where(np.random.default_rng(1).random(ds.D2.shape) < 0.5, 0.4, 0.6)
    ds["D2_batch"] = ds.D2_batch + 5 * np.random.default_rng(0).normal(size=ds.D2_batch.shape)
    return ds


def panels(ax):
    return [a for a in ax.figure.axes if a.get_label() != "<colorbar>"]


def expected(ds):
    """(value, error) in the order of the panels: H first and last, then the inverse first and last."""
    inverted = inverse(ds)
    for values, errors in ((ds.D2, ds.D2_se), (inverted, inverted.inverse_se)):
        for step in (0, -1):
            for row, column in KINDS.values():
                yield tuple(a.values[step][row::2, column::2] for a in (values, errors))


@pytest.mark.parametrize("errors", [False, True])
def test_every_panel_shows_its_part_of_the_matrix(errors):
    ds = noisy()
    found, wanted = panels(plots.submatrices(ds, errors=errors)), list(expected(ds))
    assert len(found) == len(wanted) == 12
    some = 0
    for ax, (values, error) in zip(found, wanted, strict=True):
        mesh, *marks = ax.collections
        shown = np.asarray(mesh.get_array()).reshape(values.shape)
        np.testing.assert_allclose(shown, np.maximum(error / np.abs(values), 1e-3) if errors else values, rtol=1e-9)
        dots = {(int(y), int(x)) for mark in marks for x, y in np.asarray(mark.get_offsets())}
        assert dots == {tuple(map(int, at)) for at in np.argwhere(np.abs(values) < 2 * error)}
        some += len(dots)
    assert 0 < some < 12 * 4


def test_rows_are_named_by_matrix_and_step_and_columns_by_kind():
    ds = noisy()
    ax = plots.submatrices(ds, steps=[10], which=["inverse"], names={10: "epoch 1"})
    found = panels(ax)
    assert [a.get_title().split()[0] for a in found] == list(KINDS)
    assert found[0].get_ylabel().endswith("epoch 1")
    assert "-1" in found[0].get_ylabel()
    assert [t.get_text() for t in found[2].get_yticklabels()] == ["layer0", "layer1"]
    np.testing.assert_allclose(
        np.asarray(found[0].collections[0].get_array()).reshape(2, 2), inverse(ds).values[1][::2, ::2]
    )


def test_white_is_zero_and_every_panel_has_its_own_symmetric_limits():
    limits = [(m.norm.vmin, m.norm.vmax) for m in (a.collections[0] for a in panels(plots.submatrices(noisy())))]
    assert all(low == -high for low, high in limits)
    assert len(set(limits)) == 12


def kinds(ax):
    return [type(a.collections[0].norm).__name__ for a in panels(ax)]


def test_a_block_has_one_kind_of_scale_at_all_checkpoints_and_says_which():
    ds = noisy()
    ds["D2"] = np.abs(ds.D2) / np.abs(ds.D2).max() + 1.0  # nothing far from the others
    alone = kinds(plots.submatrices(ds, which=["H"]))
    assert set(alone) == {"Normalize"}
    ds["D2"].values[-1, 1, 1] *= 1e4  # a linear scale would leave the last BB white
    ax = plots.submatrices(ds, which=["H"])
    assert kinds(ax) == ["Normalize", "SymLogNorm", "Normalize"] * 2
    assert [a.get_title().split(", ")[-1] for a in panels(ax)] == ["linear", "symlog", "linear"] * 2
    assert kinds(plots.submatrices(ds, which=["H"], scale="linear")) == ["Normalize"] * 6
