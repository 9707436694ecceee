"""Units: the un-normalised sums of one (checkpoint, data shard), how they add up, and how they become a Dataset.

For every quantity x (the loss, D^(d), a diagonal) a unit holds, over its batches b with weights w_b,

    x_sum = sum w_b x_b        x_dev1 = sum w_b^2 (x_b - c)        x_dev2 = sum w_b^2 (x_b - c)^2        x_center = c

with c the value of the unit's first batch, so that the variance does not drown in rounding. Hence

    mean m = x_sum / sum w          se^2 = n/(n-1) sum w^2 (x - m)^2 / (sum w)^2

and the sums of two shards add after moving to a common center. With ``keep_batches = K`` it also holds the sums over at
most K contiguous blocks of batches. Nothing here needs torch: a store is read, and its Dataset assembled, without it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from hoanalysis import schema

Array = np.ndarray
Values = Mapping[str, Array]


class Accumulator:
    """Sums over batches of named float64 quantities, and over blocks of batches."""

    def __init__(self, keep_batches: int = 0) -> None:
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
        self._block_length = 1
        self._in_block = 0

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
        self._blocks[-1] = (w + weight, {k: s + weight * values[k] for k, s in sums.items()})
        self._in_block = (self._in_block + 1) % self._block_length

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
        data: dict[str, Any] = {
            "n_batches": ((), self.n_batches),
            "n_samples": ((), self.n_samples),
            "weight_sum": ((), self.weight),
            "weight_sq_sum": ((), self.weight_sq),
        }
        for k, total in self.sums.items():
            dims = schema.group_dims(total.ndim)
            data[f"{k}_sum"] = (dims, total)
            data[f"{k}_center"] = (dims, self.center[k])
            data[f"{k}_dev1"] = (dims, self.dev1[k])
            data[f"{k}_dev2"] = (dims, self.dev2[k])
        if self._blocks:
            data[schema.WEIGHT] = (schema.BATCH, np.array([w for w, _ in self._blocks]))
            for k in self.sums:
                stack = np.stack([sums[k] for _, sums in self._blocks])
                data[schema.blocks_of(k)] = ((schema.BATCH, *schema.group_dims(stack.ndim - 1)), stack)
        data |= {k: (schema.GROUP, np.asarray(v, dtype=np.float64)) for k, v in coords.items()}
        return xr.Dataset(data, attrs={"unit": json.dumps(dict(scalars), sort_keys=True)})


def _joined(blocks: Sequence[tuple[float, dict[str, Array]]]) -> tuple[float, dict[str, Array]]:
    weight = sum(w for w, _ in blocks)
    first, *rest = [sums for _, sums in blocks]
    return weight, {k: sum((r[k] for r in rest), v.copy()) for k, v in first.items()}


def _mean_and_error(
    total: Array, center: Array, dev1: Array, dev2: Array, totals: tuple[int, float, float], reduction: str
) -> tuple[Array, Array]:
    n, w, w_sq = totals
    mean = total / w
    shift = mean - center
    spread = dev2 - 2 * shift * dev1 + shift**2 * w_sq
    with np.errstate(invalid="ignore", divide="ignore"):
        se = np.sqrt(np.divide(n, n - 1) * np.maximum(spread, 0)) / w if n > 1 else np.full_like(mean, np.nan)
    scale = w if reduction == "sum" else 1.0
    return mean * scale, se * scale


# ---- adding shards ----------------------------------------------------------------------------------------------


def quantities(unit: xr.Dataset) -> list[str]:
    """The quantities that a unit holds sums of."""
    return [str(k)[: -len("_dev2")] for k in unit.data_vars if str(k).endswith("_dev2")]


def add_shards(shards: Sequence[xr.Dataset]) -> xr.Dataset:
    """The unit of the union of the shards' batches. The order of the shards fixes the last bits: pass them sorted."""
    first, *rest = shards
    if not rest:
        return first
    out = first.copy(deep=True)
    for shard in rest:
        for k in quantities(first):
            shift = out[f"{k}_center"] - shard[f"{k}_center"]
            w_sq = shard["weight_sq_sum"]
            out[f"{k}_dev2"] = out[f"{k}_dev2"] + shard[f"{k}_dev2"] - 2 * shift * shard[f"{k}_dev1"] + shift**2 * w_sq
            out[f"{k}_dev1"] = out[f"{k}_dev1"] + shard[f"{k}_dev1"] - shift * w_sq
            out[f"{k}_sum"] = out[f"{k}_sum"] + shard[f"{k}_sum"]
        for name in ("n_batches", "n_samples", "weight_sum", "weight_sq_sum"):
            out[name] = out[name] + shard[name]
    kept = [str(v) for v in first.data_vars if schema.BATCH in first[v].dims]
    stacked = {v: xr.concat([s[v] for s in shards], schema.BATCH) for v in kept}
    return out.drop_vars(kept).assign(stacked) if kept else out


