"""The Laplace approximation restricted to the scales of the groups, and what lies between layers in it.

u = weights = -theta; theta + sum_s eta_s U^s, and eta ~ N(0, Sigma) with

    Sigma = (N D2 + Lambda)^-1,   Lambda_ss = tau |U^s|^2

for a loss that is a mean negative log-likelihood over N samples and an isotropic Gaussian prior of precision tau on the
parameters. With the discrete partition and a linear Gaussian model it is the exact posterior covariance of the scales.
Block-diagonal versions, as KFAC-Laplace and its kin use them, drop from the precision what lies between layers. What
that misses, in numbers that rescaling groups does not change (R the correlation matrix of Sigma, B the layers):

    missed_s    = 1 - Sigma^block_ss / Sigma_ss                              in 0..1: it is never too large
    cross_layer = sum over layer(s) != layer(t) of |R_st| / sum of |R_st|    in 0..1
    information = (sum_B log det Sigma_BB - log det Sigma) / 2               in nats: what layers know of each other

MacKay 1992; Daxberger et al. 2021; design: the section on Laplace.
"""

import json

import numpy as np
import xarray as xr

from hoanalysis import schema
from hoanalysis.analysis.arrays import Array, Tensors, error_attrs, labelled, over_checkpoints, require, tensors
from hoanalysis.analysis.errorbars import standard_error, why_none
from hoanalysis.analysis.linear import inverse_of
from hoanalysis.analysis.pruning import needs_weights
from hoanalysis.errors import ArgumentError, SchemaError, listed


def laplace(ds: xr.Dataset, prior_precision: float = 1.0, n_samples: float | None = None) -> xr.Dataset:
    """Sigma = (N D2 + tau Diag(|U^s|^2))^-1, without unit, beside its block-diagonal version.

    Parameters
    ----------
    prior_precision
        tau > 0, in 1/parameter^2.
    n_samples
        N; by default the number of samples that the summaries were computed on. Give the size of the training set where
        the summaries use a part of it, and the number of tokens where the loss is a mean over tokens: N D2 has to be
        the second derivative of the whole negative log-likelihood. Of a loss that is a sum over the data it is already,
        and N becomes ``n_samples`` over the samples that were summed.

    Returns
    -------
    Dataset
        ``covariance`` (S, S) of the scales; ``block_diagonal`` (S, S), where entries of the precision between layers
        are dropped before inverting; ``correlation`` (S, S) of ``covariance``; ``missed`` (S,), ``cross_layer`` and
        ``information`` as in the head of this module; each with ``<name>_se``, the delete-one jackknife over the kept
        blocks; and ``status``. Where N D2 + Lambda is not positive definite all are NaN and the status says so: theta
        is not a minimum, and a larger tau is a repair, not a prior. Groups whose weights are all 0 have no scale: NaN.

    Raises
    ------
    SchemaError
        The direction is not ``weights``; D2, ``direction_norm`` or N is missing.
    ArgumentError
        ``prior_precision`` or ``n_samples`` is not positive.
    """
    needs_weights(ds, "the Laplace approximation", "its prior is on the scale of each group's weights")
    require(ds, "D2")
    if "direction_norm" not in ds.coords:
        raise SchemaError("the prior needs the coordinate direction_norm", do="recompute the summaries")
    n = _samples(ds, n_samples)
    if not (np.isfinite(prior_precision) and prior_precision > 0):
        raise ArgumentError(f"prior_precision must be positive and finite, not {prior_precision!r}")
    parts = over_checkpoints(ds, lambda one: _values_and_errors(one, n, prior_precision))
    found, at, size = {}, 0, ds.sizes[schema.GROUP]
    for name, (title, units, order) in MEASURES.items():
        shape = (*parts.shape[:-2], 2, *[size] * order)
        values = parts[..., at : at + size**order].reshape(shape)
        value, error = np.moveaxis(values, -1 - order, 0)
        found[name] = labelled(ds, value, schema.group_dims(order), name, title, units)
        found[f"{name}_se"] = labelled(ds, error, schema.group_dims(order), f"{name}_se", "", units)
        found[f"{name}_se"].attrs = error_attrs(ds, title, units, why_none(ds, ["D2"]))
        at += size**order
    words = over_checkpoints(ds, lambda one: _status(one, n, prior_precision))
    found["status"] = labelled(ds, words, (), "status", "advice on the Laplace approximation", "")
    return xr.Dataset(found).assign_attrs(prior_precision=float(prior_precision), n_samples=float(n))


