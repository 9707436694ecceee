"""Which three groups act on the loss together beyond what their pairs do: the strongest entries of D3.

    A_stu = D3_stu / sqrt|H-bar_ss H-bar_tt H-bar_uu|        in loss^(-1/2)

does not change when a group is rescaled. Moved so far that the curvature of each group alone is worth E (eta_s =
sqrt(2 E / |H-bar_ss|)), the groups s, t, u change the loss by (2 E)^(3/2) A_stu through their triple: sqrt(E) |A_stu|
compares the third order with the second. A loss multiplied by a constant a has A / sqrt(a) and the same ranking; the
``share`` has no unit. Dividing by the cube roots of D3's own diagonal would leave no unit either, but that diagonal
crosses 0 and is exactly 0 for ReLU networks with squared error.
"""

from itertools import combinations, combinations_with_replacement

import numpy as np
import pandas as pd
import xarray as xr

from hoanalysis import schema
from hoanalysis.analysis.arrays import (
    Array,
    Tensors,
    checkpoints,
    labelled,
    require,
    step_labels,
    tensor,
    tensors,
    with_error,
)
from hoanalysis.analysis.errorbars import standard_error, why_none
from hoanalysis.analysis.groups import System, system

NAMES = ["D2", "D3"]


def triples(ds: xr.Dataset, top: int | None = None, *, distinct: bool = True) -> pd.DataFrame:
    """The triples of groups, the strongest scale-free interaction first at every step.

    Parameters
    ----------
    top
        How many at every step; all by default.
    distinct
        Three different groups (the default), or also entries such as D3_sst, which say how t changes the curvature
        along s.

    Returns
    -------
    DataFrame
        One row per triple (in the order of the Dataset): ``step``, ``rank``, ``group``, ``group2``, ``group3``, and the
        ``layer`` of each; ``value`` = D3_stu in loss with ``value_se``; ``scale_free`` = A_stu in loss^(-1/2) with
        ``scale_free_se``, the delete-one jackknife over the kept blocks; ``share`` = the sum of |A| over the entries
        that are equal by symmetry, relative to the sum over all; ``significance`` = |scale_free| / scale_free_se, of
        what ranks them. Triples with a group without effect or without curvature are left out.

    Raises `SchemaError` where D1, D2 or the full D3 is missing.
    """
    require(ds, "D1", *NAMES)
    parts = [_triples(one, step, top, distinct) for one, step in zip(checkpoints(ds), step_labels(ds), strict=True)]
    return pd.concat(parts, ignore_index=True)


def _triples(one: xr.Dataset, step: object, top: int | None, distinct: bool) -> pd.DataFrame:
    groups, names, t = system(one), np.array(schema.labels(one), dtype=object), tensors(one, NAMES)
    at = _entries(len(names), distinct)
    error = tensor(one, schema.error_of("D3"))[at] if schema.error_of("D3") in one else np.full(len(at[0]), np.nan)
    layers = one["layer"].values.astype(str) if "layer" in one.coords else names
    columns: dict[str, object] = {"step": step}
    columns |= {schema.group_dim(k): names[i] for k, i in enumerate(at)}
    columns |= {schema.group_dim(k).replace("group", "layer"): layers[i] for k, i in enumerate(at)}
    columns |= {"value": t["D3"][at], "value_se": error}
    columns["scale_free"] = scale_free_third(groups, t, at)
    columns["scale_free_se"] = standard_error(one, NAMES, lambda t: scale_free_third(groups, t, at))
    frame = pd.DataFrame(columns)
    total = _slice_sizes(groups, t).sum()
    frame["share"] = _multiplicity(at) * frame["scale_free"].abs() / total if total > 0 else np.nan
    frame["significance"] = frame["scale_free"].abs() / frame["scale_free_se"].where(frame["scale_free_se"] > 0)
    order = frame["scale_free"].abs().sort_values(ascending=False, kind="stable").index
    frame = frame.loc[order].dropna(subset=["scale_free"]).reset_index(drop=True)
    frame.insert(1, "rank", np.arange(1, len(frame) + 1))
    return frame if top is None else frame.head(top)


