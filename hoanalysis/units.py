"""Units: the un-normalised sums of one (checkpoint, data shard), how they add up, and how they become a Dataset.

For every quantity x (the loss, D^(d), a diagonal) a unit holds, over its batches b with weights w_b,

    x_sum = sum w_b x_b        x_dev1 = sum w_b^2 (x_b - c)        x_dev2 = sum w_b^2 (x_b - c)^2        x_center = c

with c the value of the unit's first batch, so that the variance does not drown in rounding. Hence

    mean m = x_sum / sum w          se^2 = n/(n-1) sum w^2 (x - m)^2 / (sum w)^2

and the sums of two shards add after moving to a common center. With ``keep_batches = K`` it also holds the sums over at
most K contiguous blocks of batches, and where errors are to be unconditional ``x_influence``, what the blocks add to
these through the direction (`hoanalysis.derivatives.influence`): the standard error is then that of the sum of the two
over the blocks. Nothing here needs torch: a store is read, and its Dataset assembled, without it.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from xarray.indexes import PandasIndex

from hoanalysis import schema
from hoanalysis.errors import HoError

Array = np.ndarray
Values = Mapping[str, Array]


class Accumulator:
    """Sums over batches of named float64 quantities, and over blocks of batches."""

    def __init__(self, keep_batches: int = 0, block_length: int = 1) -> None:
        self.keep_batches = keep_batches - keep_batches % 2  # neighbours join in pairs
        self.n_batches = 0
        self.n_samples = 0
        self.weight = 0.0
        self.weight_sq = 0.0
        self.sums: dict[str, Array] = {}
        self.center: dict[str, Array] = {}
        self.dev1: dict[str, Array] = {}
        self.dev2: dict[str, Array] = {}
        self._blocks: list[tuple[float, dict[str, Array]]] = []
        self._block_length = block_length
        self._in_block = 0
        #: Un-normalised sums over the blocks that are added to theirs, for errors that are unconditional.
        self.influence: dict[str, Array] = {}

    def add(self, values: Values, weight: float, rows: int) -> None:
        """Add the means of one batch, taken over ``weight`` terms of ``rows`` samples."""
        if not self.n_batches:
            self.center = {k: np.array(v, dtype=np.float64) for k, v in values.items()}
            zeros = {k: np.zeros_like(v) for k, v in self.center.items()}
            self.sums, self.dev1, self.dev2 = ({k: z.copy() for k, z in zeros.items()} for _ in range(3))
        self.n_batches += 1
        self.n_samples += rows
        self.weight += weight
        self.weight_sq += weight**2
        for k, v in values.items():
            with np.errstate(invalid="ignore", over="ignore"):  # a measured loss may be infinite
                away = v - self.center[k]
                self.sums[k] += weight * v
                self.dev1[k] += weight**2 * away
                self.dev2[k] += weight**2 * away**2
        if self.keep_batches:
            self._add_to_block(values, weight)

    def _add_to_block(self, values: Values, weight: float) -> None:
        """Blocks are as long as is needed for at most K of them; when there would be more, neighbours join."""
        if self._in_block == 0 and len(self._blocks) == self.keep_batches:
            self._blocks = [_joined(self._blocks[i : i + 2]) for i in range(0, len(self._blocks), 2)]
            self._block_length *= 2
        if self._in_block == 0:
            self._blocks.append((0.0, {k: np.zeros_like(v, dtype=np.float64) for k, v in values.items()}))
        w, sums = self._blocks[-1]
        with np.errstate(invalid="ignore"):
            self._blocks[-1] = (w + weight, {k: s + weight * values[k] for k, s in sums.items()})
        self._in_block = (self._in_block + 1) % self._block_length

    def block_weights(self) -> Array:
        """The weights of the kept blocks."""
        return np.array([w for w, _ in self._blocks])

    def block_of(self, index: int) -> int:
        """The kept block that the batch of this 0-based index is in."""
        return index // self._block_length

    def relative_error(self, name: str, share: float = 0.1) -> float:
        """The largest relative standard error among the entries of at least ``share`` of the largest entry."""
        if self.n_batches < 2:
            return np.inf
        mean, se = self.mean_and_error(name)
        size = np.abs(mean)
        matters = size >= share * size.max()
        return float(np.max(se[matters] / size[matters])) if size.max() > 0 else 0.0

    def mean_and_error(self, name: str, reduction: str = "mean") -> tuple[Array, Array]:
        """The weighted mean of a quantity (times the total weight for a sum) and its standard error."""
        totals = (self.n_batches, self.weight, self.weight_sq)
        return _mean_and_error(self.sums[name], self.center[name], self.dev1[name], self.dev2[name], totals, reduction)

    def unit(self, coords: Values, scalars: Mapping[str, Any]) -> xr.Dataset:
        """The unit Dataset. ``coords`` are per-group numbers of this checkpoint, ``scalars`` its JSON-able facts."""
        return self.parts(coords, scalars).dataset()

    def parts(self, coords: Values, scalars: Mapping[str, Any]) -> Parts:
        """What the unit Dataset is made of."""
        data: dict[str, Any] = {
            "n_batches": ((), self.n_batches),
            "n_samples": ((), self.n_samples),
            "weight_sum": ((), self.weight),
            "weight_sq_sum": ((), self.weight_sq),
        }
        for k, total in self.sums.items():
            dims = schema.dims_of(k, total.ndim)
            data[f"{k}_sum"] = (dims, total)
            data[f"{k}_center"] = (dims, self.center[k])
            data[f"{k}_dev1"] = (dims, self.dev1[k])
            data[f"{k}_dev2"] = (dims, self.dev2[k])
        if self._blocks:
            data[schema.WEIGHT] = (schema.BATCH, self.block_weights())
            for k, values in self.influence.items():
                dims = (schema.BATCH, *schema.group_dims(values.ndim - 1))
                data[schema.influence_of(k)] = (dims, np.asarray(values, dtype=np.float64))
            for k in self.sums:
                stack = np.stack([sums[k] for _, sums in self._blocks])
                data[schema.blocks_of(k)] = ((schema.BATCH, *schema.dims_of(k, stack.ndim - 1)), stack)
        data |= {k: (schema.GROUP, np.asarray(v, dtype=np.float64)) for k, v in coords.items()}
        variables = {k: xr.Variable(dims, values) for k, (dims, values) in data.items()}
        return Parts(variables, {"unit": json.dumps(dict(scalars), sort_keys=True)})


@dataclass(frozen=True)
class Parts:
    """A unit that is not a Dataset yet: making one takes as long as a few layers of a small network."""

    variables: dict[str, xr.Variable]
    attrs: dict[str, str]

    def dataset(self) -> xr.Dataset:
        return xr.Dataset(self.variables, attrs=self.attrs)


Unit = xr.Dataset | Parts


def _joined(blocks: Sequence[tuple[float, dict[str, Array]]]) -> tuple[float, dict[str, Array]]:
    weight = sum(w for w, _ in blocks)
    first, *rest = [sums for _, sums in blocks]
    with np.errstate(invalid="ignore"):
        return weight, {k: sum((r[k] for r in rest), v.copy()) for k, v in first.items()}


def _mean_and_error(
    total: Array, center: Array, dev1: Array, dev2: Array, totals: tuple[int, float, float], reduction: str
) -> tuple[Array, Array]:
    n, w, w_sq = totals
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        mean = total / w
        shift = mean - center
        spread = dev2 - 2 * shift * dev1 + shift**2 * w_sq
        se = np.sqrt(np.divide(n, n - 1) * np.maximum(spread, 0)) / w if n > 1 else np.full_like(mean, np.nan)
    scale = w if reduction == "sum" else 1.0
    return mean * scale, se * scale


def _error_over_blocks(sums: Array, weights: Array) -> Array:
    """sqrt( n/(n-1) sum_k (sums_k - w_k mean)^2 ) / sum w over the n blocks."""
    n, w = len(weights), weights.reshape(-1, *[1] * (sums.ndim - 1))
    if n < 2:
        return np.full(sums.shape[1:], np.nan)
    away = sums - w * sums.sum(0) / weights.sum()
    return np.sqrt(n / (n - 1) * np.square(away).sum(0)) / weights.sum()


# ---- adding shards ----------------------------------------------------------------------------------------------


def quantities(unit: Unit) -> list[str]:
    """The quantities that a unit holds sums of."""
    return [str(k)[: -len("_dev2")] for k in unit.variables if str(k).endswith("_dev2")]


def add_shards(shards: Sequence[Unit]) -> Unit:
    """The unit of the union of the shards' batches. The order of the shards fixes the last bits: pass them sorted."""
    if len(shards) == 1:
        return shards[0]
    datasets = [s.dataset() if isinstance(s, Parts) else s for s in shards]
    first, *rest = datasets
    out = first.copy(deep=True)
    for shard in rest:
        w_sq = shard["weight_sq_sum"]
        for k in quantities(first):
            with np.errstate(invalid="ignore", over="ignore"):
                shift = out[f"{k}_center"] - shard[f"{k}_center"]
                moved = shard[f"{k}_dev2"] - 2 * shift * shard[f"{k}_dev1"] + shift**2 * w_sq
                out[f"{k}_dev2"] = out[f"{k}_dev2"] + moved
                out[f"{k}_dev1"] = out[f"{k}_dev1"] + shard[f"{k}_dev1"] - shift * w_sq
                out[f"{k}_sum"] = out[f"{k}_sum"] + shard[f"{k}_sum"]
        for name in ("n_batches", "n_samples", "weight_sum", "weight_sq_sum"):
            out[name] = out[name] + shard[name]
    kept = [str(v) for v in first.data_vars if schema.BATCH in first[v].dims]
    stacked = {v: xr.concat([s[v] for s in datasets], schema.BATCH) for v in kept}
    return out.drop_vars(kept).assign(stacked) if kept else out


