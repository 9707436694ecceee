"""Which engine computes a batch, in how many chunks, and how sure we are: the choice, the chunking, the self-check."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hoanalysis.derivatives import nested
from hoanalysis.derivatives.common import BatchDerivatives, Request
from hoanalysis.derivatives.tangents import NotFinite, OtherBranch, Program, TangentsUnsupported, capture, capture_key
from hoanalysis.derivatives.tangents.costs import Cost
from hoanalysis.errors import ArgumentError, ModelError, NumericsError
from hoanalysis.partitions import Partition
from hoanalysis.problem import Batch, Problem, State, count_rows

ENGINES = ("auto", "tangents", "nested")
DIAGONAL = 2  # entries of a diagonal that the self-check looks at, beside the largest
OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")  # as torch and its libraries say it
PROBE = 16  # samples of the self-check, and of the program that memory is predicted from
RESERVE = 1.3  # measured peak over prediction: gaps in the heap that is kept, and what kernels take for themselves
BRANCHES = 8  # programs kept for one shape of batch, where the call depends on values


@dataclass
class Task:
    """Everything that one unit's derivatives depend on."""

    problem: Problem
    state: State
    direction: Mapping[str, Tensor]
    partition: Partition
    request: Request
    memory: int  # bytes
    identity: Hashable = None  # of the weights and the model's settings
    settings: tuple | None = None  # of the model and the loss, where they were read for this call already
    notes: list[str] = field(default_factory=list)


class Engine:
    """Derivatives of whole batches, computed in chunks of samples where memory asks for it.

    The chunks' sums are exact for losses that are means over samples; other batches are taken whole.
    """

    name: str

    def __init__(self, task: Task) -> None:
        self.task = task
        self.rows: int | None = None  # samples in a chunk; None: the whole batch

    def chunk(self, batch: Batch) -> BatchDerivatives:
        raise NotImplementedError

    def affordable(self, batch: Batch) -> int:
        """How many samples of this batch fit into the memory budget at once."""
        return count_rows(batch)

    def batch(self, batch: Batch) -> BatchDerivatives:
        """The derivatives of one batch (already cast). A chunk that does not fit in memory is halved."""
        problem = self.task.problem
        while True:
            try:
                rows = count_rows(batch)
                step = even(rows, min(self.rows or rows, self.affordable(batch)))
                if step == rows:
                    return self.chunk(batch)
                total = BatchDerivatives(0.0)
                parts = [problem.take_rows(batch, i, min(i + step, rows)) for i in range(0, rows, step)]
                for part, share in zip(parts, problem.shares(parts, batch), strict=True):
                    if share:  # nothing counts in a part whose targets are all masked, and its own mean is 0/0
                        total.add(self.chunk(part).scaled(share))
                return total
            except (MemoryError, RuntimeError) as error:
                if not _out_of_memory(error) or step < 2 or not problem.splittable:
                    raise
                self.rows = step // 2
                self.task.notes.append(f"out of memory with {step} samples at once; went on with {self.rows}")


def even(rows: int, most: int) -> int:
    """The size of chunks of at most ``most`` that cut ``rows`` evenly, so that at most two sizes occur.

    >>> even(512, 200), even(64, 64), even(10, 4)
    (171, 64, 4)
    """
    chunks = -(-rows // most)
    return -(-rows // chunks)


class Nested(Engine):
    name = "nested"

    def chunk(self, batch: Batch) -> BatchDerivatives:
        t = self.task
        try:
            return nested.derivatives(t.problem, t.state, t.direction, t.partition, batch, t.request)
        except (NotImplementedError, RuntimeError) as error:
            if _out_of_memory(error):
                raise
            raise ModelError(
                f"the model or loss failed while it was differentiated {t.request.highest} times",
                why=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300] if str(error).strip() else ''}",
                do="use a lower order, or write what torch cannot differentiate in other operations",
            ) from error