def _entries(size: int, distinct: bool) -> tuple[Array, ...]:
    """The positions of one entry for each set of groups that permutation maps onto each other, as three arrays."""
    chosen = list((combinations if distinct else combinations_with_replacement)(range(size), 3))
    return tuple(np.array(chosen, dtype=int).reshape(-1, 3).T)


def _multiplicity(at: tuple[Array, ...]) -> Array:
    """How many entries of a symmetric tensor are equal to the one at ``at``: 6, 3 or 1."""
    s, t, u = at
    return np.array([1, 3, 6])[(s != t).astype(int) + (t != u)]


def scale_free_third(groups: System, t: Tensors, at: tuple[Array, ...]) -> Array:
    """A_stu at the positions ``at``; NaN for groups without effect, and where the curvature of a group is 0."""
    size = np.sqrt(np.abs(np.diagonal(t["D2"])))
    size = np.where(groups.used & (size > 0), size, np.nan)
    return t["D3"][at] / (size[at[0]] * size[at[1]] * size[at[2]])


def third_slice(one: xr.Dataset, u: int, scale_free: bool = True) -> xr.DataArray:
    """D3[:, :, u] of one checkpoint, shape (S, S): A_stu in loss^(-1/2), or D3_stu in loss, with its error.

    It says how moving group u changes each entry of the pseudo-Hessian. ``attrs["slice"]`` is the label of u.
    """
    require(one, "D1", *NAMES)
    size = one.sizes[schema.GROUP]
    rows, columns = (i.ravel() for i in np.indices((size, size)))
    at = (rows, columns, np.full(size * size, u))
    groups = system(one)

    def entries(t: Tensors) -> Array:
        return scale_free_third(groups, t, at) if scale_free else t["D3"][at]

    known = schema.error_of("D3") in one
    stored = tensor(one, schema.error_of("D3"))[at] if known else np.full(len(rows), np.nan)
    error = standard_error(one, NAMES, entries) if scale_free else stored
    title, units = ("scale-free D3", "loss^(-1/2)") if scale_free else ("D3", "loss")
    values = entries(tensors(one, NAMES)).reshape(size, size)
    array = labelled(one, values, schema.group_dims(2), "third", title, units)
    reason = why_none(one, NAMES) if scale_free else "" if known else "because the Dataset does not hold D3_se"
    return with_error(one, array, error.reshape(size, size), reason).assign_attrs(slice=schema.labels(one)[u])


def strongest_slice(one: xr.Dataset) -> int:
    """The position of the group whose slice of the scale-free D3 has the largest sum of sizes."""
    return int(np.argmax(_slice_sizes(system(one), tensors(one, NAMES))))


def _slice_sizes(groups: System, t: Tensors) -> Array:
    """sum_st |A_stu| for each u, shape (S,), over what is known."""
    size = np.sqrt(np.abs(np.diagonal(t["D2"])))
    weight = np.divide(1.0, size, out=np.zeros_like(size), where=groups.used & (size > 0))
    return np.nan_to_num(np.abs(t["D3"])).transpose(2, 0, 1) @ weight @ weight * weight


def triple_values(ds: xr.Dataset, top: int = 6, *, distinct: bool = True) -> pd.DataFrame:
    """The triples that are strongest at any step, followed over all steps: the rows of `triples` for them."""
    frame, names = triples(ds, distinct=distinct), ["group", "group2", "group3"]
    strongest = frame.groupby(names, sort=False)["scale_free"].agg(lambda x: x.abs().max())
    kept = strongest.sort_values(ascending=False).index[:top]
    rows = frame.set_index(names).loc[kept].reset_index()
    return rows.sort_values([*names, "step"], kind="stable").reset_index(drop=True)
