"""The prediction of a cubic polynomial is exact: against the difference of its values, recomputed by loops."""

import itertools
import math

import numpy as np
import pytest
import xarray as xr

from hoanalysis.analysis.example import example
from hoanalysis.analysis.steps import learning_rates
from hoanalysis.analysis.taylor import taylor, taylor_terms
from hoanalysis.errors import ArgumentError, SchemaError


def loop(tensors: list[np.ndarray], eta: np.ndarray) -> float:
    total = 0.0
    for d, full in enumerate(tensors, 1):
        for index in itertools.product(range(len(eta)), repeat=d):
            total += full[index] * math.prod(eta[i] for i in index) / math.factorial(d)
    return total


@pytest.mark.parametrize("order", [1, 2, 3])
def test_it_is_the_taylor_sum(order):
    ds, eta = example(4, steps=2), np.random.default_rng(0).normal(size=4)
    found = taylor(ds, eta, order)
    for i in range(2):
        expected = loop([ds[f"D{d}"].values[i] for d in range(1, order + 1)], eta)
        np.testing.assert_allclose(found.values[i], expected, rtol=1e-12)
    np.testing.assert_allclose(taylor_terms(ds, eta, order).sum("order").values, found.values, rtol=1e-12)


def test_its_error_is_that_of_the_blocks_predictions():
    ds, eta = example(4), np.random.default_rng(0).normal(size=4)
    w, n = ds.weight.values, ds.sizes["batch"]
    x = np.array([loop([ds[f"D{d}_batch"].values[b] / w[b] for d in (1, 2, 3)], eta) for b in range(n)])
    mean = w @ x / w.sum()
    expected = np.sqrt(n / (n - 1) * (w**2 * (x - mean) ** 2).sum()) / w.sum()
    np.testing.assert_allclose(taylor(ds, eta).taylor_se.item(), expected, rtol=1e-10)
    assert np.isnan(taylor(ds.drop_vars("D3_batch"), eta).taylor_se.item())
    assert np.isfinite(taylor(ds.drop_vars("D3_batch"), eta, 2).taylor_se.item())


def test_eta_in_every_form():
    ds = example(steps=2)
    values = [0.1, 0.0, -0.3, 0.0]
    expected = taylor(ds, np.array(values))
    for eta in (
        {"layer0.weight": 0.1, "layer1.weight": -0.3},
        xr.DataArray(values, dims="group"),
        xr.DataArray(values, dims="group", coords={"group": ds.group})[::-1],
        np.array([values, values]),
        [0.1, np.nan, -0.3, np.nan],
    ):
        xr.testing.assert_allclose(taylor(ds, eta), expected)
    along = taylor(ds, xr.DataArray(np.outer([0.0, 1.0], values), dims=("tau", "group")))
    assert along.dims == ("tau", "step") or along.dims == ("step", "tau")
    np.testing.assert_allclose(along.isel(tau=1).values, expected.values)
    np.testing.assert_allclose(along.isel(tau=1).taylor_se.values, expected.taylor_se.values)


def test_a_training_step_in_a_series():
    ds = example(steps=3)
    rates = learning_rates(ds, "ridge").learning_rates
    found = taylor(ds, -rates, 2)
    for i in range(3):
        g, h, eta = ds.D1.values[i], ds.D2.values[i], rates.values[i]
        np.testing.assert_allclose(found.values[i], -g @ eta + eta @ h @ eta / 2)
    assert (found.values < 0).all()


def test_missing_checkpoints_are_nan_also_where_eta_is():
    ds = example(steps=2)
    ds.D1[1] = np.nan
    rates = learning_rates(ds).learning_rates
    assert np.isnan(taylor(ds, -rates).values[1])
    assert np.isnan(taylor(example(), np.full(4, np.nan)).item())


def test_wrong_arguments():
    ds = example(order=2)
    assert taylor(ds, 0.1).attrs["long_name"].endswith("order 2")
    with pytest.raises(ArgumentError, match=r"did you mean 'layer0\.weight'"):
        taylor(ds, {"layer0.weigth": 1.0})
    with pytest.raises(ArgumentError, match="expected"):
        taylor(ds, np.ones(3))
    with pytest.raises(ArgumentError, match="other groups"):
        taylor(ds, xr.DataArray(np.ones(2), dims="group", coords={"group": ["a", "b"]}))
    with pytest.raises(ArgumentError, match="whole number"):
        taylor(ds, 0.1, 0)
    with pytest.raises(SchemaError, match="needs D3"):
        taylor(ds, 0.1, 3)
