"""Before a study is paid for: its seconds, peak memory and disk, and the cheapest change that fits a budget.

    seconds = once + sum over settings and missing checkpoints of  fixed + unit + batches * (derivatives + measured)
    derivatives of another partition or order = those of the pilot * predicted operations / those of the pilot

The operations are counted on the captured graph (`hoanalysis.derivatives.tangents.costs`). What one costs here is not a
constant of the machine: small batches, masks and norms are far from a matrix product's speed. So one batch is timed for
each partition and order of the study, where that should take at most `PATIENCE`; what would take longer is scaled from
two coarser partitions on the same graph (`CALIBRATION`). Once: reading the study and its data, capture, and what first
calls load. A unit of the study's shape is written and read, in a folder that is removed, to know its seconds and bytes.
Standard errors over n batches scale as 1/sqrt(n).
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from hoanalysis import schema, units
from hoanalysis.derivatives import engines, heap, nested
from hoanalysis.derivatives.chunks import chunks
from hoanalysis.derivatives.common import Request
from hoanalysis.derivatives.measured import forward_passes, measured
from hoanalysis.derivatives.tangents import TangentsUnsupported
from hoanalysis.errors import ArgumentError, HoError
from hoanalysis.partitions import Partition
from hoanalysis.problem import Problem, count_rows, full_precision
from hoanalysis.shards import block_length
from hoanalysis.store import Store, export, is_store
from hoanalysis.study import StudySpec
from hoanalysis.summaries import Settings, Work

PATIENCE = 20.0  # seconds that timing the batch of one setting may take
CALIBRATION = (2, 8)  # groups of the settings that a slower one is scaled from
PIECES = 8  # of the pilot batch, for its standard errors
ORDERS = {"D1": Request(1), "D2": Request(2), "D2, diagonal of D3": Request(2, 3), "D3": Request(3)}
COARSER = ("layer", "kind", "trivial")


@dataclass(frozen=True)
class Line:
    """One direction and partition of a study: what its missing checkpoints cost.

    Attributes
    ----------
    passes
        Sweeps through the network for a batch, in units of one gradient.
    seconds, bytes, disk
        Of all missing checkpoints; peak resident memory of the process; of the unit files.
    errors
        Name of a derivative -> the relative standard error of its entries that matter, expected from the pilot.
    """

    direction: str
    partition: str
    groups: int
    order: int
    diagonal: int | None
    engine: str
    checkpoints: int
    done: int
    batches: int
    passes: float
    seconds: float
    bytes: float
    disk: float
    timed: bool
    errors: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Change:
    """A change of the study and what it would then cost."""

    what: str
    loses: str
    seconds: float
    bytes: float
    fits: bool


@dataclass(frozen=True)
class Estimate:
    """What a study costs. ``frame()`` is a table of its settings, ``by_order()`` one of orders and engines."""

    lines: tuple[Line, ...]
    beside: float  # seconds: what is done once (the study and its data read, capture, first calls) and curvature
    orders: pd.DataFrame
    changes: tuple[Change, ...] = ()

    @property
    def seconds(self) -> float:
        """Seconds of the whole study."""
        return self.beside + sum(line.seconds for line in self.lines)

    @property
    def bytes(self) -> float:
        """Peak resident memory of the process."""
        return max(line.bytes for line in self.lines)

    @property
    def disk(self) -> float:
        """Bytes of the unit files that are to be written."""
        return sum(line.disk for line in self.lines)

    def frame(self) -> pd.DataFrame:
        """One row for each direction and partition."""
        return pd.DataFrame([{k: v for k, v in vars(line).items() if k != "errors"} for line in self.lines])

    def __str__(self) -> str:
        out = []
        for line in self.lines:
            what = f"D{line.order}" + (f" and the diagonal of D{line.diagonal}" if line.diagonal else "")
            out.append(
                f"{line.direction}, {line.partition} (S = {line.groups}), {what}, {line.engine}: "
                f"{line.checkpoints - line.done} of {line.checkpoints} checkpoints to compute, {line.batches} batches "
                f"each of {line.passes:.3g} gradients: {told_seconds(line.seconds)}, {told_bytes(line.bytes)}, "
                f"{told_bytes(line.disk)} on disk" + ("" if line.timed else " (scaled, not timed)")
            )
        out += ["", "one batch, by order and engine:", self.orders.to_string(index=False), ""]
        if self.lines[0].errors:
            known = ", ".join(f"{k} to {100 * v:.2g} %" for k, v in self.lines[0].errors.items())
            out.append(f"standard errors expected of the entries that matter, from the pilot batch: {known}")
        out.append(
            f"in all: {told_seconds(self.seconds)}, peak memory {told_bytes(self.bytes)}, "
            f"{told_bytes(self.disk)} on disk"
        )
        for change in self.changes:
            out.append(
                f"- {change.what}: {told_seconds(change.seconds)}, {told_bytes(change.bytes)}; {change.loses}"
                + ("" if change.fits else " (does not fit alone)")
            )
        return "\n".join(out)


@full_precision()
def estimate(
    study: StudySpec | str | Path | Problem,
    *,
    store: str | Path | None = None,
    time: str | float | None = None,
    memory: str | int | None = None,
    **options: Any,
) -> Estimate:
    """Seconds, peak memory, disk and passes of a study, after timing one batch of each of its settings.

    Parameters
    ----------
    study
        A study file, its folder, or a `Problem`; with a problem ``options`` are those of `hoanalysis.summarize`, and
        one checkpoint, the model's own weights, is meant.
    store
        Where units may be already: what is there is not counted.
    time, memory
        A budget, as ``"10min"`` and ``"4GiB"``: ``changes`` then are what would fit, the cheapest first. Memory is
        the resident size of the whole process.

    Raises
    ------
    HoError
        Where the study cannot be computed, or a budget cannot be read.
    """
    limits = Limits(None if time is None else seconds_of(time), None if memory is None else bytes_of(memory))
    start = perf_counter()
    if isinstance(study, Problem):
        problem, run, curvature = study, None, None
        all_settings = [Settings(**options)]
    else:
        if options:
            raise ArgumentError("options belong to a Problem; a study has its own", do="change the study file")
        spec = study if isinstance(study, StudySpec) else StudySpec.read(study)
        problem, run, curvature = spec.problem(), spec.run(), spec.curvature()
        all_settings = [Settings(**o) for o in spec.settings()]
    works = [Work(problem, s) for s in all_settings]
    if run is not None:
        for work in works:
            work.plan(work.steps(run), series=True)  # digests of the checkpoints and the data, which a study needs too
    opening = perf_counter() - start if run is not None else 0.0
    pilot = Pilot(problem, run)
    opened = Store.open(store, mode="r") if store is not None and is_store(store) else None
    shared: dict[str, int] = {}  # gradients of whole passes are computed once for all partitions
    lines = tuple(pilot.line(work, opened, shared) for work in works)
    beside = opening + pilot.once_seconds + (pilot.curvature_seconds(curvature) if curvature else 0.0)
    found = Estimate(lines, beside, pilot.by_order(works[0]))
    return replace(found, changes=tuple(pilot.changes(works, found, limits))) if limits.given else found


@dataclass(frozen=True)
class Limits:
    """A budget of seconds and bytes; None is without limit."""

    seconds: float | None
    bytes: float | None

    @property
    def given(self) -> bool:
        return self.seconds is not None or self.bytes is not None

    def fit(self, seconds: float, size: float) -> bool:
        """Whether both are within the budget."""
        in_time = self.seconds is None or seconds <= self.seconds
        return in_time and (self.bytes is None or size <= self.bytes)


@dataclass(frozen=True)
class Unit:
    """What is done with the results of a checkpoint, and with those of all at the end."""

    seconds: float  # to publish and to read one
    export: float  # seconds to export the Dataset of them
    bytes: int  # of its file


@dataclass
class Timed:
    """One batch of one partition and request."""

    engine: str
    seconds: float
    gradients: float
    bytes: float  # peak resident memory while it ran
    timed: bool
    self_check: float
    measured: float
    sweeps: float = 0.0  # bytes that were predicted


class Pilot:
    """One batch of a problem at its first checkpoint, and what was timed on it."""

    def __init__(self, problem: Problem, run: Any) -> None:
        self.problem, self.run = problem, run
        start = perf_counter()
        self.checkpoint = None if run is None else run[0]
        self.load_seconds = perf_counter() - start
        self.batches = sum(1 for _ in problem.batches())
        of = problem.of_direction()
        self.direction_batches = self.batches if of is problem else sum(1 for _ in of.batches())
        self.once_seconds = 0.0
        self.cache: dict[Any, Timed] = {}
        self.units: dict[Any, Unit] = {}
        self._fixed: dict[Any, tuple[Any, dict[str, Tensor], Any, float, float]] = {}

    def at(self, work: Work) -> tuple[Any, dict[str, Tensor], Any, float, float]:
        """State, a direction, the batch, the seconds of its gradient and of what each checkpoint needs."""
        key = (str(work.dtype), work.settings.include_frozen)
        if key not in self._fixed:
            start = perf_counter()
            state = work.state(self.checkpoint)
            self.problem.check_deterministic(state)
            each = self.load_seconds + perf_counter() - start
            batch = self.problem.cast(self.problem.first_batch(), state.dtype)
            u, seconds = {}, math.inf
            for _ in range(3):
                start = perf_counter()
                leaves = {n: p.detach().requires_grad_() for n, p in state.parameters.items()}
                loss = self.problem.batch_value(leaves, state, batch)
                found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
                seconds = min(seconds, perf_counter() - start)
                grads = [torch.zeros_like(p) if g is None else g for p, g in zip(leaves.values(), found, strict=True)]
                u = {n: g.detach() for n, g in zip(leaves, grads, strict=True)}
            self._fixed[key] = (state, u, batch, seconds, each)
        return self._fixed[key]

    # ---- one batch ----------------------------------------------------------------------------------------------

    def timed(self, work: Work) -> Timed:
        """One batch of a setting, timed where that is affordable and scaled otherwise."""
        s = work.settings
        key = (work.partition.fingerprint(), s.request, s.engine, str(work.dtype), work.measure, s.self_check, s.memory)
        if key not in self.cache:
            self.cache[key] = self._timed(work)
        return self.cache[key]

    def task(self, work: Work, partition: Partition | None = None, request: Request | None = None) -> engines.Task:
        """What an engine is given at the first checkpoint."""
        state, u, *_ = self.at(work)
        partition = work.partition if partition is None else partition
        return engines.Task(self.problem, state, u, partition, request or work.settings.request, work.memory, "pilot")

    def _timed(self, work: Work) -> Timed:
        batch, gradient = self.at(work)[2:4]
        s = work.settings
        start = perf_counter()
        task = self.task(work)
        try:
            engine = engines.choose(task, s.engine, check_all=s.self_check)
        except TangentsUnsupported as reason:
            engine = engines.fall_back(task, s.engine, reason)
        self.once_seconds += perf_counter() - start
        gradients = self.gradients(engine, batch)
        if gradients * gradient > PATIENCE:
            try:
                return self.scaled(work, engine, gradients)
            except TangentsUnsupported as reason:
                engine = engines.fall_back(task, s.engine, reason)
                return self.scaled(work, engine, self.gradients(engine, batch))
        reset_high_water()
        with heap.reused():
            try:
                seconds = self.seconds_of(engine, work)
            except TangentsUnsupported as reason:
                engine = engines.fall_back(task, s.engine, reason)
                gradients = self.gradients(engine, batch)
                seconds = self.seconds_of(engine, work)
            forward = _seconds(lambda: measured(engine, work.measure, batch)) if work.measure.what else 0.0
            check = _seconds(lambda: engines.self_check(task, engine)) if s.self_check else 0.0
        return Timed(engine.name, seconds, gradients, high_water() or resident(), True, check, forward)

    def seconds_of(self, engine: engines.Engine, work: Work) -> float:
        """One batch, once it is warm. A first call that takes long counts, less what is checked at a first call."""
        batch, gradient = self.at(work)[2:4]
        first = _seconds(lambda: engine.batch(batch))
        if first > PATIENCE / 4:
            return max(first / 2, first - (0.0 if work.settings.self_check else gradient))
        seconds = min(_seconds(lambda: engine.batch(batch)) for _ in range(2))
        self.once_seconds += max(0.0, first - seconds)  # of a process's first call: code and memory that are new
        return seconds

    def gradients(self, engine: engines.Engine, batch: Any) -> float:
        """The predicted cost of a batch, in gradients."""
        if isinstance(engine, engines.Tangents):
            return engine.predicted_gradients()
        return nested.predicted_gradients(len(engine.task.partition), engine.task.request)

    def scaled(self, work: Work, engine: engines.Engine, gradients: float) -> Timed:
        """A batch that takes too long to be timed: of nested from the gradient; of tangents along the line through
        the same request with the groups merged into few, which has what every request needs and what a group adds."""
        _, _, batch, gradient, _ = self.at(work)
        rows = max(1, count_rows(batch) // engines.PROBE)
        size = len(work.partition)
        counts = [n for n in CALIBRATION if n < size]
        if not isinstance(engine, engines.Tangents) or not counts:
            seconds = gradients * gradient
            size_bytes = resident() + self.sweep_bytes(engine, batch)
            return Timed(engine.name, seconds, gradients, size_bytes, False, seconds / rows, 0.0)
        points = [self.calibrated(work, n) for n in counts]
        many = points[-1]
        seconds = _along(gradients, [(p.gradients, p.seconds) for p in points])
        sweeps = self.sweep_bytes(engine, batch)
        size_bytes = max(many.bytes, _along(sweeps, [(p.sweeps, p.bytes) for p in points]))
        check = many.self_check * seconds / many.seconds
        forward = many.measured * forward_passes(work.measure, size) / forward_passes(work.measure, counts[-1])
        return Timed(engine.name, seconds, gradients, size_bytes, False, check, forward)

    def calibrated(self, work: Work, n: int) -> Timed:
        """One batch of the same request with the groups merged into ``n``, timed."""
        coarse = work.partition.merge(n)
        s, batch = work.settings, self.at(work)[2]
        key = ("calibration", coarse.fingerprint(), s.request, str(work.dtype), work.measure, s.self_check, s.memory)
        if key not in self.cache:
            task = self.task(work, coarse)
            engine = engines.Tangents(task, check_all=s.self_check)
            reset_high_water()
            with heap.reused():
                seconds = self.seconds_of(engine, work)
                forward = _seconds(lambda: measured(engine, work.measure, batch)) if work.measure.what else 0.0
                check = _seconds(lambda: engines.self_check(task, engine)) if s.self_check else 0.0
            count, sweeps = self.gradients(engine, batch), self.sweep_bytes(engine, batch)
            high = high_water() or resident()
            self.cache[key] = Timed("tangents", seconds, count, high, True, check, forward, sweeps)
        return self.cache[key]

    def sweep_bytes(self, engine: engines.Engine, batch: Any) -> float:
        """Peak memory of the sweeps, beyond what is resident now, in the chunks that the engine takes."""
        if not isinstance(engine, engines.Tangents):
            return 0.0
        part = next(chunks(engine, batch))[0]
        return engines.RESERVE * engine.cost(part).bytes

    # ---- a study ------------------------------------------------------------------------------------------------

    def line(self, work: Work, store: Store | None, shared: dict[str, int]) -> Line:
        """What one direction and partition costs."""
        s = work.settings
        one = self.timed(work)
        *_, gradient, each = self.at(work)
        steps: list[dict[str, Any]]
        if self.run is None:
            steps, done = [{"units": [{}]}], 0
        else:
            steps = work.steps(self.run)
            done = sum(store is not None and all(key in store for key in x["units"]) for x in steps if x["units"])
        total = sum(bool(step["units"]) for step in steps)
        batches = min(self.batches, s.max_batches or self.batches)
        passes = 0.0
        if work.direction_name == "gradient":
            before = shared.get("gradient", 0)
            along = min(self.direction_batches, s.max_batches or self.direction_batches)
            passes = max(0, total - done - before) * along
            shared["gradient"] = max(before, total - done)
        per_batch = one.seconds + one.measured
        if work.unconditional:
            per_batch += 2 * math.comb(len(work.partition) + s.order - 2, max(0, s.order - 1)) * gradient
        compared = 0.0 if s.self_check or one.engine != "tangents" else gradient  # with eager torch, at each checkpoint
        seconds = (total - done) * (each + compared + one.self_check + batches * per_batch) + passes * gradient
        disk = 0.0
        if self.run is not None:
            unit, shards = self.unit(work, batches), max(len(step["units"]) for step in steps)
            seconds += (total - done) * shards * unit.seconds + unit.export
            disk = float((total - done) * shards * unit.bytes)
        if passes and self.run is not None:
            disk += (total - done) * sum(p.numel() * p.element_size() for p in self.at(work)[0].parameters.values())
        return Line(
            work.direction_name, work.partition.name, len(work.partition), s.order, s.diagonal, one.engine, total,
            done, batches, one.gradients, seconds, one.bytes, disk, one.timed, self.errors(work, batches),
        )  # fmt: skip

    def unit(self, work: Work, batches: int) -> Unit:
        """A unit of the setting's shape, published, read and exported. Twice: what the first call loads counts once."""
        shards = len(work.shards())
        key = (work.name, work.settings.request, work.settings.keep_batches, work.measure, batches, shards)
        if key not in self.units:
            with tempfile.TemporaryDirectory() as folder:
                found = [self._unit(work, Path(folder) / str(k), -(-batches // shards)) for k in range(2)]
            self.once_seconds += max(0.0, found[0].seconds + found[0].export - found[1].seconds - found[1].export)
            self.units[key] = found[1]
        return self.units[key]

    def _unit(self, work: Work, folder: Path, batches: int) -> Unit:
        s = work.settings
        address = {"kind": "pilot"}
        plan = work.plan([{"step": 0, "sha256": "", "units": [address]}], series=True)
        sizes = {schema.TAU: len(plan.get("taus", ())), schema.NODE: len(plan.get("nodes", ()))}
        shapes = {
            k: [sizes.get(d, len(work.partition)) for d in schema.dims_of(k, n)] for k, n in plan["quantities"].items()
        }
        start = perf_counter()
        sums = units.Accumulator(s.keep_batches)
        for _ in range(-(-batches // block_length(batches, s.keep_batches)) if s.keep_batches else 1):  # a block each
            sums.add({k: np.ones(shape) for k, shape in shapes.items()}, 1.0, 1)
        norms = {k: np.ones(len(work.partition)) for k in schema.GROUP_COORDS_BY_STEP}
        with Store.open(folder, mode="w") as store:
            store.publish(address, sums.unit(norms, {"engine": "tangents", "self_check": 0.0}))
            size = sum(p.stat().st_size for p in (folder / "units").iterdir())
            read = store.read(address)
            taken = perf_counter() - start
            ds = units.assemble(plan, lambda _: read)
            start = perf_counter()
            export(ds, folder / "pilot.nc")
        return Unit(taken, perf_counter() - start, size)

    def errors(self, work: Work, batches: int) -> dict[str, float]:
        """Relative standard errors over all batches, from the pilot batch in pieces: they scale as 1/sqrt(n)."""
        from hoanalysis.derivatives.accumulate import relative_errors
        from hoanalysis.units import Accumulator

        _, _, batch, _, _ = self.at(work)
        rows = count_rows(batch)
        one = self.timed(work)
        if not self.problem.splittable or rows < 2 * PIECES or not one.timed or one.engine != "tangents":
            return {}
        key = ("errors", work.partition.fingerprint())
        if key not in self.cache:
            engine = engines.Tangents(self.task(work, None, Request(min(2, work.settings.order))), check_all=False)
            sums, step = Accumulator(), rows // PIECES
            for i in range(PIECES):
                part = self.problem.take_rows(batch, i * step, (i + 1) * step)
                result = engine.chunk(part)
                values = {schema.LOSS: np.asarray(result.loss)}
                values |= {schema.derivative(d): t.numpy() for d, t in result.tensors.items()}
                sums.add(values, self.problem.size(part), step)
            self.cache[key] = relative_errors(sums)  # type: ignore[assignment]
        found: Any = self.cache[key]
        return {k: v / math.sqrt(batches) for k, v in found.items()}

    def by_order(self, work: Work) -> pd.DataFrame:
        """Seconds, gradients and bytes of one batch for each order and engine: counted, in units of the pilot's."""
        _, _, batch, gradient, _ = self.at(work)
        one, rows = self.timed(work), []
        for name, request in ORDERS.items():
            count = nested.predicted_gradients(len(work.partition), request)
            row = {"quantity": name}
            try:
                engine = engines.Tangents(self.task(work, None, request), check_all=work.settings.self_check)
                ours = engine.predicted_gradients()
                check = work.settings.self_check
                each = one.seconds / (one.gradients + check) if one.engine == "tangents" else gradient
                told = told_seconds(each * (ours + check)), told_bytes(self.sweep_bytes(engine, batch))
                row |= {"tangents": f"{ours:.3g} gradients, {told[0]}, {told[1]}"}
            except TangentsUnsupported:
                row |= {"tangents": "cannot capture this model"}
            rows.append(row | {"nested": f"{count:.3g} gradients, {told_seconds(count * gradient)}"})
        return pd.DataFrame(rows)

    def curvature_seconds(self, options: Mapping[str, Any]) -> float:
        """The full Hessian at the first checkpoint over one batch, for all checkpoints and batches."""
        from hoanalysis.hessian import curvature

        batches = min(self.batches, options["max_batches"] or self.batches)
        once = {**options, "max_batches": 1}
        seconds = _seconds(lambda: curvature(self.problem, checkpoint=self.checkpoint, progress=False, **once))
        return seconds * batches * len(self.run)

    # ---- what would fit -----------------------------------------------------------------------------------------

    def changes(self, works: list[Work], now: Estimate, limits: Limits) -> list[Change]:
        """The changes that bring the study within a budget, those that lose least first."""
        if limits.fit(now.seconds, now.bytes):
            return []
        found = [self.with_settings(works, limits, "memory", m) for m in ("512MiB", "128MiB")] if limits.bytes else []
        if any(w.settings.order >= 3 for w in works):
            found.append(self.with_settings(works, limits, "diagonal", 3))
        found += [self.with_settings(works, limits, "partition", p) for p in COARSER]
        if limits.seconds is not None and now.seconds > limits.seconds:
            found.append(self.fewer(works, now, limits))
        known = [c for c in found if c is not None and (c.seconds < now.seconds or c.bytes < now.bytes)]
        return sorted(known, key=lambda c: not c.fits)

    def with_settings(self, works: list[Work], limits: Limits, name: str, value: Any) -> Change | None:
        """The study with another partition, memory budget, or the diagonal in place of D3."""
        texts = {
            "memory": (f'memory = "{value}"', "loses nothing: batches are taken in smaller chunks"),
            "diagonal": ("order = 2, diagonal = 3 in place of the full D3", "loses the entries of D3 off its diagonal"),
            "partition": (f'partitions = ["{value}"]', "loses what is within the groups that are joined"),
        }
        shared: dict[str, int] = {}
        try:
            lines = []
            for work in works:
                s = work.settings
                if name == "diagonal":
                    other = replace(s, order=2, diagonal=3) if s.order >= 3 else s
                else:
                    other = replace(s, **{name: value})
                lines.append(self.line(Work(self.problem, other), None, shared))
        except HoError:
            return None
        seconds, size = sum(x.seconds for x in lines), max(x.bytes for x in lines)
        if name == "partition" and lines[0].groups >= len(works[0].partition):
            return None
        return Change(*texts[name], seconds, size, limits.fit(seconds, size))

    def fewer(self, works: list[Work], now: Estimate, limits: Limits) -> Change | None:
        """So many batches as fit the time, with the standard errors that they imply."""
        assert limits.seconds is not None
        fixed = now.beside + self.of_batches(works, 0)
        each = (self.of_batches(works, 100) - self.of_batches(works, 0)) / 100
        n = int((limits.seconds - fixed) / each) if each else 0
        if n < 1:
            return None
        rows = count_rows(self.at(works[0])[2])
        factor = math.sqrt(max(1.0, now.lines[0].batches / n))
        errors = ", ".join(f"{k} to {100 * v * factor:.2g} %" for k, v in now.lines[0].errors.items())
        loses = f"standard errors grow by {factor:.2g}" + (f" ({errors})" if errors else "")
        seconds = fixed + n * each
        return Change(f"max_samples = {n * rows}", loses, seconds, now.bytes, limits.fit(seconds, now.bytes))

    def of_batches(self, works: list[Work], n: int) -> float:
        """The seconds of all checkpoints with ``n`` batches each, without what is done once."""
        total = 0.0
        for work in works:
            one = self.timed(work)
            _, _, _, gradient, each = self.at(work)
            count = 1 if self.run is None else len(self.run)
            along = gradient if work.direction_name == "gradient" else 0.0
            total += count * (each + one.self_check + n * (one.seconds + one.measured + along))
            if self.run is not None:
                unit = self.unit(work, self.batches)
                total += count * len(work.shards()) * unit.seconds + unit.export
        return total


def _along(x: float, points: list[tuple[float, float]]) -> float:
    """The value at ``x`` of the line through the first and the last point, which neither falls nor starts below zero.

    >>> _along(10, [(1, 5), (3, 9)]), _along(10, [(1, 1), (3, 9)]), _along(10, [(1, 5), (3, 4)])
    (23.0, 30.0, 5.0)
    """
    (x0, y0), (x1, y1) = points[0], points[-1]
    slope = max(0.0, (y1 - y0) / (x1 - x0)) if x1 > x0 else 0.0
    slope = min(slope, y1 / x1)
    return max(y0, y1) + slope * (x - x1)


# ---- the process, and what users write -----------------------------------------------------------------------------


def _seconds(call: Callable[[], Any]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


def resident() -> float:
    """The resident size of this process, in bytes; 0 where the system does not tell."""
    return _status("VmRSS")


def high_water() -> float:
    """The highest resident size since `reset_high_water`, in bytes; 0 where the system does not tell."""
    return _status("VmHWM")


def reset_high_water() -> None:
    """Let `high_water` begin anew, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _status(name: str) -> float:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return float(line.split()[1]) * 1024
    except OSError:
        pass
    return 0.0


def seconds_of(text: str | float) -> float:
    """
    >>> seconds_of("10min"), seconds_of("1.5h"), seconds_of(30)
    (600.0, 5400.0, 30.0)
    """
    match = re.fullmatch(r"\s*([0-9]+\.?[0-9]*)\s*(s|min|h|d)?\s*", str(text))
    if match is None or float(match[1]) <= 0:
        raise ArgumentError(f"time {str(text)[:40]!r} is not a time", do="write seconds, or '10min', '2h'")
    return float(match[1]) * {"s": 1, "min": 60, "h": 3600, "d": 86400}[match[2] or "s"]


def bytes_of(text: str | int) -> float:
    """A size, as for the option ``memory`` of `hoanalysis.summarize`."""
    from hoanalysis.summaries import _bytes

    return float(_bytes(text))


def told_seconds(seconds: float) -> str:
    """
    >>> told_seconds(0.0123), told_seconds(75), told_seconds(9000)
    ('12 ms', '1.2 min', '2.5 h')
    """
    for limit, unit, text in ((1.0, 1e-3, "ms"), (60.0, 1.0, "s"), (3600.0, 60.0, "min")):
        if seconds < limit:
            return f"{seconds / unit:.2g} {text}"
    return f"{seconds / 3600:.2g} h"


def told_bytes(size: float) -> str:
    """
    >>> told_bytes(3 * 2**30), told_bytes(5e4)
    ('3 GiB', '48.8 kiB')
    """
    unit, text = next(((u, t) for u, t in ((2**30, "GiB"), (2**20, "MiB")) if size >= u), (2**10, "kiB"))
    return f"{size / unit:.3g} {text}" if size / unit < 1000 else f"{size / unit:.0f} {text}"
