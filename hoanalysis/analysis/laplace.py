"""The Laplace approximation restricted to the scales of the groups.

u = weights = -theta; theta + sum_s eta_s U^s, and eta ~ N(0, Sigma) with

    Sigma = (N D2 + Lambda)^-1,   Lambda_ss = tau |U^s|^2

for a loss that is a mean negative log-likelihood over N samples and an isotropic Gaussian prior of precision tau on the
parameters. With the discrete partition and a linear Gaussian model it is the exact posterior covariance of the scales.
Daxberger et al. 2021; design: the section on Laplace. The block-diagonal version drops what lies between layers.
"""

import numpy as np
import xarray as xr

from hoanalysis import schema
from hoanalysis.analysis.arrays import Array, error_attrs, labelled, over_checkpoints, require, tensors
from hoanalysis.analysis.errorbars import standard_error, why_none
from hoanalysis.analysis.linear import inverse_of
from hoanalysis.analysis.pruning import needs_weights
from hoanalysis.errors import ArgumentError, SchemaError

MATRIX = schema.group_dims(2)


def laplace(ds: xr.Dataset, prior_precision: float = 1.0, n_samples: float | None = None) -> xr.Dataset:
    """Sigma = (N D2 + tau Diag(|U^s|^2))^-1, without unit, beside its block-diagonal version.

    Parameters
    ----------
    prior_precision
        tau > 0, in 1/parameter^2.
    n_samples
        N; by default the number of samples that the summaries were computed on. Give the size of the training set where
        the summaries use a part of it.

    Returns
    -------
    Dataset
        ``covariance`` (S, S) and ``covariance_se`` (delete-one jackknife), ``block_diagonal`` (S, S), where entries of
        the precision between layers are dropped before inverting, and ``status``. Where N D2 + Lambda is not positive
        definite the covariances are NaN and the status says so: theta is not a minimum, and a larger tau is a repair,
        not a prior.

    Raises
    ------
    SchemaError
        The direction is not ``weights``; D2 or N is missing.
    ArgumentError
        ``prior_precision`` or ``n_samples`` is not positive.
    """
    needs_weights(ds, "the Laplace approximation", "its prior is on the scale of each group's weights")
    require(ds, "D2")
    n = _samples(ds, n_samples)
    if not prior_precision > 0:
        raise ArgumentError(f"prior_precision must be positive, not {prior_precision!r}")
    parts = over_checkpoints(ds, lambda one: _one(one, n, prior_precision))
    titles = {"covariance": "posterior covariance of the scales", "block_diagonal": "the same, layers independent"}
    found = {
        name: labelled(ds, parts[..., i, :, :], MATRIX, name, title, "1")
        for i, (name, title) in enumerate(titles.items())
    }
    found["covariance_se"] = found["covariance"].copy(data=parts[..., 2, :, :])
    found["covariance_se"].attrs = error_attrs(titles["covariance"], "1", why_none(ds, ["D2"]))
    words = over_checkpoints(ds, lambda one: _status(precision(one, tensors(one, ["D2"])["D2"], n, prior_precision)))
    found["status"] = labelled(ds, words, (), "status", "advice on the Laplace approximation", "")
    return xr.Dataset(found).assign_attrs(prior_precision=float(prior_precision), n_samples=float(n))


def _samples(ds: xr.Dataset, given: float | None) -> float:
    if given is None and not ds.attrs.get("n_samples"):
        raise SchemaError("the number of samples is not known", do="give n_samples=")
    n = float(ds.attrs["n_samples"] if given is None else given)
    if not n > 0:
        raise ArgumentError(f"n_samples must be positive, not {given!r}")
    return n


def precision(one: xr.Dataset, d2: Array, n: float, tau: float) -> Array:
    """N D2 + tau Diag(|U^s|^2), shape (S, S)."""
    return n * d2 + tau * np.diag(np.asarray(one["direction_norm"].values, dtype=float) ** 2)


def _one(one: xr.Dataset, n: float, tau: float) -> Array:
    d2 = tensors(one, ["D2"])["D2"]
    layers = one["layer"].values.astype(str) if "layer" in one.coords else one[schema.GROUP].values.astype(str)
    full = precision(one, d2, n, tau)
    errors = standard_error(one, ["D2"], lambda t: covariance(precision(one, t["D2"], n, tau)))
    return np.stack([covariance(full), covariance(np.where(layers[:, None] == layers, full, 0.0)), errors])


def covariance(matrix: Array) -> Array:
    """The inverse of a positive definite matrix, NaN for any other."""
    if not np.isfinite(matrix).all() or np.linalg.eigvalsh(_unit(matrix))[0] <= 0:
        return np.full_like(matrix, np.nan)
    size = np.sqrt(np.abs(np.diagonal(matrix)))
    return inverse_of(_unit(matrix)) / np.outer(size, size)


def _unit(matrix: Array) -> Array:
    size = np.sqrt(np.abs(np.diagonal(matrix)))
    size = np.where(size > 0, size, 1.0)
    return matrix / np.outer(size, size)


def _status(matrix: Array) -> str:
    if not np.isfinite(matrix).all():
        return "not computed: D2 of this checkpoint is missing."
    lowest = np.linalg.eigvalsh(_unit(matrix))[0]
    if lowest > 0:
        return "ok: the precision N D2 + Lambda is positive definite."
    return (
        f"not positive definite: the lowest eigenvalue of the precision with unit diagonal is {lowest:.3g}, so that "
        f"these parameters are not at a minimum along the scales of the groups and there is no Gaussian to fit. Train "
        f"further, or raise prior_precision, knowing that it is a repair then and not a prior."
    )