# ---- checkpoints without a unit ----------------------------------------------------------------------------------


def gap_of_error(error: HoError) -> xr.Dataset:
    """The gap that an error tells of. Without the path: a store that is moved keeps its bytes."""
    return gap({"what": error.what, "why": error.why, "do": error.do})


def gap(reason: Mapping[str, str]) -> xr.Dataset:
    """A unit in the place of one that cannot exist; ``reason`` holds the parts of a `HoError`."""
    return xr.Dataset(attrs={"unit": json.dumps({"gap": dict(reason)}, sort_keys=True)})


def gap_of(unit: Unit | None) -> dict[str, str] | None:
    """The reason why there is no such unit; None of a unit that holds sums, or that is not there at all."""
    return None if unit is None else json.loads(unit.attrs["unit"]).get("gap")


# ---- units -> Dataset -------------------------------------------------------------------------------------------


Row = dict[str, tuple[tuple[Any, ...], Array]]  # name -> (dims, values)


def summary(unit: Unit, reduction: str = "mean") -> Row:
    """Name -> (dims, values): means, standard errors and blocks of one checkpoint, without labels."""
    v = {str(k): variable for k, variable in unit.variables.items()}
    totals = (int(v["n_batches"]), float(v["weight_sum"]), float(v["weight_sq_sum"]))
    row: Row = {}
    for k in quantities(unit):
        dims = v[f"{k}_sum"].dims
        total, center, dev1, dev2 = (v[f"{k}_{p}"].values for p in ("sum", "center", "dev1", "dev2"))
        mean, se = _mean_and_error(total, center, dev1, dev2, totals, reduction)
        row[k], row[schema.error_of(k)] = (dims, mean), (dims, se)
        if (blocks := schema.blocks_of(k)) in v:
            kept = v[blocks].values
            if (added := schema.influence_of(k)) in v:
                kept = kept + v[added].values
                scale = totals[1] if reduction == "sum" else 1.0
                row[schema.error_of(k)] = (dims, scale * _error_over_blocks(kept, v[schema.WEIGHT].values))
            row[blocks] = (v[blocks].dims, kept)
    if schema.WEIGHT in v:
        # A sum over the data is the mean times 1: dividing by weights of total 1 keeps the blocks' rule for both.
        w = v[schema.WEIGHT].values
        row[schema.WEIGHT] = ((schema.BATCH,), w / w.sum() if reduction == "sum" else w)
    return row


