"""What of two Datasets is compared with what: their checkpoints by step, their groups by label."""

import json
from typing import Any

import numpy as np
import xarray as xr

from hoanalysis import schema
from hoanalysis.analysis.arrays import require, step_labels
from hoanalysis.errors import ArgumentError, listed

Indices = tuple[list[str], list[int], list[int]]
Pair = tuple[xr.Dataset, xr.Dataset]


def comparable(ds: xr.Dataset, other: xr.Dataset) -> None:
    """Raise `ArgumentError` or `SchemaError` unless both hold summaries along the same direction."""
    if not isinstance(other, xr.Dataset):
        raise ArgumentError(
            f"compare needs another Dataset of summaries, not {type(other).__name__}",
            do="open it with ho.open_dataset(path)",
        )
    for one in (ds, other):
        schema.validate(one)
        require(one, schema.LOSS)
    mine, theirs = (str(d.attrs.get("direction", "unknown")) for d in (ds, other))
    if mine != theirs:
        raise ArgumentError(
            f"these summaries are along different directions: {mine!r} and {theirs!r}",
            why="their entries are derivatives along other vectors, so that their differences mean nothing",
            do="summarize both along one direction, or choose that study of the store by its name",
        )


def common_groups(ds: xr.Dataset, other: xr.Dataset) -> Indices:
    """The labels that both have, and where they stand in each."""
    mine, theirs = schema.labels(ds), schema.labels(other)
    place = {label: i for i, label in enumerate(theirs)}
    found = [(label, i, place[label]) for i, label in enumerate(mine) if label in place]
    if not found:
        partitions = [str(d.attrs.get("partition", "unknown")) for d in (ds, other)]
        raise ArgumentError(
            f"no group has the same label in both: {listed(mine, 3)} against {listed(theirs, 3)}",
            why=f"their partitions are {partitions[0]!r} and {partitions[1]!r}",
            do="merge the finer one with ds.ho.merge('layer') or ds.ho.merge({new: [old, ..]})",
        )
    labels, i, j = zip(*found, strict=True)
    return list(labels), list(i), list(j)


def pairs_of(ds: xr.Dataset, other: xr.Dataset, step: Any) -> tuple[list[Pair], tuple[str, ...]]:
    """The checkpoints to compare, and the leading dims of the result."""
    if step is None and schema.STEP in ds.dims and schema.STEP in other.dims:
        mine, theirs = step_labels(ds), step_labels(other)
        both = [s for s in mine if s in theirs]
        if not both:
            raise ArgumentError(
                f"the two runs have no step in common: {listed(mine, 3)} against {listed(theirs, 3)}",
                do="give step=(step of a, step of b), or step='last'",
            )
        at = [(ds.isel(step=mine.index(s)), other.isel(step=theirs.index(s))) for s in both]
        return at, (schema.STEP,)
    a, b = step if isinstance(step, tuple) and len(step) == 2 else (step, step)
    if schema.STEP not in ds.dims and schema.STEP not in other.dims and not {a, b} <= {None, "first", "last"}:
        for which, one, at in (("a", ds, a), ("b", other, b)):
            if schema.STEP not in one.coords or one[schema.STEP].item() != at:
                raise ArgumentError(f"{which} is a single checkpoint, and not at step {at!r}", do="leave out step=")
    return [(_checkpoint(ds, a, "a"), _checkpoint(other, b, "b"))], ()


def _checkpoint(ds: xr.Dataset, step: Any, which: str) -> xr.Dataset:
    if schema.STEP not in ds.dims:
        return ds
    labels = step_labels(ds)
    if step is None and len(labels) == 1:
        return ds.isel({schema.STEP: 0})
    if step is None:
        raise ArgumentError(
            f"{which} holds {len(labels)} checkpoints and the other one",
            do=f"give step=, one of {listed(labels)}, 'first' or 'last'",
        )
    if step in ("first", "last"):
        done = [i for i, loss in enumerate(ds[schema.LOSS].values) if np.isfinite(loss)] or [0]
        return ds.isel({schema.STEP: done[0 if step == "first" else -1]})
    if step not in labels:
        raise ArgumentError(f"{which} has no checkpoint at step {step!r}", do=f"use one of {listed(labels)}")
    return ds.isel({schema.STEP: labels.index(step)})


def provenance(ds: xr.Dataset) -> dict[str, Any]:
    """What the summaries were computed from, as recorded; empty where nothing is."""
    try:
        found = json.loads(ds.attrs.get("provenance") or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def same_data(ds: xr.Dataset, other: xr.Dataset) -> bool:
    """Whether both record the same fingerprint of their data."""
    mine, theirs = (provenance(one).get("data") for one in (ds, other))
    return mine is not None and mine == theirs
