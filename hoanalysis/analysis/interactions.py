"""Which groups act on the loss together: the pairs, and how much of H-bar lies between groups and between layers.

With A = M (raw) or A_st = M_st / sqrt|M_ss M_tt| (scale-free: unchanged when a group is rescaled), M = H-bar or its
inverse,

    off-diagonal share = sum_{s != t} |A_st| / sum_{s,t} |A_st|
    off-block share    = sum_{layer(s) != layer(t)} |A_st| / sum_{s,t} |A_st|

over the groups that have an effect. Both lie in 0..1. A block-diagonal method assumes that the second is 0. Noise in
the entries makes the shares larger, not smaller, because of the absolute values: read them beside their errors.
"""

import numpy as np
import pandas as pd
import xarray as xr

from hoanalysis import schema
from hoanalysis.analysis.arrays import (
    Array,
    Tensors,
    error_attrs,
    labelled,
    over_checkpoints,
    require,
    require_top,
    tensors,
)
from hoanalysis.analysis.errorbars import standard_error, why_none
from hoanalysis.analysis.groups import System, system
from hoanalysis.analysis.inverse import matrix, scale_free, scale_free_of
from hoanalysis.analysis.linear import inverse_of
from hoanalysis.errors import ArgumentError, nearest

SHARES = {
    "off_diagonal": "scale-free off-diagonal share of H-bar",
    "off_block": "scale-free off-block share of H-bar (blocks are layers)",
    "off_diagonal_raw": "off-diagonal share of H-bar",
    "off_block_raw": "off-block share of H-bar (blocks are layers)",
}
MATRICES = ("H", "inverse")


def interactions(ds: xr.Dataset, top: int | None = None) -> pd.DataFrame:
    """The pairs of groups, the strongest scale-free interaction first at every step.

    Returns
    -------
    DataFrame
        One row per pair (``group`` before ``group2`` in the order of the Dataset), the ``top`` strongest or all of
        them: ``step``, ``rank``, ``group``, ``group2``, ``layer``, ``layer2``; ``value`` = H-bar_st in loss with
        ``value_se``; ``scale_free`` = H-bar_st / sqrt|H-bar_ss H-bar_tt| with ``scale_free_se``; ``share`` = 2 |A_st| /
        sum |A| of the scale-free matrix; ``significance`` = |scale_free| / scale_free_se, of what ranks them. Pairs
        with a group without effect are left out.

    Raises `SchemaError` where D1 or D2 is missing. Source: arXiv 2312.03885, Section 4 (interactions between layers).
    """
    require_top(top)
    raw, free = matrix(ds, "H"), scale_free(ds)
    frames = [_pairs(*parts) for parts in zip(*(_by_step(a) for a in (raw, free)), strict=True)]
    frame = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
    return frame if top is None else frame[frame["rank"] <= top].reset_index(drop=True)


def _by_step(array: xr.DataArray) -> list[xr.DataArray]:
    return [array.isel(step=i) for i in range(array.sizes["step"])] if "step" in array.dims else [array]


def _pairs(raw: xr.DataArray, free: xr.DataArray) -> pd.DataFrame:
    rows, columns = np.triu_indices(raw.sizes[schema.GROUP], 1)
    names = raw[schema.GROUP].values.astype(str)
    layers = raw["layer"].values.astype(str) if "layer" in raw.coords else names
    upper = {name: np.asarray(a.values, float)[rows, columns] for name, a in _columns(raw, free).items()}
    step = raw["step"].item() if "step" in raw.coords else 0
    named = {"group": names[rows], "group2": names[columns], "layer": layers[rows], "layer2": layers[columns]}
    frame = pd.DataFrame({"step": step, **named, **upper})
    frame["share"] = 2 * frame["scale_free"].abs() / np.nansum(np.abs(free.values)) if len(frame) else 0.0
    frame["significance"] = frame["scale_free"].abs() / frame["scale_free_se"].where(frame["scale_free_se"] > 0)
    order = frame["scale_free"].abs().sort_values(ascending=False, kind="stable").index
    frame = frame.loc[order].dropna(subset=["scale_free"]).reset_index(drop=True)
    frame.insert(1, "rank", np.arange(1, len(frame) + 1))
    return frame