class Tangents(Engine):
    """Captured programs, kept with the problem: one for each shape of batch and, where the call depends on values, for
    each of the latest `BRANCHES` branches.

    The first batch of each program, at each checkpoint and setting of the model, is compared with eager PyTorch (its
    loss, and D1 with the eager gradient contracted with u), every batch where ``check_all`` is set; a difference
    raises `TangentsUnsupported`, as do a rule that fails and derivatives that are not finite where the loss is.
    """

    name = "tangents"

    def __init__(self, task: Task, check_all: bool = True) -> None:
        super().__init__(task)
        self.check_all = check_all
        self._settings = task.problem.settings() if task.settings is None else task.settings
        cache = task.problem.cache
        if cache.get("settings of programs") != self._settings:  # those of other settings are not kept
            cache.update({"settings of programs": self._settings, "programs": {}, "checked programs": set()})
        self.programs: dict[Hashable, list[Program]] = cache["programs"]
        self._fresh: set[Program] = set()
        self._checked: set[Hashable] = cache["checked programs"]

    @functools.cached_property
    def splittable(self) -> bool:
        return self.task.problem.splits(self._settings)

    def affordable(self, batch: Batch) -> int:
        """The budget over the predicted peak of a few samples: memory grows with the samples, but for the weights."""
        t, rows = self.task, count_rows(batch)
        probe = min(rows, PROBE) if self.splittable else rows
        needed = RESERVE * self.cost(batch if probe == rows else t.problem.take_rows(batch, 0, probe)).bytes
        fits = max(1, int(t.memory * probe / needed)) if needed else rows
        if not self.splittable:
            if fits < rows:
                self._note(f"batches of {rows} samples were taken whole: not known to be means over samples")
            return rows
        if needed / probe > t.memory:
            self._note(f"a single sample takes more than the memory budget: about {needed / probe / 2**20:.0f} MiB")
        elif fits < rows:
            self._note(f"batches of {rows} samples were computed in chunks of at most {fits}")
        return min(rows, fits)

    def _note(self, text: str) -> None:
        if text not in self.task.notes:
            self.task.notes.append(text)

    def predicted_gradients(self) -> float:
        """The predicted cost of the first batch, in gradients."""
        t = self.task
        batch = t.problem.cast(t.problem.first_batch(), t.state.dtype)
        if self.splittable and count_rows(batch) > PROBE:
            batch = t.problem.take_rows(batch, 0, PROBE)
        return self.cost(batch).gradients

    def cost(self, batch: Batch) -> Cost:
        """The prediction for a batch of these shapes, made once for each partition and request."""
        t = self.task
        key, program = self._program(batch)
        costs = t.problem.cache.setdefault("costs", {})
        once = (key, t.partition.fingerprint(), t.request)
        if once not in costs:
            costs[once] = program.costs(t.partition, t.request)
        return costs[once]

    def _program(self, batch: Batch) -> tuple[Hashable, Program]:
        t = self.task
        key = capture_key(t.problem, t.state, batch, self._settings)
        if key not in self.programs:
            self.programs[key] = [self._captured(batch)]
        return key, self.programs[key][0]

    def chunk(self, batch: Batch) -> BatchDerivatives:
        program, result = self._derivatives(batch)
        try:
            self._check(program, batch, result)
        except TangentsUnsupported:
            if program in self._fresh:
                raise
            # captured by an earlier call: something that the key does not hold may have changed since
            key, _ = self._program(batch)
            del self.programs[key]
            program, result = self._derivatives(batch)
            self._check(program, batch, result)
        return result

    def _check(self, program: Program, batch: Batch, result: BatchDerivatives) -> None:
        t = self.task
        once = (program, t.partition.fingerprint(), t.identity)
        if self.check_all or once not in self._checked:
            program.check(t.problem, t.state, t.direction, t.partition, batch, result)
            self._checked.add(once)

    def _captured(self, batch: Batch) -> Program:
        program = capture(self.task.problem, self.task.state, batch)
        self._fresh.add(program)
        return program

    def _derivatives(self, batch: Batch) -> tuple[Program, BatchDerivatives]:
        """By the program whose branches this batch takes, the latest first; by a new one where there is none."""
        t = self.task
        key, _ = self._program(batch)
        known = self.programs[key]
        for i, program in enumerate(known):
            try:
                result = self._run(program, batch)
            except OtherBranch:
                continue
            known.insert(0, known.pop(i))
            return program, result
        program = self._captured(batch)
        known[:] = [program, *known[: BRANCHES - 1]]
        t.notes.append("the call depends on values: captured anew where a batch took another branch")
        return program, self._run(program, batch)

    def _run(self, program: Program, batch: Batch) -> BatchDerivatives:
        t = self.task
        try:
            result = program.derivatives(t.state, t.direction, t.partition, batch, t.request)
        except (TangentsUnsupported, MemoryError):
            raise
        except Exception as error:  # the nested engine takes what a rule fails on, and says why
            if _out_of_memory(error):
                raise
            raise TangentsUnsupported(f"a rule failed: {type(error).__name__}: {str(error)[:200]}") from error
        if np.isfinite(result.loss):
            for d, tensor in [*result.tensors.items(), *result.diagonals.items()]:
                if not bool(torch.isfinite(tensor).all()):
                    raise NotFinite(f"D{d} of the captured graph is not finite where the loss is")
        return result


def choose(task: Task, engine: str, check_all: bool = True) -> Engine:
    """The engine that was asked for; ``auto`` is the one of lower predicted cost, and both costs are noted.

    Raises
    ------
    TangentsUnsupported
        Where the model cannot be captured, or ``tangents`` does not do this order: see `fall_back`.
    """
    if engine not in ENGINES:
        raise ArgumentError(f"there is no engine {engine!r}", do="use 'auto', 'tangents' or 'nested'")
    if engine == "nested":
        return Nested(task)
    tangents = Tangents(task, check_all)
    if engine == "auto":
        ours = tangents.predicted_gradients()
        theirs = nested.predicted_gradients(len(task.partition), task.request)
        if theirs < ours:
            task.notes.append(f"nested is cheaper: {theirs:.3g} gradients predicted, {ours:.3g} for tangents")
            return Nested(task)
    return tangents


