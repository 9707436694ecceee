"""The curvature that the groups can see: the Hessian compressed to the span of their directions.

    B_st = D2[s,t] / (|U^s| |U^t|) = e_s . Hess e_t,   e_s = U^s / |U^s|   (orthonormal: the groups are disjoint)

By Cauchy interlacing its eigenvalues lie within [lambda_min(Hess), lambda_max(Hess)], with equality for the discrete
partition. Raw eigenvalues of H-bar carry the scale of u instead (design: arXiv 2312.03885, Section 3.1).
"""

import numpy as np
import xarray as xr

from hoanalysis.analysis.arrays import Array, labelled, over_checkpoints, require, tensors, with_error
from hoanalysis.analysis.errorbars import standard_error, why_none
from hoanalysis.analysis.groups import system
from hoanalysis.errors import SchemaError


def spectrum(ds: xr.Dataset) -> xr.DataArray:
    """The eigenvalues of D2[s,t] / (|U^s| |U^t|), descending along ``eigenvalue`` = 0..S-1, in loss per squared
    parameter.

    Groups with a zero direction add nothing to the span, and those without effect (`groups.null_groups`, where D1 is
    held) add eigenvalues that are rounding noise; as many NaN stand at the end. The coordinate ``spectrum_se`` is the
    delete-one jackknife over the kept blocks, eigenvalues matched by rank.

    Raises `SchemaError` where D2 or the coordinate ``direction_norm`` is missing.
    """
    require(ds, "D2")
    if "direction_norm" not in ds.coords:
        raise SchemaError("the spectrum needs the coordinate direction_norm", do="recompute the summaries")
    parts = over_checkpoints(ds, _values_and_errors)
    index = xr.Variable("eigenvalue", np.arange(parts.shape[-1]), {"long_name": "rank of the eigenvalue", "units": ""})
    title = "eigenvalue of the Hessian compressed to the directions"
    units = "loss/parameter^2"
    array = labelled(ds, parts[..., 0, :], ("eigenvalue",), "spectrum", title, units, eigenvalue=index)
    return with_error(ds, array, parts[..., 1, :], why_none(ds, ["D2"]))


def _values_and_errors(one: xr.Dataset) -> Array:
    norm = lengths(one)
    value = eigenvalues(tensors(one, ["D2"])["D2"], norm)
    return np.stack([value, standard_error(one, ["D2"], lambda t: eigenvalues(t["D2"], norm))])


def lengths(one: xr.Dataset) -> Array:
    """|U^s|, shape (S,), 0 for the groups that have no effect."""
    norm = np.nan_to_num(np.asarray(one["direction_norm"].values, dtype=float))
    return np.where(system(one).null, 0.0, norm) if "D1" in one else norm


def eigenvalues(d2: Array, norm: Array) -> Array:
    """Eigenvalues of the compression, descending, NaN for groups of norm 0 and for a matrix with NaN."""
    use = norm > 0
    compressed = d2[np.ix_(use, use)] / np.outer(norm[use], norm[use])
    out = np.full(len(norm), np.nan)
    if np.isfinite(compressed).all():
        out[: use.sum()] = np.linalg.eigvalsh((compressed + compressed.T) / 2)[::-1]
    return out
