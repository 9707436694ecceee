"""Two checkpoints, or two runs, side by side: groups matched by label, differences with their significance.

    difference = x(b) - x(a),      se^2 = se_a^2 + se_b^2                                    independent data
                                   se^2 = n/(n-1) sum_k ((W - w_k)/W)^2 (d_(-k) - d)^2       the same n blocks of data

with d = x(b) - x(a), and d_(-k) without block k on both sides: what the two have in common through their data cancels,
as in a paired test. What the data do through the direction u does not cancel: where u is the gradient of the same data,
each side has its own, and errors that hold u fixed are too small, paired or not. D1, D2, .. then also carry the size of
each checkpoint's own gradient; the scale-free H-bar, the learning rates and the shares of interactions do not.
"""

import json
from collections.abc import Callable, Sequence
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from scipy.special import ndtr, stdtr

from hoanalysis import schema
from hoanalysis.analysis.arrays import (
    Array,
    Blocks,
    Tensors,
    error_attrs,
    kept_blocks,
    step_labels,
    tensor,
    tensors,
)
from hoanalysis.analysis.errorbars import jackknife, moves_with_the_data, standard_error
from hoanalysis.analysis.matching import Indices, Pair, common_groups, comparable, pairs_of, provenance, same_data
from hoanalysis.analysis.quantities import Quantity, quantities
from hoanalysis.errors import ArgumentError, listed

CLEAR = 2.0  # standard errors from 0 at which a difference is told from 0
PAIRED, INDEPENDENT = "paired by block", "independent"


def compare(ds: xr.Dataset, other: xr.Dataset, step: Any = None, *, paired: bool | None = None) -> xr.Dataset:
    """What changes from ``ds`` (a) to ``other`` (b).

    Parameters
    ----------
    step
        Where either is a series: None compares the steps that both have, ``"first"``, ``"last"`` or a step that
        checkpoint of each, and a pair ``(step of a, step of b)`` two different ones.
    paired
        Whether both were summarized on the same blocks of the same data. By default they are taken to be where their
        data fingerprints and the weights of their kept blocks agree.

    Returns
    -------
    Dataset
        For every quantity q that both hold (``loss``, ``D1``, ``D2``, .., and from these ``scale_free``,
        ``learning_rates``, ``off_diagonal``, ``off_block``): ``q`` = b - a over the groups that both have, in a's
        order; ``q_se``; ``q_a`` and ``q_b``; ``q_significance`` = |q| / q_se, NaN where nothing spreads. ``status``,
        advice. attrs ``unmatched_a``, ``unmatched_b``: JSON lists of the groups of one of them only. What is computed
        from H-bar is computed from all groups of each; only then are the common ones taken.

    Raises
    ------
    ArgumentError
        They are along different directions, have no group or no step in common, or ``step`` is in neither.
    """
    comparable(ds, other)
    pairs, lead = pairs_of(ds, other, step)
    common = common_groups(ds, other)
    orders = sorted({*schema.orders(ds)} & {*schema.orders(other)})
    together = same_data(ds, other) if paired is None else paired
    found: dict[str, Any] = {}
    ways: set[str] = set()
    for q in quantities([n for n in map(str, ds.data_vars) if n in other.data_vars], orders):
        parts = [_one(q, a, b, common, together) for a, b in pairs]
        ways |= {way for _, way in parts}
        found |= _variables(ds, q, np.stack([values for values, _ in parts]), lead)
        found[f"{q.name}_se"][2]["errors"] = "; ".join(dict.fromkeys(way for _, way in parts))
    if paired and PAIRED not in ways:
        raise ArgumentError(
            "these summaries cannot be paired: they do not keep the same blocks of batches",
            do="summarize both on the same data with the same keep_batches, or leave out paired=",
        )
    result = xr.Dataset(found, coords=_coordinates(ds, common[0], pairs, lead))
    result = result.assign_attrs(_attrs(ds, other, ways))
    result.attrs["pieces"] = min(_pieces(one) for pair in pairs for one in pair)
    words = [_status(result.isel({schema.STEP: i}) if lead else result, ds, other) for i in range(len(pairs))]
    result["status"] = xr.Variable(lead, words if lead else words[0], {"long_name": "advice", "units": ""})
    return result


def _one(q: Quantity, a: xr.Dataset, b: xr.Dataset, common: Indices, paired: bool) -> tuple[Array, str]:
    """b - a, its error, a and b, shape (4, ..) over the common groups, and how the error was found."""
    of_a, of_b = (_taken(q.estimate(one), q.order, at) for one, at in zip((a, b), common[1:], strict=True))
    value_a, value_b = of_a(tensors(a, q.needs)), of_b(tensors(b, q.needs))
    error, way = None, PAIRED
    if paired:
        error = _paired_error(q, a, b, of_a, of_b)
    if error is None:
        error, way = np.hypot(*(_error(q, one, of) for one, of in ((a, of_a), (b, of_b)))), INDEPENDENT
    return np.stack([value_b - value_a, error, value_a, value_b]), way


