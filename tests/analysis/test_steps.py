"""Learning rates against plain numpy: unequilibrated solves, a jackknife by hand, rescaled groups."""

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from hoanalysis.analysis.example import example
from hoanalysis.analysis.merge import merge
from hoanalysis.analysis.regularizer import regularizer
from hoanalysis.analysis.steps import learning_rates
from hoanalysis.errors import ArgumentError, SchemaError

ALL = [None, "ridge", "r", "cubic"]


def rescaled(ds: xr.Dataset, c: np.ndarray) -> xr.Dataset:
    """The summaries along U^s -> c_s U^s."""
    scale = xr.DataArray(c, dims="group", coords={"group": ds.group})
    out = ds.copy()
    for name, array in ds.data_vars.items():
        factor = 1.0
        for dim in (str(d) for d in array.dims if str(d).startswith("group")):
            power = 3 if "diag" in str(name) else 1
            factor = factor * scale.rename(group=dim) ** power
        out[name] = (array * factor).transpose(*array.dims)
    return out.assign_coords(direction_norm=ds.direction_norm * scale)


def regularized(h, r, how, epsilon):
    return h + {None: 0 * h, "ridge": epsilon * np.diag(np.abs(np.diag(h))), "r": epsilon * np.diag(r)}[how]


@pytest.mark.parametrize("how", [None, "ridge", "r"])
@pytest.mark.parametrize("seed", range(3))
def test_rates_solve_the_regularized_system(how, seed):
    ds = example(seed)
    h = regularized(ds.D2.values, regularizer(ds).values, how, 0.3)
    np.testing.assert_allclose(
        learning_rates(ds, how, 0.3).learning_rates.values, np.linalg.solve(h, ds.D1.values), rtol=1e-9
    )


@pytest.mark.parametrize("order", [2, 3])
def test_cubic_rates_satisfy_their_fixed_point(order):
    ds = example(1, order=order)
    eta = learning_rates(ds, "cubic", 2.0).learning_rates.values
    r = regularizer(ds).values
    sigma = 2.0 / 2 * np.sqrt(r @ eta**2)
    np.testing.assert_allclose((ds.D2.values + sigma * np.diag(r)) @ eta, ds.D1.values, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("how", [None, "r"])
def test_errors_are_a_delete_one_jackknife(how):
    ds = example(2)
    w, total, n = ds.weight.values, ds.weight.values.sum(), ds.sizes["batch"]
    full, squares = learning_rates(ds, how, 0.5).learning_rates.values, 0.0
    for b in range(n):
        keep = np.arange(n) != b
        g, h, t = (ds[f"D{d}_batch"].values[keep].sum(0) / w[keep].sum() for d in (1, 2, 3))
        r = np.abs(np.einsum("sss->s", t)) ** (2 / 3)
        eta = np.linalg.solve(regularized(h, r, how, 0.5), g)
        squares = squares + ((total - w[b]) / total * (eta - full)) ** 2
    errors = learning_rates(ds, how, 0.5).learning_rates_se.values
    np.testing.assert_allclose(errors, np.sqrt(n / (n - 1) * squares), rtol=1e-7)


def test_without_blocks_the_error_is_nan_and_says_why():
    ds = example().drop_vars(["D1_batch", "D2_batch"])
    error = learning_rates(ds).learning_rates_se
    assert np.isnan(error.values).all()
    assert "keep_batches" in error.attrs["long_name"]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 50), st.lists(st.floats(0.01, 100), min_size=4, max_size=4), st.sampled_from(ALL))
def test_the_step_does_not_change_when_groups_are_rescaled(seed, scales, how):
    ds, c = example(seed, order=2), np.array(scales)
    step = learning_rates(ds, how)
    other = learning_rates(rescaled(ds, c), how)
    size = np.abs(step.learning_rates.values).max()
    np.testing.assert_allclose(other.learning_rates.values * c, step.learning_rates.values, rtol=1e-8, atol=1e-8 * size)
    size = np.abs(step.learning_rates_se.values).max()
    np.testing.assert_allclose(
        other.learning_rates_se.values * c, step.learning_rates_se.values, rtol=1e-7, atol=1e-7 * size
    )


def test_trivial_partition_is_cauchys_step():
    ds = merge(example(steps=3), 1)
    cauchy = ds.D1.values.sum(-1) / ds.D2.values.sum((-1, -2))
    np.testing.assert_allclose(learning_rates(ds).learning_rates.values[:, 0], cauchy, rtol=1e-12)


