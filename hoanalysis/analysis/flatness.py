"""Flatness that rescaling cannot fool: the curvature of the loss along the scales of the groups.

The direction is u = weights = -theta, so that f(eta) = L with every group s multiplied by (1 - eta_s), and

    D2_ss = theta_s . Hess_ss theta_s          in loss: the curvature for a relative change of group s
    total = sum_s D2_ss                        the trace over relative changes of single groups
    joint = sum_{s,t} D2_st                    the curvature for scaling the whole network
    largest = lambda_max(D2)                   the sharpest joint relative change, over eta of length 1

The trace or the largest eigenvalue of the Hessian itself says little: multiplying one layer of a ReLU network by alpha
and the next by 1/alpha leaves the function as it is and makes them as large as one likes (Dinh et al. 2017, Theorem 4).
Such rescalings of whole groups leave f, and with it every number here, exactly unchanged. (Relative flatness in the
sense of Petzka et al. 2021 and Tsuzuku et al. 2020, on groups.)
"""

import numpy as np
import xarray as xr

from hoanalysis import schema
from hoanalysis.analysis.arrays import Array, Tensors, error_attrs, labelled, over_checkpoints, require, tensor, tensors
from hoanalysis.analysis.errorbars import standard_error, why_none
from hoanalysis.analysis.groups import system
from hoanalysis.analysis.pruning import SCALE_INVARIANT, ZERO, needs_weights, without_scale
from hoanalysis.errors import listed

TOTALS = {
    "total": "sum of the curvatures along the scale of each group",
    "joint": "curvature along the scale of the whole network",
    "largest": "largest curvature along the scales of the groups",
}


def flatness(ds: xr.Dataset) -> xr.Dataset:
    """The curvature of the loss for relative changes of the groups, in loss; large is sharp.

    Returns
    -------
    Dataset
        ``sharpness`` (S,) = D2_ss, and ``total``, ``joint`` and ``largest`` as in the head of this module, each with
        ``<name>_se``: the stored error for ``sharpness``, the delete-one jackknife over the kept blocks for the others.
        ``status``, advice. To second order, scaling group s by 1 + e changes the loss by -e D1_s + e^2 D2_ss / 2.

    Raises
    ------
    SchemaError
        The direction is not ``weights``, or D1 or D2 is missing.
    """
    needs_weights(ds, "flatness", "along it eta_s is a relative change of group s")
    require(ds, "D1", "D2")
    diagonal = over_checkpoints(ds, lambda one: np.diagonal(tensor(one, "D2")))
    title = "curvature of the loss along the scale of the group"
    found = {"sharpness": labelled(ds, diagonal, (schema.GROUP,), "sharpness", title, "loss")}
    found["sharpness_se"] = found["sharpness"].copy(data=over_checkpoints(ds, _stored_error))
    found["sharpness_se"].attrs = error_attrs(ds, title, "loss", "" if "D2_se" in ds else "because D2_se is not held")
    parts = over_checkpoints(ds, _totals_and_errors)
    for i, (name, text) in enumerate(TOTALS.items()):
        found[name] = labelled(ds, parts[..., 0, i], (), name, text, "loss")
        found[f"{name}_se"] = labelled(ds, parts[..., 1, i], (), f"{name}_se", "", "loss")
        found[f"{name}_se"].attrs = error_attrs(ds, text, "loss", why_none(ds, ["D2"]))
    words = over_checkpoints(ds, _status)
    found["status"] = labelled(ds, words, (), "status", "advice on flatness", "")
    return xr.Dataset(found)


def _stored_error(one: xr.Dataset) -> Array:
    return np.diagonal(tensor(one, "D2_se")) if "D2_se" in one else np.full(one.sizes[schema.GROUP], np.nan)


def _totals_and_errors(one: xr.Dataset) -> Array:
    return np.stack([totals(tensors(one, ["D2"])), standard_error(one, ["D2"], totals)])


def totals(t: Tensors) -> Array:
    """``total``, ``joint`` and ``largest``, in the order of `TOTALS`; NaN where an entry of D2 is missing."""
    d2 = t["D2"]
    if not np.isfinite(d2).all():
        return np.full(len(TOTALS), np.nan)
    return np.array([np.trace(d2), d2.sum(), np.linalg.eigvalsh(d2)[-1]])


def _status(one: xr.Dataset) -> str:
    groups, names = system(one), np.array(schema.labels(one), dtype=object)
    if groups.missing.all():
        return "not computed: D1 and D2 of this checkpoint are missing."
    lines = []
    scaled, zero = without_scale(one, groups)
    if scaled:
        lines.append(f"{SCALE_INVARIANT.format(scaled)}, so that nothing here says how flat it is along them.")
    if zero:
        lines.append(f"{ZERO.format(zero)}: they have no scale.")
    slope, curve = (np.abs(tensor(one, "D1")), np.abs(np.diagonal(tensor(one, "D2"))))
    if np.nansum(slope) > np.nansum(curve):
        lines.append(
            "not at a minimum: the slopes along the scales are larger than the curvatures, so that the loss of a small "
            "relative change is decided by the slope. Read D1 first."
        )
    negative = names[groups.used & (np.diagonal(tensor(one, "D2")) < 0)]
    if len(negative):
        lines.append(f"negative curvature: the loss curves downwards along the scale of {listed(negative)}.")
    return "\n".join(lines) or "ok: the curvatures outweigh the slopes along the scales of the groups."