# ---- units -> Dataset -------------------------------------------------------------------------------------------


def summary(unit: xr.Dataset, reduction: str = "mean") -> xr.Dataset:
    """Means and standard errors of one checkpoint, without labels. Blocks are passed on as they are."""
    totals = (int(unit["n_batches"]), float(unit["weight_sum"]), float(unit["weight_sq_sum"]))
    data: dict[str, Any] = {}
    for k in quantities(unit):
        dims = unit[f"{k}_sum"].dims
        total, center, dev1, dev2 = (unit[f"{k}_{p}"].values for p in ("sum", "center", "dev1", "dev2"))
        mean, se = _mean_and_error(total, center, dev1, dev2, totals, reduction)
        data[k], data[schema.error_of(k)] = (dims, mean), (dims, se)
        if schema.blocks_of(k) in unit:
            data[schema.blocks_of(k)] = unit[schema.blocks_of(k)].variable
    if schema.WEIGHT in unit:
        # A sum over the data is the mean times 1: dividing by weights of total 1 keeps the blocks' rule for both.
        w = unit[schema.WEIGHT]
        data[schema.WEIGHT] = (w / w.sum() if reduction == "sum" else w).variable
    return xr.Dataset(data)


def assemble(plan: Mapping[str, Any], read: Callable[[Mapping[str, Any]], xr.Dataset | None]) -> xr.Dataset:
    """The Dataset that a plan asks for, from the units that exist; NaN where one is missing.

    Parameters
    ----------
    plan
        ``groups`` (labels and coordinates), ``quantities`` (name -> order of its tensor), ``steps`` (label, sha256,
        the keys of its shards), ``series`` (whether ``step`` is a dim), ``reduction`` and ``attrs``.
    read
        Key -> unit, or None where it is not there.
    """
    facts: list[dict[str, Any]] = []
    steps = [_one_step(plan, step, read, facts) for step in plan["steps"]]
    ds = _stacked(steps) if plan["series"] else steps[0]
    if plan["series"]:
        ds = ds.assign_coords({schema.STEP: [s["step"] for s in plan["steps"]]})
    labels = list(plan["groups"]["label"])
    for dim in sorted(str(d) for d in ds.dims):
        if dim.startswith(schema.GROUP):
            ds = ds.assign_coords({dim: np.array(labels, dtype=object)})
    for name in schema.GROUP_COORDS:
        values = plan["groups"][name]
        dtype = np.int64 if name == "numel" else object
        ds = ds.assign_coords({name: (schema.GROUP, np.array(values, dtype=dtype))})
    ds.attrs = {
        **plan["attrs"],
        "created_at": max((f.get("created_at", "") for f in facts), default=""),
        "suspect": sum(bool(f.get("suspect")) for f in facts),
        "n_samples": int(np.max(ds["n_samples"].values)),
        "coverage": float(ds["units_read"].sum()) / max(sum(len(step["units"]) for step in plan["steps"]), 1),
    }
    return _described(ds.drop_vars(["n_samples", "units_read"]))


