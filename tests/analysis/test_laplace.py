"""The exact posterior of a linear Gaussian model, by Bayes' rule on the parameters."""

import numpy as np
import pytest
import xarray as xr

from hoanalysis.analysis.example import example
from hoanalysis.analysis.laplace import laplace
from hoanalysis.errors import ArgumentError, SchemaError


def linear_gaussian(n=40, p=4, tau=0.7, seed=0):
    """Summaries, along -theta and one group per parameter, of y ~ N(X theta, 1) at its posterior mode."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, p)), rng.normal(size=n)
    posterior = np.linalg.inv(x.T @ x + tau * np.eye(p))
    theta = posterior @ x.T @ y
    u = -np.diag(theta)
    ds = example(layers=2, size=1).assign_attrs(direction="weights", n_samples=n)
    ds["D2"] = (("group", "group2"), u @ (x.T @ x / n) @ u)
    ds["D1"] = ("group", u @ (x.T @ (x @ theta - y) / n))
    return ds.assign_coords(direction_norm=("group", np.abs(theta))), posterior, theta, tau


def test_discrete_partition_on_a_linear_gaussian_model_is_the_exact_posterior():
    ds, posterior, theta, tau = linear_gaussian()
    found = laplace(ds, tau)
    np.testing.assert_allclose(found.covariance.values * np.outer(theta, theta), posterior, rtol=1e-10)
    assert found.status.item().startswith("ok")


def test_block_diagonal_drops_what_lies_between_layers():
    ds, _, _, tau = linear_gaussian()
    found = laplace(ds, tau).block_diagonal.values
    full = 40 * ds.D2.values + tau * np.diag(ds.direction_norm.values**2)
    for part in (slice(0, 2), slice(2, 4)):
        np.testing.assert_allclose(found[part, part], np.linalg.inv(full[part, part]), rtol=1e-10)
    np.testing.assert_array_equal(found[:2, 2:], 0)


def test_what_is_not_positive_definite_is_said_and_nan():
    ds = example(steps=2).assign_attrs(direction="weights")
    ds.D2[1, 0, 0] = -5.0
    found = laplace(ds)
    assert found.status.values[0].startswith("ok")
    assert found.status.values[1].startswith("not positive definite")
    assert np.isnan(found.covariance.values[1]).all()
    assert np.isfinite(found.covariance_se.values[0]).all()
    xr.testing.assert_allclose(found.isel(step=0, drop=True), laplace(ds.isel(step=0, drop=True)))


def test_arguments():
    ds = linear_gaussian()[0]
    np.testing.assert_allclose(laplace(ds, 1.0, 40).covariance.values, laplace(ds, 1.0).covariance.values)
    with pytest.raises(SchemaError, match="direction='weights'"):
        laplace(example())
    with pytest.raises(ArgumentError, match="positive"):
        laplace(ds, -1.0)
    with pytest.raises(SchemaError, match="n_samples"):
        laplace(ds.assign_attrs(n_samples=0))
