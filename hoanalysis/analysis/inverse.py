"""The inverse of H-bar, the scale-free H-bar, and their blocks by kind of parameter."""

from typing import Literal

import numpy as np
import xarray as xr

from hoanalysis import schema
from hoanalysis.analysis.arrays import Array, Tensors, labelled, over_checkpoints, require, tensors, with_error
from hoanalysis.analysis.errorbars import standard_error, why_none
from hoanalysis.analysis.groups import System, system
from hoanalysis.analysis.linear import inverse_of
from hoanalysis.analysis.regularized import Regularization, Solver, check, needed
from hoanalysis.errors import ArgumentError, nearest

Which = Literal["H", "inverse", "scale_free"]
MATRIX = schema.group_dims(2)
_INITIALS = {kind: kind[0].upper() for kind in schema.KINDS}


def inverse(ds: xr.Dataset, regularization: Regularization = None, epsilon: float = 1.0) -> xr.DataArray:
    """H-bar_reg^-1, shape (S, S), in 1/loss, over the groups that have an effect; NaN for the others.

    Its WW, BB and WB blocks are blocks of this inverse, not inverses of blocks. For ``"cubic"`` it is the matrix that
    the cubic step multiplies g-bar by. The coordinate ``inverse_se`` is the delete-one jackknife over the kept blocks.

    Raises `SchemaError` and `ArgumentError` as `learning_rates` does, with the same ``regularization`` and ``epsilon``.
    Source: arXiv 2312.03885, Section 4 (H-bar and its inverse).
    """
    check(regularization, epsilon)
    names = needed(ds, regularization)

    def both(one: xr.Dataset) -> Array:
        solver = Solver.of(one, regularization, epsilon)

        def estimate(t: Tensors) -> Array:
            scale = solver.groups.scale[solver.groups.used]
            return solver.groups.spread(inverse_of(solver.equilibrated(t).matrix) / np.outer(scale, scale))

        return np.stack([estimate(tensors(one, names)), standard_error(one, names, estimate)])

    return _matrix(ds, over_checkpoints(ds, both), "inverse", "inverse of H-bar", "1/loss", why_none(ds, names))


def scale_free(ds: xr.Dataset) -> xr.DataArray:
    """A_st / sqrt|A_ss A_tt| of A = H-bar, shape (S, S), without unit: it does not change when a group is rescaled.

    NaN for groups without effect. The coordinate ``scale_free_se`` is the delete-one jackknife over the kept blocks.
    """
    require(ds, "D1", "D2")

    def both(one: xr.Dataset) -> Array:
        groups = system(one)
        value = scale_free_of(groups, tensors(one, ["D2"])["D2"])
        return np.stack([value, standard_error(one, ["D2"], lambda t: scale_free_of(groups, t["D2"]))])

    return _matrix(ds, over_checkpoints(ds, both), "scale_free", "scale-free H-bar", "1", why_none(ds, ["D2"]))


def scale_free_of(groups: System, d2: Array) -> Array:
    """A_st / sqrt|A_ss A_tt|, shape (S, S); NaN for groups without effect, and where the diagonal is 0."""
    size = np.sqrt(np.abs(np.diagonal(d2)))
    scale = np.where(groups.used & (size > 0), size, np.nan)
    return d2 / np.outer(scale, scale)


def matrix(
    ds: xr.Dataset, which: Which = "H", regularization: Regularization = None, epsilon: float = 1.0
) -> xr.DataArray:
    """One of the matrices over pairs of groups: ``"H"`` (D2), ``"inverse"`` or ``"scale_free"``, with its error."""
    if which == "inverse":
        return inverse(ds, regularization, epsilon)
    if which == "scale_free":
        return scale_free(ds)
    if which != "H":
        raise ArgumentError(f"unknown matrix {which!r}", do=nearest(str(which), ["H", "inverse", "scale_free"]))
    require(ds, "D2")
    values = over_checkpoints(ds, lambda one: tensors(one, ["D2"])["D2"])
    known = "D2_se" in ds
    errors = over_checkpoints(ds, lambda one: tensors(one, ["D2_se"])["D2_se"]) if known else values * np.nan
    reason = "" if known else "because the Dataset does not hold D2_se"
    return _matrix(ds, np.stack([values, errors], -3), "H", "pseudo-Hessian H-bar", "loss", reason)


def _matrix(ds: xr.Dataset, parts: Array, name: str, long_name: str, units: str, reason: str) -> xr.DataArray:
    array = labelled(ds, parts[..., 0, :, :], MATRIX, name, long_name, units)
    return with_error(ds, array, parts[..., 1, :, :], reason)


def blocks(
    ds: xr.Dataset, which: Which = "H", regularization: Regularization = None, epsilon: float = 1.0
) -> dict[str, xr.DataArray]:
    """The blocks of a matrix by kind of parameter: ``"WW"``, ``"BB"``, ``"WB"``, then one per further pair of kinds.

    The letters are W weight, B bias, N norm, E embedding, O other; the bias of a norm layer is of kind norm. Block "WB"
    has the weights along ``group`` and the biases along ``group2``; "BW" is its transpose and is not repeated. Kinds
    that no group has give no block. ``which`` is ``"H"``, ``"inverse"`` (blocks of the inverse) or ``"scale_free"``.
    """
    full = matrix(ds, which, regularization, epsilon)
    if "kind" not in full.coords:
        return {"all": full}
    kinds = [str(k) if str(k) in schema.KINDS else "other" for k in full["kind"].values]
    rows = {k: [i for i, kind in enumerate(kinds) if kind == k] for k in schema.KINDS if k in kinds}
    pairs = [(a, b) for i, a in enumerate(rows) for b in list(rows)[i:]]
    pairs.sort(key=lambda pair: (not set(pair) <= {"weight", "bias"}, pair[0] != pair[1]))
    return {
        _INITIALS[a] + _INITIALS[b]: full.isel(group=rows[a], group2=rows[b]).assign_attrs(block=f"{a} x {b}")
        for a, b in pairs
    }