def _one_step(
    plan: Mapping[str, Any],
    step: Mapping[str, Any],
    read: Callable[[Mapping[str, Any]], xr.Dataset | None],
    all_facts: list[dict[str, Any]],
) -> xr.Dataset:
    """One checkpoint; what its units say of themselves is added to ``all_facts``."""
    shards = [unit for unit in map(read, step["units"]) if unit is not None]
    own = [json.loads(unit.attrs["unit"]) for unit in shards]
    all_facts += own
    s = len(plan["groups"]["label"])
    if not shards:
        ds = xr.Dataset(
            {
                name: (schema.group_dims(order), np.full((s,) * order, np.nan))
                for k, order in plan["quantities"].items()
                for name in (k, schema.error_of(k))
            }
        )
        facts, n_batches, n_samples = {}, 0, 0
        coords = {k: np.full(s, np.nan) for k in schema.GROUP_COORDS_BY_STEP}
    else:
        unit = add_shards(shards)
        ds = summary(unit, plan["reduction"])
        facts = own[0]
        n_batches, n_samples = int(unit["n_batches"]), int(unit["n_samples"])
        coords = {k: unit[k].values for k in schema.GROUP_COORDS_BY_STEP}
    ds["n_samples"], ds["units_read"] = ((), n_samples), ((), len(shards))
    checks = [f.get("self_check", np.nan) for f in own]
    return ds.assign_coords(
        sha256=((), step.get("sha256", "")),
        engine=((), facts.get("engine", "")),
        engine_detail=((), facts.get("engine_detail", "")),
        self_check=((), np.nanmax(checks) if np.isfinite(checks).any() else np.nan),
        n_batches=((), n_batches),
    ).assign_coords({k: (schema.GROUP, v) for k, v in coords.items()})


def _stacked(steps: Sequence[xr.Dataset]) -> xr.Dataset:
    """Steps in one Dataset. A step with fewer blocks (none, or a shorter pass) gets blocks of weight 0."""
    blocks = max((s.sizes.get(schema.BATCH, 0) for s in steps), default=0)
    if blocks:
        steps = [_padded(s, blocks, steps) for s in steps]
    return xr.concat(
        [_on_step(s) for s in steps], schema.STEP, data_vars="all", coords="minimal", compat="equals", join="exact"
    )


def _padded(step: xr.Dataset, blocks: int, steps: Sequence[xr.Dataset]) -> xr.Dataset:
    full = next(s for s in steps if s.sizes.get(schema.BATCH, 0) == blocks)
    if schema.BATCH not in step.dims:
        kept = {v: xr.zeros_like(full[v]) for v in full.data_vars if schema.BATCH in full[v].dims}
        return step.assign({k: v.reset_coords(drop=True) for k, v in kept.items()})
    return step.pad({schema.BATCH: (0, blocks - step.sizes[schema.BATCH])}, constant_values=0)


def _on_step(ds: xr.Dataset) -> xr.Dataset:
    """One step of a series: ``step`` on every variable, and on what differs by checkpoint among the coordinates."""
    names = [*schema.STEP_COORDS, "engine_detail", *schema.GROUP_COORDS_BY_STEP]
    coords = {k: ds[k].reset_coords(drop=True).expand_dims(schema.STEP, axis=0) for k in names}
    return ds.drop_vars(names).expand_dims(schema.STEP, axis=0).assign_coords(coords)


def _described(ds: xr.Dataset) -> xr.Dataset:
    """``long_name`` and ``units`` on everything. Derivatives with respect to eta have the unit of the loss."""
    for name in [*ds.data_vars, *ds.coords]:
        attrs = ds[name].attrs
        attrs["long_name"], attrs["units"] = _described_name(str(name)), _unit(str(name))
    return ds


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
    if name.startswith("loss") or (name.startswith("D") and name[1:2].isdigit()):
        return "loss"
    return "1"