def _columns(raw: xr.DataArray, free: xr.DataArray) -> dict[str, xr.DataArray]:
    return {"value": raw, "value_se": raw["H_se"], "scale_free": free, "scale_free_se": free["scale_free_se"]}


def shares(ds: xr.Dataset, which: str = "H") -> xr.Dataset:
    """How much of H-bar lies off the diagonal and off the blocks of layers, each without unit, in 0..1.

    ``off_diagonal`` and ``off_block`` are those of the scale-free matrix, ``off_diagonal_raw`` and ``off_block_raw`` of
    H-bar itself; ``<name>_se`` is the delete-one jackknife over the kept blocks. ``which="inverse"`` says the same of
    H-bar^-1, where a pair is coupled beyond what it has in common with all others. Raises `SchemaError` without D1 or
    D2, `ArgumentError` for another matrix.
    """
    if which not in MATRICES:
        raise ArgumentError(f"unknown matrix {which!r}", do=nearest(str(which), MATRICES))
    require(ds, "D1", "D2")
    parts = over_checkpoints(ds, lambda one: _shares_and_errors(one, which))
    found = {}
    for i, (name, text) in enumerate(SHARES.items()):
        title = text if which == "H" else text.replace("H-bar", "the inverse of H-bar")
        found[name] = labelled(ds, parts[..., 0, i], (), name, title, "1")
        error = labelled(ds, parts[..., 1, i], (), f"{name}_se", "", "1")
        found[f"{name}_se"] = error.assign_attrs(error_attrs(ds, title, "1", why_none(ds, ["D2"])))
    return xr.Dataset(found)


def _shares_and_errors(one: xr.Dataset, which: str) -> Array:
    groups = system(one)
    layers = one["layer"].values.astype(str) if "layer" in one.coords else one[schema.GROUP].values.astype(str)
    apart = layers[:, None] != layers[None, :]

    def estimate(t: Tensors) -> Array:
        return shares_of(groups, t["D2"] if which == "H" else _inverse(groups, t["D2"]), apart)

    return np.stack([estimate(tensors(one, ["D2"])), standard_error(one, ["D2"], estimate)])


def _inverse(groups: System, d2: Array) -> Array:
    """H-bar^-1 over the used groups, NaN for the others."""
    scale = groups.scale[groups.used]
    inner = d2[np.ix_(groups.used, groups.used)] / np.outer(scale, scale)
    return groups.spread(inverse_of(inner) / np.outer(scale, scale))


def shares_of(groups: System, d2: Array, apart: Array) -> Array:
    """The four shares in the order of `SHARES`; ``apart`` (S, S) is true between different layers."""
    raw = np.where(np.outer(groups.used, groups.used), np.abs(d2), 0.0)
    free = np.where(np.outer(groups.used, groups.used), np.abs(scale_free_of(groups, d2)), 0.0)
    off = ~np.eye(len(d2), dtype=bool)
    return np.array([_part(free, off), _part(free, apart), _part(raw, off), _part(raw, apart)])


def _part(size: Array, mask: Array) -> float:
    total = np.nansum(size)
    return float(np.nansum(size[mask]) / total) if total > 0 else float("nan")


def pair_values(ds: xr.Dataset, top: int = 6) -> pd.DataFrame:
    """The pairs that are strongest at any step, followed over all steps: the rows of `interactions` for these pairs."""
    frame = interactions(ds)
    strongest = frame.groupby(["group", "group2"], sort=False)["scale_free"].agg(lambda x: x.abs().max())
    kept = strongest.sort_values(ascending=False).index[:top]
    rows = frame.set_index(["group", "group2"]).loc[kept].reset_index()
    return rows.sort_values(["group", "group2", "step"], kind="stable").reset_index(drop=True)