def _taken(estimate: Callable[[Tensors], Array], order: int, at: list[int]) -> Callable[[Tensors], Array]:
    return lambda t: np.asarray(estimate(t))[np.ix_(*[at] * order)] if order else np.asarray(estimate(t))


def _error(q: Quantity, one: xr.Dataset, estimate: Callable[[Tensors], Array]) -> Array:
    """Its own standard error: the stored one of a stored quantity, the jackknife of a derived one."""
    se = schema.error_of(q.name)
    if q.stored:
        return estimate({q.name: tensor(one, se)}) if se in one else np.nan * estimate(tensors(one, q.needs))
    return standard_error(one, q.needs, estimate)


def _paired_error(
    q: Quantity, a: xr.Dataset, b: xr.Dataset, of_a: Callable[[Tensors], Array], of_b: Callable[[Tensors], Array]
) -> Array | None:
    """The jackknife of the difference over the blocks of both; None unless they are the same blocks."""
    left, right = kept_blocks(a, q.needs), kept_blocks(b, q.needs)
    if left is None or right is None or not np.array_equal(left.weight, right.weight):
        return None
    sums = {f"a {n}": left.sums[n] for n in q.needs} | {f"b {n}": right.sums[n] for n in q.needs}

    def difference(t: Tensors) -> Array:
        return of_b({n: t[f"b {n}"] for n in q.needs}) - of_a({n: t[f"a {n}"] for n in q.needs})

    return jackknife(difference, Blocks(sums, left.weight))


def _variables(ds: xr.Dataset, q: Quantity, parts: Array, lead: tuple[str, ...]) -> dict[str, Any]:
    """``parts`` has shape (checkpoints, 4, S, ..)."""
    difference, error, a, b = np.moveaxis(parts if lead else parts[0], 1 if lead else 0, 0)
    rounding = 8 * np.finfo(float).eps * np.maximum(np.abs(a), np.abs(b))
    known = np.isfinite(error) & (error > rounding)
    significance = np.divide(np.abs(difference), error, out=np.full_like(error, np.nan), where=known)
    dims = (*lead, *schema.group_dims(q.order))
    title = f"difference of the {q.title}"
    return {
        q.name: (dims, difference, {"long_name": title, "units": q.units}),
        f"{q.name}_se": (dims, error, error_attrs(ds, title, q.units)),
        f"{q.name}_a": (dims, a, {"long_name": f"{q.title} of a", "units": q.units}),
        f"{q.name}_b": (dims, b, {"long_name": f"{q.title} of b", "units": q.units}),
        f"{q.name}_significance": (dims, significance, {"long_name": f"|{title}| / standard error", "units": "1"}),
    }