def fall_back(task: Task, engine: str, reason: TangentsUnsupported) -> Engine:
    """The nested engine in place of one that cannot do it, with the reason noted; an error where that was asked for."""
    if engine == "tangents":
        raise ModelError(
            "the engine 'tangents' cannot differentiate this model and loss",
            why=str(reason),
            do="use engine='auto': it takes the nested engine where it must, and says so",
        )
    task.notes.append(f"nested instead of tangents: {reason}")
    return Nested(task)


def self_check(task: Task, engine: Engine, rows: int = PROBE, seed: int = 0) -> float:
    """The largest relative error over the orders, on a few samples, against univariate nested differentiation.

    With random c, sum over all indices of D^(d)[s1..sd] c_s1 .. c_sd must equal the d-th derivative of
    t -> L(theta + t sum_s c_s U^s); the error is relative to the same sum with absolute values. Of a diagonal alone
    the largest entry is compared with the derivative along its own group.
    """
    problem, state = task.problem, task.state
    batch = _few(problem, problem.cast(problem.first_batch(), state.dtype), rows, engine)
    result = engine.chunk(batch)
    try:
        return _compared(task, batch, result, seed)
    except (NotImplementedError, RuntimeError) as error:
        task.notes.append(f"no self-check: torch cannot differentiate this so often ({str(error)[:120]})")
        return float("nan")


def _few(problem: Problem, batch: Batch, rows: int, engine: Engine) -> Batch:
    """The first samples of a batch, as many as fit into memory at once, that hold something that counts."""
    total = count_rows(batch)
    if not problem.splittable or total <= 1:
        return batch
    step = min(rows, total, engine.rows or total, engine.affordable(batch))
    parts = (problem.take_rows(batch, i, min(i + step, total)) for i in range(0, total, step))
    return next((part for part in parts if all(problem.shares([part], batch))), batch)


def _compared(task: Task, batch: Batch, result: BatchDerivatives, seed: int) -> float:
    problem, state, partition = task.problem, task.state, task.partition
    rng = np.random.default_rng(seed)
    c = torch.as_tensor(rng.uniform(0.5, 1.5, len(partition)) * rng.choice([-1.0, 1.0], len(partition)))
    errors = []
    _, terms = nested.taylor(problem, state, _scaled(task, c), batch, max(result.tensors))
    for d, tensor in result.tensors.items():
        value, size = _contracted(tensor, c), _contracted(tensor.abs(), c.abs())
        errors.append(abs(value - terms[d - 1]) / size if size else abs(terms[d - 1]))
    for d, diagonal in result.diagonals.items():
        if d in result.tensors:
            continue
        largest = int(diagonal.abs().argmax())
        for s in {largest, *rng.choice(len(partition), min(DIAGONAL, len(partition)), replace=False).tolist()}:
            only = torch.zeros(len(partition), dtype=torch.float64)
            only[s] = 1.0
            _, terms = nested.taylor(problem, state, _scaled(task, only), batch, d)
            size = float(diagonal[largest].abs())
            errors.append(abs(float(diagonal[s]) - terms[d - 1]) / size if size else abs(terms[d - 1]))
    return max(errors) if np.isfinite(errors).all() else float("inf")


def suspect(error: float, state: State) -> bool:
    """Whether a self-check found numbers that differ, or are none; one that could not be made does not tell."""
    return bool(error > tolerance(state))


def tolerance(state: State) -> float:
    """The self-check error above which numbers are suspect: rounding of the parameters' dtype, with cancellation."""
    single = any(p.dtype == torch.float32 for p in state.parameters.values())
    return 1e-3 if single else 1e-9


def check_finite(result: BatchDerivatives, where: str) -> None:
    """Raise `NumericsError` naming the first order and entry that is not finite."""
    if not np.isfinite(result.loss):
        raise NumericsError(
            f"the loss is {result.loss}", where=where, do="look at the inputs of this batch and at the weights"
        )
    for kind, tensors in (("D", result.tensors), ("diagonal of D", result.diagonals)):
        for d, t in sorted(tensors.items()):
            bad = (~torch.isfinite(t)).nonzero()
            if len(bad):
                raise NumericsError(
                    f"{kind}{d} is not finite in {len(bad)} entries, the first at {tuple(bad[0].tolist())}",
                    where=where,
                    why="it overflowed, or a function has no such derivative at this point",
                    do="scale the direction down, or pass dtype='float64'",
                )


def _scaled(task: Task, c: Tensor) -> dict[str, Tensor]:
    """The direction with each U^s multiplied by c_s."""
    out = {}
    for name, u in task.direction.items():
        a = task.partition.assignment[name]
        out[name] = u * (c[a] if isinstance(a, int) else c[torch.as_tensor(a)]).to(u)
    return out


def _contracted(tensor: Tensor, c: Tensor) -> float:
    for _ in range(tensor.dim()):
        tensor = tensor @ c
    return float(tensor)


def _out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(words in text for words in OUT_OF_MEMORY)
