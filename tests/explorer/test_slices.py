"""Which slice of a higher order is shown where none is chosen, and errors of slices where a block is not filled."""

from itertools import product

import numpy as np
import pytest
from numpy.testing import assert_allclose

import hoanalysis as ho
from hoanalysis.analysis.example import example
from hoanalysis.explorer import State
from hoanalysis.explorer.session import Session


@pytest.fixture(scope="module")
def ds():
    return example(layers=3, size=3, steps=4)


def strongest(one) -> str:
    """The u of the largest sum over s, t of |D3_stu| / sqrt|H_ss H_tt H_uu|, by loops."""
    h, d3 = np.abs(np.diag(one.D2.values)), one.D3.values
    size = [
        sum(abs(d3[s, t, u]) / np.sqrt(h[s] * h[t] * h[u]) for s, t in product(range(len(h)), repeat=2))
        for u in range(len(h))
    ]
    return str(one.group.values[int(np.argmax(size))])


def stretched(ds, factors):
    """The same run with the direction of each group multiplied by a factor: every index of a tensor takes one."""
    found = {}
    for name, array in ds.data_vars.items():
        for dim in [d for d in array.dims if str(d).startswith("group")]:
            array = array * np.asarray(factors).reshape([-1 if d == dim else 1 for d in array.dims])
        found[name] = array
    return ds.assign(found)


def test_the_slice_that_is_shown_first_is_the_strongest_without_units(ds):
    """Whatever the length of each group's direction: its curvature goes with it."""
    for k in range(6):
        run = stretched(ds, np.where(np.arange(6) == k, 1e3, 1.0)).isel(step=[2])
        expected = strongest(run.isel(step=0))
        assert expected == strongest(ds.isel(step=2))
        assert Session(run).view(State(order=3)).state.slices == (expected,)


def test_the_slice_stays_that_of_the_last_computed_checkpoint_while_the_slider_moves(ds):
    """Else a move of the slider would compare different slices."""
    weak = [strongest(ds.isel(step=k)) for k in range(4)]
    assert len(set(weak)) > 1, weak
    for computed in ([0, 10, 20, 30], [0, 10], [20]):
        run = ds.where(ds.step.isin(computed))
        last = strongest(ds.sel(step=computed[-1]))
        for step in (0, 10, 20, 30):
            assert Session(run).view(State(order=3, step=step)).state.slices == (last,)


def test_of_the_fourth_order_the_second_index_is_the_strongest_within_the_first():
    small = example(layers=2, size=2, steps=1)
    n, rng = small.sizes["group"], np.random.default_rng(3)
    names = small.group.values.tolist()
    for _ in range(5):
        values = rng.normal(size=(n, n, n, n)) * np.exp(rng.normal(size=n))
        four = small.assign_coords(group4=names).assign(
            D4=(("step", "group", "group2", "group3", "group4"), values[None])
        )
        w = 1 / np.sqrt(np.abs(np.diag(small.D2[0].values)))
        free = np.abs(np.einsum("stuv,s,t,u,v->stuv", values, w, w, w, w))
        v = int(free.sum((0, 1, 2)).argmax())
        u = int(free[..., v].sum((0, 1)).argmax())
        assert Session(four).view(State(order=4)).state.slices == (names[v], names[u])


@pytest.mark.parametrize("empty", [{"D3_batch": [2]}, {"D2_batch": [5]}, {"D3_batch": [2], "D2_batch": [5]}])
def test_blocks_that_one_of_the_tensors_lacks_are_left_out_of_both(ds, empty):
    """As the verb does: the jackknife over the blocks that are filled in all that it needs."""
    one = ds.isel(step=[1])
    holes = {}
    for name, which in empty.items():
        axis = one[name].dims.index("batch")
        values = one[name].values.copy()
        values[(slice(None),) * axis + (which,)] = np.nan
        holes[name] = (one[name].dims, values)
    holed = one.assign(holes)
    left = np.setdiff1d(np.arange(8), [b for which in empty.values() for b in which])
    w = one.weight.values[0, left]
    d3, d2 = (one[f"{n}_batch"].values[0, left] for n in ("D3", "D2"))
    u = 4

    def free(d2, d3):
        size = np.sqrt(np.abs(np.diag(d2)))
        return d3[:, :, u] / np.outer(size, size) / size[u]

    n, total = len(left), w.sum()
    whole = free(d2.sum(0) / total, d3.sum(0) / total)
    parts = [free((d2.sum(0) - d2[b]) / (total - w[b]), (d3.sum(0) - d3[b]) / (total - w[b])) for b in range(n)]
    se = np.sqrt(n / (n - 1) * sum(((total - w[b]) / total) ** 2 * (parts[b] - whole) ** 2 for b in range(n)))
    label = str(ds.group.values[u])
    shown = Session(holed).view(State(order=3, slices=(label,), matrix="scale_free")).shown
    assert_allclose(shown.errors, se, rtol=1e-8)
    raw = ho.explore(holed, state={"order": 3, "slices": [label], "grouping": "pattern", "pattern": "first=layer0*"})
    assert np.isfinite(raw.view.shown.errors).all()