def assemble(plan: Mapping[str, Any], read: Callable[[Mapping[str, Any]], Unit | None]) -> xr.Dataset:
    """The Dataset that a plan asks for, from the units that exist; NaN where one is missing.

    Where one cannot exist (the last checkpoint has no next one) the coordinate ``gap`` says why; such a step has
    coverage 0, and does not count in that of the Dataset.

    Parameters
    ----------
    plan
        ``groups`` (labels and coordinates), ``quantities`` (name -> order of its tensor), ``taus`` and ``nodes`` where
        the loss and its slopes are measured along the direction, ``steps`` (label, sha256, the keys of its shards,
        ``gap`` where there are none), ``series`` (whether ``step`` is a dim), ``reduction`` and ``attrs``.
    read
        Key -> unit, or None where it is not there.
    """
    facts: list[list[dict[str, Any]]] = []
    rows = [_row(plan, step, read, facts) for step in plan["steps"]]
    row = _with_losses(_stacked(rows) if plan["series"] else rows[0])
    samples, read_units = row.pop("n_samples")[1], row.pop("units_read")[1]
    wanted = sum(len(step["units"]) for step in plan["steps"]) - sum("gap" in f for of_step in facts for f in of_step)
    coords = _group_coords(plan["groups"], {d for dims, _ in row.values() for d in dims if d.startswith(schema.GROUP)})
    if plan.get("taus"):
        coords[schema.TAU] = ((schema.TAU,), np.array(plan["taus"], dtype=np.float64))
    if plan.get("nodes"):
        coords[schema.NODE] = ((schema.NODE,), np.array(plan["nodes"], dtype=np.float64))
    if plan["series"]:
        coords[schema.STEP] = ((schema.STEP,), np.array([s["step"] for s in plan["steps"]]))
    told = [*schema.STEP_COORDS, "engine_detail", "coverage", *schema.GROUP_COORDS_BY_STEP]
    optional = {k: row.pop(k) for k in ("direction_detail", "stopping", "gap")}
    coords |= {k: row.pop(k) for k in told} | {k: v for k, v in optional.items() if np.any(v[1] != "")}
    attrs = {
        **plan["attrs"],
        # Of this Dataset, not of the units: a unit that is computed again must be bit-identical to the first.
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "units": wanted,
        "suspect": sum(any(f.get("suspect") for f in of_step) for of_step in facts),
        "n_samples": int(np.max(samples)),
        "coverage": float(np.sum(read_units)) / max(wanted, 1),
    }
    conditional = not str(attrs.get("standard_errors", "")).startswith("unconditional")
    return xr.Dataset(_described(row, conditional), _labelled(_described(coords, conditional)), attrs)


