"""The exact posterior of a linear Gaussian model, by Bayes' rule on the parameters."""

import numpy as np
import pytest
import xarray as xr

from hoanalysis.analysis.example import example
from hoanalysis.analysis.laplace import laplace
from hoanalysis.errors import ArgumentError, SchemaError

from .test_steps import rescaled


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


def by_hand(matrix, layers):
    """Correlations, variance missed, share and information of a precision, from their definitions."""
    sigma = np.linalg.inv(matrix)
    sd = np.sqrt(np.diag(sigma))
    correlation = sigma / sd / sd[:, None]
    block = np.zeros_like(matrix)
    apart = total = logdets = 0.0
    for layer in set(layers):
        at = [i for i, other in enumerate(layers) if other == layer]
        block[np.ix_(at, at)] = np.linalg.inv(matrix[np.ix_(at, at)])
        logdets += np.log(np.linalg.det(sigma[np.ix_(at, at)]))
    for s, t in np.ndindex(matrix.shape):
        total += abs(correlation[s, t])
        apart += abs(correlation[s, t]) * (layers[s] != layers[t])
    missed = 1 - np.diag(block) / np.diag(sigma)
    return correlation, missed, apart / total, (logdets - np.log(np.linalg.det(sigma))) / 2


NAMES = ("correlation", "missed", "cross_layer", "information")


def test_what_independent_layers_miss_and_its_jackknife():
    ds = example(3).assign_attrs(direction="weights")
    found, layers = laplace(ds, 2.0), ds.layer.values
    prior = 2.0 * np.diag(ds.direction_norm.values**2)
    expected = by_hand(128 * ds.D2.values + prior, layers)
    for name, value in zip(NAMES, expected, strict=True):
        np.testing.assert_allclose(found[name].values, value, rtol=1e-9, err_msg=name)
    assert (found.missed.values > 0).all()
    assert found.information.item() > 0
    w, total, n = ds.weight.values, ds.weight.values.sum(), ds.sizes["batch"]
    squares = [0.0] * 4
    for b in range(n):
        keep = np.arange(n) != b
        other = by_hand(128 * ds.D2_batch.values[keep].sum(0) / w[keep].sum() + prior, layers)
        squares = [
            s + ((total - w[b]) / total * (o - e)) ** 2 for s, o, e in zip(squares, other, expected, strict=True)
        ]
    for name, square in zip(NAMES, squares, strict=True):
        np.testing.assert_allclose(
            found[f"{name}_se"].values, np.sqrt(n / (n - 1) * square), rtol=1e-6, atol=1e-12, err_msg=name
        )


def test_nothing_is_missed_where_nothing_lies_between_layers():
    ds = example(3).assign_attrs(direction="weights")
    ds.D2[:2, 2:] = ds.D2[2:, :2] = 0.0
    found = laplace(ds)
    np.testing.assert_allclose(found.missed.values, 0, atol=1e-12)
    np.testing.assert_allclose([found.cross_layer.item(), found.information.item()], 0, atol=1e-12)
    np.testing.assert_allclose(found.covariance.values, found.block_diagonal.values, rtol=1e-12, atol=1e-15)


def test_rescaling_groups_changes_nothing_of_that():
    ds = example(3).assign_attrs(direction="weights")
    c = np.array([0.1, 3.0, 10.0, 0.7])
    before, after = laplace(ds), laplace(rescaled(ds, c))
    np.testing.assert_allclose(after.covariance.values * np.outer(c, c), before.covariance.values, rtol=1e-8)
    for name in NAMES:
        np.testing.assert_allclose(after[name].values, before[name].values, rtol=1e-8)


def test_groups_of_zeros_have_no_scale():
    ds = example(3).assign_attrs(direction="weights")
    norm = ds.direction_norm.values.copy()
    norm[1] = 0.0
    ds = ds.assign_coords(direction_norm=("group", norm))
    ds.D2[1, :] = ds.D2[:, 1] = 0.0
    found, keep = laplace(ds.drop_vars("weight")), [0, 2, 3]
    expected = np.linalg.inv(128 * ds.D2.values + np.diag(norm**2) + np.diag([0, 1.0, 0, 0]))[np.ix_(keep, keep)]
    np.testing.assert_allclose(found.covariance.values[np.ix_(keep, keep)], expected, rtol=1e-9)
    assert np.isnan(found.covariance.values[1]).all()
    assert np.isfinite(found.information.item())
    assert "no scale: the weights of 'layer0.bias' are all 0." in found.status.item()


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