def _coordinates(ds: xr.Dataset, labels: list[str], pairs: list[Pair], lead: tuple[str, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {schema.group_dim(d): labels for d in range(max([1, *schema.orders(ds)]))}
    for name in ("layer", "kind"):
        if name in ds.coords:
            values = dict(zip(schema.labels(ds), ds[name].values.astype(str), strict=True))
            found[name] = (schema.GROUP, [values[label] for label in labels])
    if lead:
        found[schema.STEP] = [a[schema.STEP].item() for a, _ in pairs]
    else:
        for name, one in zip("ab", pairs[0], strict=True):
            if schema.STEP in one.coords:
                found[f"step_{name}"] = one[schema.STEP].item()
    return found


def _attrs(ds: xr.Dataset, other: xr.Dataset, ways: set[str]) -> dict[str, str]:
    mine, theirs = schema.labels(ds), schema.labels(other)
    return {
        "direction": str(ds.attrs.get("direction", "")),
        "errors": " and ".join(sorted(ways)),
        "unmatched_a": json.dumps([g for g in mine if g not in set(theirs)]),
        "unmatched_b": json.dumps([g for g in theirs if g not in set(mine)]),
    }


def _status(result: xr.Dataset, ds: xr.Dataset, other: xr.Dataset) -> str:
    lines = [_unmatched(result, "a"), _unmatched(result, "b"), _steps(result, ds, other), _sizes(ds, other)]
    lines.append(_random(ds, other))
    fixed = any(moves_with_the_data(one) for one in (ds, other))
    if fixed:
        lines.append(
            "errors too small: u is the gradient of the data, and the errors leave out what the data do through it, "
            "which pairing does not cancel, so that far more entries differ by chance than their significance says. "
            "Summarize with errors='unconditional'."
        )
    if INDEPENDENT in result.attrs["errors"] and same_data(ds, other):
        lines.append(
            "not paired: both are of the same data, but not all of their blocks were kept alike, so that errors are "
            "added in squares as if the data were independent, which is usually too large. Summarize both with the "
            "same keep_batches."
        )
    counts = [_count(result, q, chance=not fixed) for q in map(str, result.data_vars) if f"{q}_significance" in result]
    return "\n".join(filter(None, [*lines, *counts]))


def _unmatched(result: xr.Dataset, name: str) -> str:
    labels = json.loads(result.attrs[f"unmatched_{name}"])
    return f"unmatched groups: only {name} has {listed(labels)}." if labels else ""


def _steps(result: xr.Dataset, ds: xr.Dataset, other: xr.Dataset) -> str:
    if schema.STEP not in result.coords:
        return ""
    mine, theirs = step_labels(ds), step_labels(other)
    alone = {"a": [s for s in mine if s not in theirs], "b": [s for s in theirs if s not in mine]}
    told = [f"only {name} has {listed(steps, 5)}" for name, steps in alone.items() if steps]
    return f"unmatched steps: {'; '.join(told)}." if told else ""


def _sizes(ds: xr.Dataset, other: xr.Dataset) -> str:
    if "numel" not in ds.coords or "numel" not in other.coords:
        return ""
    mine, theirs = (dict(zip(schema.labels(d), d["numel"].values.tolist(), strict=True)) for d in (ds, other))
    changed = [label for label, n in mine.items() if label in theirs and theirs[label] != n]
    return f"other sizes: {listed(changed)} have another number of parameters in b." if changed else ""


def _random(ds: xr.Dataset, other: xr.Dataset) -> str:
    seeds = [provenance(one).get("seed") for one in (ds, other)]
    if ds.attrs.get("direction") != "random" or seeds[0] == seeds[1]:
        return ""
    return f"other directions: a is along the random direction of seed {seeds[0]}, b along that of seed {seeds[1]}."


def _count(result: xr.Dataset, name: str, chance: bool) -> str:
    """How many entries differ, and how many would by ``chance`` where the errors are whole, so that it can be told."""
    x = np.asarray(result[f"{name}_significance"].values, dtype=float)
    values = np.array([x[i] for i in _entries(x)])
    known = values[np.isfinite(values)]
    if not len(known):
        return f"{name}: no standard errors to judge its difference by."
    if len(known) == 1:
        doubt = "" if known[0] >= CLEAR else ", not told from 0"
        return f"{name}: differs by {known[0]:.1f} standard errors{doubt}."
    count = f"{name}: {(known >= CLEAR).sum()} of {len(known)} entries differ by {CLEAR:g} standard errors or more"
    return f"{count}; about {_chance(result) * len(known):.1f} would by chance." if chance else f"{count}."


def _pieces(one: xr.Dataset) -> int:
    """How many blocks of batches, or else batches, an error comes from; 0 where that is not told."""
    if schema.WEIGHT in one:
        return int((np.nan_to_num(one[schema.WEIGHT].values) > 0).sum())
    return int(np.nan_to_num(float(one["n_batches"].item()))) if "n_batches" in one.coords else 0


def _chance(result: xr.Dataset) -> float:
    """The share of Student's distribution, or of the normal one where the pieces are not told, beyond `CLEAR`."""
    pieces = int(result.attrs["pieces"])
    return float(2 * (stdtr(pieces - 1, -CLEAR) if pieces > 1 else ndtr(-CLEAR)))


def _entries(x: Array) -> Sequence[tuple[int, ...]]:
    """One index of each set that permutation maps onto each other."""
    return list(combinations_with_replacement(range(x.shape[0] if x.ndim else 1), x.ndim))


def differences(comparison: xr.Dataset, top: int | None = None) -> pd.DataFrame:
    """The entries of what `compare` returned as rows, the most significant first; the ``top`` first, or all.

    Columns: ``quantity``, ``step`` (of a series), ``group``, ``group2``, .. (empty where the quantity has fewer),
    ``a``, ``b``, ``difference``, ``se``, ``significance``. One row for entries that differ by the order of their
    groups.
    """
    lead = schema.STEP in comparison.dims
    rows = []
    for i in range(comparison.sizes[schema.STEP] if lead else 1):
        one = comparison.isel({schema.STEP: i}) if lead else comparison
        step = {"step": one[schema.STEP].item()} if lead else {}
        for name in map(str, one.data_vars):
            if f"{name}_significance" in one:
                rows += _rows(one, name, step)
    frame = pd.DataFrame(rows)
    groups = [c for c in frame.columns if str(c).startswith(schema.GROUP)]
    frame = frame[["quantity", *(["step"] if lead else []), *groups, "a", "b", "difference", "se", "significance"]]
    frame[groups] = frame[groups].fillna("")
    frame = frame.sort_values("significance", ascending=False, kind="stable", ignore_index=True)
    return frame if top is None else frame.head(top)


def _rows(one: xr.Dataset, name: str, step: dict[str, Any]) -> list[dict[str, Any]]:
    columns = {"a": f"{name}_a", "b": f"{name}_b", "difference": name, "se": f"{name}_se"}
    columns["significance"] = f"{name}_significance"
    values = {column: np.asarray(one[variable].values, dtype=float) for column, variable in columns.items()}
    labels = schema.labels(one)
    return [
        {"quantity": name}
        | step
        | {schema.group_dim(k): labels[s] for k, s in enumerate(at)}
        | {column: float(x[at]) for column, x in values.items()}
        for at in _entries(values["a"])
    ]