def _row(
    plan: Mapping[str, Any],
    step: Mapping[str, Any],
    read: Callable[[Mapping[str, Any]], Unit | None],
    all_facts: list[list[dict[str, Any]]],
) -> Row:
    """One checkpoint; what its units say of themselves is added to ``all_facts``."""
    there = [unit for unit in map(read, step["units"]) if unit is not None]
    all_facts.append([json.loads(unit.attrs["unit"]) for unit in there])
    reasons = [step["gap"]] if "gap" in step else [r["what"] for r in map(gap_of, there) if r is not None]
    shards = [unit for unit in there if gap_of(unit) is None]
    own = [json.loads(unit.attrs["unit"]) for unit in shards]
    s = len(plan["groups"]["label"])
    sizes = {schema.TAU: len(plan.get("taus", ())), schema.NODE: len(plan.get("nodes", ()))}
    row: Row = {}
    if shards and len(shards) == len(step["units"]):  # sums over a part of the data are not those of the step
        unit = add_shards(shards)
        row |= summary(unit, plan["reduction"])
        row |= {k: ((schema.GROUP,), unit.variables[k].values) for k in schema.GROUP_COORDS_BY_STEP}
        n_batches, n_samples = int(unit.variables["n_batches"]), int(unit.variables["n_samples"])
    else:
        for k, order in plan["quantities"].items():
            dims = schema.dims_of(k, order)
            row |= dict.fromkeys((k, schema.error_of(k)), (dims, np.full([sizes.get(d, s) for d in dims], np.nan)))
        row |= dict.fromkeys(schema.GROUP_COORDS_BY_STEP, ((schema.GROUP,), np.full(s, np.nan)))
        n_batches = n_samples = 0
    checks, ran = [f.get("self_check", np.nan) for f in own], [f.get("engine", "") for f in own]
    scalars = {
        "sha256": step.get("sha256", ""),
        "engine": "nested" if "nested" in ran else next(iter(ran), ""),
        "engine_detail": "; ".join(dict.fromkeys(n for f in own for n in f.get("engine_detail", "").split("; ") if n)),
        "direction_detail": _told(own[0].get("direction", {})) if own else "",
        "stopping": own[0].get("stopping", "") if own else "",
        "gap": reasons[0] if reasons else "",
        "self_check": np.nanmax(checks) if np.isfinite(checks).any() else np.nan,
        "n_batches": n_batches,
        "n_samples": n_samples,
        "units_read": len(shards),
        "coverage": len(shards) / len(step["units"]) if step["units"] else 0.0,
    }
    return row | {k: ((), np.asarray(v)) for k, v in scalars.items()}


