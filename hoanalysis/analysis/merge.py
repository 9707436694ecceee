"""Coarser partitions from stored summaries: merging groups is summing slices, at every order, exactly.

    D'^(d)[A1..Ad] = sum over s1 in A1, .., sd in Ad of D^(d)[s1..sd]

(design: arXiv 2312.03885, Section 3.1; u is unchanged, so U^A = sum of U^s over s in A.) The errors of the merged
entries need the covariances of the old ones, so they are recomputed from the kept blocks of batches and dropped without
them. A stored diagonal cannot be merged: the off-diagonal entries that belong to the sum are not there.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile

import numpy as np
import xarray as xr

from hoanalysis import schema
from hoanalysis.analysis.arrays import require
from hoanalysis.analysis.errorbars import error_over_blocks
from hoanalysis.errors import ArgumentError, listed, nearest

Groups = dict[str, list[int]]
By = str | int | Mapping[str, Sequence[str]]


def merge(ds: xr.Dataset, by: By) -> xr.Dataset:
    """The summaries of the coarser partition ``by``, without another pass over the data.

    Parameters
    ----------
    by
        ``"layer"`` or ``"kind"`` (any coordinate on ``group``): one group per value. An integer n: n runs of
        consecutive groups, as equal in number as can be. A mapping ``{new: [old, ..]}``: groups that it does not name
        stay as they are. Merged groups stand where their first member stood.

    Returns
    -------
    Dataset
        D1, D2, .., the slopes along the path, and their blocks summed; standard errors sqrt(n/(n-1) sum w^2 (x_b -
        x)^2 / (sum w)^2) from the block means x_b where blocks are kept, dropped otherwise; stored diagonals and the
        measured ``change_removed`` dropped wherever groups were really merged. ``direction_norm`` is the root of the
        sum of squares, ``numel`` the sum.

    Raises
    ------
    ArgumentError
        ``by`` names an unknown group, a group twice, or a new label that an untouched group already has.
    SchemaError
        The groups along ``group2``, .. are not those along ``group``: one was selected without the others.
    """
    require(ds, *[str(name) for name, array in ds.data_vars.items() if _dims(array)])
    groups = groups_of(ds, by)
    if all(len(members) == 1 for members in groups.values()):
        return _relabelled(ds, groups)
    names = {name: _dims(array) for name, array in ds.data_vars.items()}
    kept = {name: array for name, array in ds.data_vars.items() if not names[name]}
    for name, dims in names.items():
        if re.fullmatch(rf"(D[1-9]\d*|{schema.SLOPE_PATH})(_batch)?", str(name)) and dims:
            kept[name] = _summed(ds[name], list(groups.values()))
    merged = xr.Dataset(kept).drop_vars([c for c in ds.coords if _dims(ds[c])], errors="ignore")
    merged = merged.assign_coords({c: v for c, v in ds.coords.items() if not _dims(v)})
    merged = merged.assign_coords(_coordinates(ds, groups)).assign_attrs(ds.attrs)
    label = by if isinstance(by, str) else f"{len(groups)} groups"
    merged.attrs["partition"] = f"{ds.attrs.get('partition', 'partition')} merged by {label}"
    return _with_errors(merged, ds)


def _dims(array: xr.DataArray) -> list[str]:
    return [str(d) for d in array.dims if str(d).startswith(schema.GROUP)]


def groups_of(ds: xr.Dataset, by: By) -> Groups:
    """The positions of the old groups in each new one, in the order of the first of them."""
    if isinstance(by, Mapping):
        return _by_names(schema.labels(ds), by)
    if isinstance(by, bool) or not isinstance(by, int | np.integer | str):
        raise ArgumentError(f"cannot merge by {by!r}", do="give 'layer', 'kind', a number or {new: [old, ..]}")
    if isinstance(by, str):
        return _by_coordinate(ds, by)
    return _runs(schema.labels(ds), int(by))


def _by_names(labels: list[str], by: Mapping[str, Sequence[str]]) -> Groups:
    owner: dict[str, str] = {}
    for new, members in by.items():
        if isinstance(members, str) or not list(members):
            raise ArgumentError(f"the merged group {new!r} needs a list of old groups, not {members!r}")
        for old in members:
            if old not in labels:
                raise ArgumentError(
                    f"no group is called {old!r}", where=f"merge, {new!r}", do=nearest(str(old), labels)
                )
            if old in owner:
                raise ArgumentError(f"the group {old!r} is named twice", where=f"merge, {owner[old]!r} and {new!r}")
            owner[old] = str(new)
    clash = [label for label in labels if label not in owner and label in by]
    if clash:
        raise ArgumentError(f"the new names {listed(clash)} belong to groups that are not merged", do="use other names")
    return _collect([owner.get(label, label) for label in labels])


def _by_coordinate(ds: xr.Dataset, by: str) -> Groups:
    fitting = [str(c) for c in ds.coords if ds[c].dims == (schema.GROUP,) and c != schema.GROUP]
    if by not in fitting:
        raise ArgumentError(f"groups cannot be merged by {by!r}", do=f"{nearest(by, fitting)}, a number, or a mapping")
    return _collect([str(value) or "(model)" for value in ds[by].values])


def _runs(labels: list[str], n: int) -> Groups:
    if not 1 <= n <= len(labels):
        raise ArgumentError(f"cannot merge {len(labels)} groups into {n}", do=f"give a number from 1 to {len(labels)}")
    runs = [list(map(int, run)) for run in np.array_split(np.arange(len(labels)), n)]
    return {labels[r[0]] if len(r) == 1 else f"{labels[r[0]]} .. {labels[r[-1]]}": r for r in runs}


def _collect(new: list[str]) -> Groups:
    groups: Groups = {}
    for index, name in enumerate(new):
        groups.setdefault(name, []).append(index)
    return groups


def _summed(array: xr.DataArray, members: list[list[int]]) -> xr.DataArray:
    """Sum slices along every group dim; slices and not a matrix product, so that NaN stays in its own group."""
    values = array.values
    for axis, dim in enumerate(array.dims):
        if str(dim).startswith(schema.GROUP):
            values = np.stack([values.take(m, axis).sum(axis) for m in members], axis)
    return xr.DataArray(values, dims=array.dims, attrs=array.attrs)


def _with_errors(merged: xr.Dataset, ds: xr.Dataset) -> xr.Dataset:
    summed = [schema.derivative(d) for d in schema.orders(merged)]
    for name in summed + [schema.SLOPE_PATH] * (schema.SLOPE_PATH in merged):
        if schema.blocks_of(name) in merged and schema.WEIGHT in merged:
            attrs = ds[schema.error_of(name)].attrs if schema.error_of(name) in ds else {"units": "loss"}
            merged[schema.error_of(name)] = error_over_blocks(
                merged[schema.blocks_of(name)], merged[schema.WEIGHT]
            ).assign_attrs(attrs)
    return merged


def _relabelled(ds: xr.Dataset, groups: Groups) -> xr.Dataset:
    """Every group has one member: nothing is summed and nothing is lost."""
    dims = [d for d in ds.dims if str(d).startswith(schema.GROUP)]
    return ds.assign_coords({d: (d, list(groups), ds[d].attrs if d in ds.coords else {}) for d in dims})


def _coordinates(ds: xr.Dataset, groups: Groups) -> dict:
    dims = [d for d in ds.dims if str(d).startswith(schema.GROUP)]
    coords: dict = {d: (d, list(groups)) for d in dims}
    for name in (*schema.GROUP_COORDS, *schema.GROUP_COORDS_BY_STEP):
        if name in ds.coords:
            coords[name] = _merged_coordinate(ds[name], name, list(groups.values()))
    return coords


def _merged_coordinate(old: xr.DataArray, name: str, members: list[list[int]]) -> xr.Variable:
    axis = old.dims.index(schema.GROUP)
    parts = [old.values.take(m, axis) for m in members]
    if name in schema.GROUP_COORDS_BY_STEP:
        values = [np.sqrt(np.square(part.astype(float)).sum(axis)) for part in parts]
    elif name == "numel":
        values = [part.sum(axis) for part in parts]
    else:
        values = [_text(name, [str(v) for v in part]) for part in parts]
    return xr.Variable(old.dims, np.stack([np.asarray(v) for v in values], axis), old.attrs)


def _text(name: str, values: list[str]) -> str:
    if name == "aliases":
        return ", ".join(v for v in values if v)
    if len(values) == 1 or (name != "shape" and len(set(values)) == 1):
        return values[0]
    if name == "layer":
        return ".".join(_common_start([v.split(".") for v in values]))
    return "" if name == "shape" else "other"


def _common_start(paths: list[list[str]]) -> list[str]:
    """The module that holds them all, as its path."""
    return [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))]