def with_null_group(dtype="float64", size=1e-15):
    """layer0.bias has a direction of rounding noise."""
    ds = rescaled(example(order=2), np.array([1, 1e-3, 1, 1.0])).assign_attrs(dtype=dtype)
    noise = np.random.default_rng(0).normal(size=4)
    ds.D1[1] *= size
    ds.D2[1, :] = ds.D2[:, 1] = ds.D2.values[1] * size * noise
    return ds


def test_null_groups_are_named_left_out_and_nan():
    ds = with_null_group()
    found = learning_rates(ds)
    keep = [0, 2, 3]
    np.testing.assert_allclose(
        found.learning_rates.values[keep], np.linalg.solve(ds.D2.values[np.ix_(keep, keep)], ds.D1.values[keep])
    )
    assert np.isnan(found.learning_rates.values[1])
    assert found.status.item().startswith("null groups: 'layer0.bias' have no effect")


def test_rounding_is_that_of_the_dtype():
    assert np.isnan(learning_rates(with_null_group("float32", 1e-6)).learning_rates.values[1])
    assert np.isfinite(learning_rates(with_null_group("float64", 1e-6)).learning_rates.values[1])


def test_a_small_direction_is_not_a_null_group():
    ds = rescaled(example(), np.array([1e-12, 1, 1, 1]))
    assert np.isfinite(learning_rates(ds).learning_rates.values).all()


def test_a_group_at_its_optimum_is_not_a_null_group():
    ds = example(order=2)
    ds.D1[1] = 0.0
    expected = np.linalg.solve(ds.D2.values, ds.D1.values)
    np.testing.assert_allclose(learning_rates(ds).learning_rates.values, expected, rtol=1e-9)


def test_flat_groups_have_no_best_rate():
    ds = example(order=2)
    ds.D2[1, :] = ds.D2[:, 1] = 0.0
    found = learning_rates(ds)
    assert np.isnan(found.learning_rates.values[1])
    assert "flat groups: 'layer0.bias'" in found.status.item()


def test_no_diagonal_curvature_is_still_solved():
    ds = example(order=2)
    ds.D2[1, 1] = 0.0
    expected = np.linalg.solve(ds.D2.values, ds.D1.values)
    np.testing.assert_allclose(learning_rates(ds).learning_rates.values, expected, rtol=1e-9)


def test_statuses_advise():
    ds = example(order=2)
    assert learning_rates(ds).status.item().startswith("ok")
    ds.D2[0, 0] = -1.0
    assert "indefinite: H-bar has 1 negative eigenvalue of 4" in learning_rates(ds).status.item()
    ds = example(order=2)
    ds.D2[0] = ds.D2[1] * 1.0
    ds.D2[:, 0] = ds.D2[:, 1] * 1.0
    assert "ill-conditioned" in learning_rates(ds).status.item()
    ds = example(order=2)
    ds.D3_diag[0] = 0.0
    assert "r is zero for 'layer0.weight'" in learning_rates(ds, "cubic").status.item()


def test_a_step_beyond_the_quadratic_model_is_told():
    ds = example(1)
    rates = learning_rates(ds).learning_rates.values
    third = np.einsum("stu,s,t,u", ds.D3.values, rates, rates, rates) / 6
    lower = abs(ds.D1.values @ rates) + abs(rates @ ds.D2.values @ rates) / 2
    for ratio, far in ((0.4, False), (0.6, True)):
        other = ds.assign(D3=ds.D3 * (ratio * lower / abs(third)))
        status = learning_rates(other).status.item()
        assert ("far: at these rates the term of order 3 of the loss is 0.6 times" in status) == far
        assert ("ok" in status) != far
    assert "far" not in learning_rates(ds.drop_vars("D3").assign(D3_diag=ds.D1)).status.item()


def test_series_with_a_checkpoint_that_is_not_computed():
    ds = example(steps=3, order=2)
    for name in ("D1", "D2", "D3_diag", "D2_batch", "weight"):
        ds[name][1] = np.nan
    for how in ALL:
        found = learning_rates(ds, how)
        assert np.isnan(found.learning_rates.values[1]).all()
        assert found.status.values[1].startswith("not computed")
        alone = learning_rates(ds.isel(step=2), how)
        xr.testing.assert_allclose(found.isel(step=2), alone)


def test_one_group():
    ds = merge(example(), 1)
    for how in ALL:
        assert learning_rates(ds, how).learning_rates.shape == (1,)


def test_wrong_arguments():
    with pytest.raises(ArgumentError, match="did you mean 'ridge'"):
        learning_rates(example(), "rigde")
    with pytest.raises(ArgumentError, match="positive"):
        learning_rates(example(), "ridge", 0.0)
    with pytest.raises(SchemaError, match="D2"):
        learning_rates(example().drop_vars("D2"))
    with pytest.raises(SchemaError, match="group2"):
        learning_rates(example().isel(group=[0, 1]))