def _told(facts: Mapping[str, Any]) -> str:
    """``betas: [0.9, 0.999]; eps: 1e-08``"""
    return "; ".join(f"{k}: {v}" for k, v in facts.items())


def _stacked(rows: Sequence[Row]) -> Row:
    """The rows with a leading ``step``. A step with fewer blocks (none, or a shorter pass) gets blocks of weight 0."""
    blocks = max((len(r[schema.WEIGHT][1]) for r in rows if schema.WEIGHT in r), default=0)
    full = next((r for r in rows if blocks and schema.WEIGHT in r and len(r[schema.WEIGHT][1]) == blocks), rows[0])
    out: Row = {}
    for name, (dims, values) in full.items():
        zeros = (dims, np.zeros((0, *values.shape[1:]))) if schema.BATCH in dims else None
        parts = [r.get(name, zeros)[1] for r in rows]  # type: ignore[index]
        if zeros is not None:
            parts = [np.concatenate([p, np.zeros((blocks - len(p), *p.shape[1:]))]) for p in parts]
        out[name] = ((schema.STEP, *dims), np.stack(parts))
    return out


def _with_losses(row: Row) -> Row:
    """The losses themselves beside the changes of the loss that were measured."""
    out = dict(row)
    for change, (dims, loss) in schema.MEASURED.items():
        if change in row:
            here = row[schema.LOSS][1]
            out[loss] = (row[change][0], here.reshape(*here.shape, *[1] * len(dims)) + row[change][1])
    return out


def _group_coords(groups: Mapping[str, Sequence[Any]], dims: set[str]) -> Row:
    labels = np.array(list(groups["label"]), dtype=np.str_)  # not objects, which xarray takes a millisecond to look at
    coords: Row = {dim: ((dim,), labels) for dim in sorted(dims | {schema.GROUP})}
    for name in schema.GROUP_COORDS:
        dtype = np.int64 if name == "numel" else np.str_
        coords[name] = ((schema.GROUP,), np.array(list(groups[name]), dtype=dtype))
    return coords


def _labelled(coords: dict[str, xr.Variable]) -> xr.Coordinates:
    """The coordinates with an index for each dim, kept: making one anew takes as long as a layer of a small network."""
    indexes: dict[str, PandasIndex] = {}
    for name, values in coords.items():
        if values.dims == (name,):
            indexes[name] = _index(name, tuple(values.values.tolist()), values.dtype)
            coords = coords | indexes[name].create_variables({name: values})
    return xr.Coordinates(coords, indexes=indexes)


@functools.lru_cache(maxsize=64)
def _index(name: str, labels: tuple, dtype: np.dtype) -> PandasIndex:
    return PandasIndex(np.array(labels, dtype=dtype), name)


def _described(row: Row, conditional: bool) -> dict[str, xr.Variable]:
    """With ``long_name`` and ``units``. Derivatives with respect to eta have the unit of the loss."""
    out = {}
    for k, (dims, values) in row.items():
        attrs = {"long_name": _described_name(k), "units": _unit(k)}
        if k.endswith("_se") and ((conditional and k.startswith("D")) or k.startswith(("change_", "slope_"))):
            attrs["conditional_on"] = "the direction u"
        out[k] = xr.Variable(dims, values, attrs)
    return out


def _described_name(name: str) -> str:
    base = name
    for suffix, text in (("_se", "standard error of "), ("_batch", "sum over a block of batches of weight times ")):
        if name.endswith(suffix):
            return text + _described_name(name[: -len(suffix)])
    if base in schema.LONG_NAMES:
        return schema.LONG_NAMES[base]
    if base.startswith("D") and base[1:2].isdigit():
        order, _, diag = base[1:].partition("_")
        return f"{'diagonal of the ' if diag else ''}order-{order} derivative in the direction, by group"
    if base.startswith(schema.GROUP):
        return "parameter group"
    return "training step" if base == schema.STEP else base.replace("_", " ")


def _unit(name: str) -> str:
    if name.startswith(("loss", "change_", "slope_")) or (name.startswith("D") and name[1:2].isdigit()):
        return "loss"
    return "1"