#: name -> title, units, number of group dims
MEASURES = {
    "covariance": ("posterior covariance of the scales", "1", 2),
    "block_diagonal": ("posterior covariance of the scales, layers independent", "1", 2),
    "correlation": ("posterior correlation of the scales", "1", 2),
    "missed": ("share of the posterior variance that independent layers miss", "1", 1),
    "cross_layer": ("share of the posterior correlations between layers", "1", 0),
    "information": ("information that the scales of layers have about each other", "nat", 0),
}


def _samples(ds: xr.Dataset, given: float | None) -> float:
    if given is None and not ds.attrs.get("n_samples"):
        raise SchemaError("the number of samples is not known", do="give n_samples=")
    n = float(ds.attrs["n_samples"] if given is None else given)
    if not n > 0:
        raise ArgumentError(f"n_samples must be positive, not {given!r}")
    summed = json.loads(ds.attrs.get("provenance") or "{}").get("reduction") == "sum"
    return n / float(ds.attrs["n_samples"]) if summed else n


def precision(one: xr.Dataset, d2: Array, n: float, tau: float) -> Array:
    """N D2 + tau Diag(|U^s|^2), shape (S, S)."""
    return n * d2 + tau * np.diag(_norm(one) ** 2)


def _norm(one: xr.Dataset) -> Array:
    return np.nan_to_num(np.asarray(one["direction_norm"].values, dtype=float))


def _values_and_errors(one: xr.Dataset, n: float, tau: float) -> Array:
    """All of `MEASURES` behind one another, shape (2, ..): values and errors."""
    layers = one["layer"].values.astype(str) if "layer" in one.coords else one[schema.GROUP].values.astype(str)
    used = _norm(one) > 0

    def estimate(t: Tensors) -> Array:
        return np.concatenate([np.ravel(x) for x in measures(precision(one, t["D2"], n, tau), used, layers)])

    return np.stack([estimate(tensors(one, ["D2"])), standard_error(one, ["D2"], estimate)])


def measures(matrix: Array, used: Array, layers: Array) -> list[Array]:
    """The values of `MEASURES` in their order, of a precision (S, S) over the ``used`` groups; NaN for the others."""
    apart = layers[:, None] != layers[None, :]
    full = covariance(matrix, used)
    block = covariance(np.where(apart, 0.0, matrix), used)
    if not np.isfinite(full).any():
        return [full, block * np.nan, full, np.diagonal(full), np.asarray(np.nan), np.asarray(np.nan)]
    sd = np.sqrt(np.diagonal(full))
    correlation = full / np.outer(sd, sd)
    missed = 1 - np.diagonal(block) / np.diagonal(full)
    share = np.nansum(np.abs(correlation)[apart]) / np.nansum(np.abs(correlation))
    parts = [
        correlation[np.ix_(part, part)] for layer in dict.fromkeys(layers) if (part := used & (layers == layer)).any()
    ]
    whole = correlation[np.ix_(used, used)]
    information = (sum(np.linalg.slogdet(part)[1] for part in parts) - np.linalg.slogdet(whole)[1]) / 2
    return [full, block, correlation, missed, np.asarray(share), np.asarray(information)]


def covariance(matrix: Array, used: Array) -> Array:
    """The inverse of a positive definite matrix over the ``used`` groups, NaN for the others, and for any other."""
    out = np.full_like(matrix, np.nan)
    inner = matrix[np.ix_(used, used)]
    if inner.size and np.isfinite(inner).all() and np.linalg.eigvalsh(_unit(inner))[0] > 0:
        size = np.sqrt(np.abs(np.diagonal(inner)))
        out[np.ix_(used, used)] = inverse_of(_unit(inner)) / np.outer(size, size)
    return out


def _unit(matrix: Array) -> Array:
    size = np.sqrt(np.abs(np.diagonal(matrix)))
    size = np.where(size > 0, size, 1.0)
    return matrix / np.outer(size, size)


def _status(one: xr.Dataset, n: float, tau: float) -> str:
    used, names = _norm(one) > 0, np.array(schema.labels(one), dtype=object)
    matrix = precision(one, tensors(one, ["D2"])["D2"], n, tau)[np.ix_(used, used)]
    if not np.isfinite(matrix).all() or not matrix.size:
        return "not computed: entries of D2 are missing at this checkpoint."
    without = f"no scale: the weights of {listed(names[~used])} are all 0." if not used.all() else ""
    lowest = np.linalg.eigvalsh(_unit(matrix))[0]
    if lowest > 0:
        return "\n".join(filter(None, ["ok: the precision N D2 + Lambda is positive definite.", without]))
    line = (
        f"not positive definite: the lowest eigenvalue of the precision with unit diagonal is {lowest:.3g}, so that "
        f"these parameters are not at a minimum along the scales of the groups and there is no Gaussian to fit. Train "
        f"further, or raise prior_precision, knowing that it is a repair then and not a prior."
    )
    return "\n".join(filter(None, [line, without]))
