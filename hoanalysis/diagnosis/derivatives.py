"""One small batch at every order that is asked for: what computes it, whether it agrees with itself and with the loss.

Three comparisons, each with what it can see:

    tangents against the eager gradient     an op that capture lost; made by the engine itself
    self-check                              all orders against univariate nested differentiation: a wrong rule
    slopes                                  D1 against the loss measured by forward passes: a wrong backward, a detach
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hoanalysis import culprits
from hoanalysis.analysis.groups import eps_of, system_of
from hoanalysis.derivatives import engines, nested
from hoanalysis.derivatives.common import Request
from hoanalysis.derivatives.tangents import Program
from hoanalysis.diagnosis import watch
from hoanalysis.diagnosis.findings import Finding
from hoanalysis.diagnosis.subject import Subject, quick
from hoanalysis.errors import HoError, NoDirection, listed
from hoanalysis.partitions import Partition
from hoanalysis.problem import Batch, Problem, State, count_rows, keep_random_state, naming_batch, tensors_of
from hoanalysis.summaries import Settings, Work

ROWS = engines.PROBE  # samples of the small batch
MOST_GROUPS = 64  # whose slopes are measured one by one
SLOPE = 1e-2  # relative difference above which a slope is wrong
DISTANCES = (1e-6, 1e-8)  # of the difference quotients, beside weights of the size of 1
FEW = 1e-3  # share of values on a kink below which it is not worth a warning


def small_batch(problem: Problem) -> Batch:
    """A few samples of the first batch; all of them where the loss couples them."""
    batch = problem.first_batch()
    if problem.splittable and count_rows(batch) > ROWS:
        return problem.take_rows(batch, 0, ROWS)
    return batch


# ---- the forward pass -------------------------------------------------------------------------------------------


def forward(subject: Subject, problem: Problem) -> Iterator[Finding]:
    """Whether the loss is one number, and finite; where values first stop being so; kinks."""
    work = Work(problem, quick(subject.settings[0]))
    state = _state(work, subject)
    try:
        with keep_random_state(), naming_batch(0):
            loss = problem.check_deterministic(state)
    except HoError as error:
        yield Finding.of("forward", error)
        return
    batch = problem.cast(problem.first_batch(), state.dtype)
    if not np.isfinite(loss):
        yield not_finite(problem, state, batch, "batch 0", loss)
        return
    yield Finding("ok", "forward", f"the loss of the first batch is {loss:.6g}, twice the same, and finite throughout")
    with naming_batch(0):
        sites, _ = watch.kinks(problem, state, problem.cast(small_batch(problem), state.dtype))
    if not sites:
        yield Finding("ok", "kinks", "no value sits where the loss has no derivative")
    for site, (count, total, kind) in sites.items():
        told = f"{count:,} of {total:,} values of {site} are {kind}"
        if "infinite" in kind:
            why = "PyTorch's own choice is taken there, and D2 and above may be infinite"
            yield Finding("warning", "kinks", told, site.line, why, "add a small constant under the root")
            continue
        many = count > FEW * total
        yield Finding(
            "warning" if many else "note", "kinks", told, site.line,
            "the loss has a derivative to each side there; PyTorch's choice of one is taken",
            "look at a later checkpoint: weights or inputs that are exactly 0 do this" if many else "",
        )  # fmt: skip


def not_finite(problem: Problem, state: State, batch: Batch, where: str, loss: float) -> Finding:
    """The first op, module and line at which a value is not finite."""
    told = f"the loss is {loss}"
    for t in tensors_of(batch):
        if t.is_floating_point() and not bool(t.isfinite().all()):
            try:
                culprits.refuse_nonfinite([t], 0)
            except HoError as error:
                what = "the inputs are not finite"
                return Finding("error", "forward", f"{told}: {what}", f"{where}, {error.where}", "", error.do)
    with keep_random_state(), naming_batch(0):
        seen, _ = watch.pass_over(problem, state, batch)
    if seen.first is None:
        return Finding("error", "forward", told, where, "no op was seen to give it", "look at the loss by itself")
    weights = f": the weights {seen.operand!r} are not finite" if seen.operand else ""
    return Finding(
        "error", "forward", f"{told}: values are first {seen.first_value} in the output of {seen.first}{weights}",
        ", ".join(filter(None, (where, seen.first.line))),
        "" if weights else "its operands are finite" if seen.first_value == "infinite" else "its operands hold no NaN",
        "take an earlier checkpoint" if weights else "look at what this op is given there: a logarithm or root of what "
        "is not positive, a division by 0, an exponential that overflows",
    )  # fmt: skip


def _state(work: Work, subject: Subject) -> State:
    return work.state(subject.checkpoint)


# ---- the orders -------------------------------------------------------------------------------------------------


def orders(subject: Subject, problem: Problem) -> Iterator[Finding]:
    """Each direction and partition that is asked for on one small batch, at its orders."""
    one = subject.problem([small_batch(problem)])
    covered: set[str] = set()
    groups_told = False
    for settings in subject.settings:
        try:
            work = Work(one, quick(settings))
            unit = _computed(subject, work)
        except NoDirection as error:
            yield Finding.of("derivatives", error, "note")
            continue
        except HoError as error:
            yield Finding.of("derivatives", error)
            continue
        yield from _agreement(work, unit)
        yield from _coverage(one, work, unit, covered)
        if not groups_told:
            groups_told = True
            yield from _groups(subject, one, work, unit)


def _computed(subject: Subject, work: Work) -> Mapping[str, Any]:
    """Loss, derivatives and facts of one batch. Along ``to:next`` the checkpoint before the last is looked at."""
    checkpoint, run, position = subject.checkpoint, subject.run, subject.position
    if work.direction_name == "to:next" and run is not None and position == len(run) - 1 and len(run) > 1:
        checkpoint, position = run[len(run) - 2], len(run) - 2
    if run is not None and position is not None and work.direction_name == "to:next":
        run = run[position : position + 2]
    parts = work.sums(checkpoint, run, progress=False)
    ds = parts.dataset()
    values = {
        k: np.asarray(ds[f"{k}_sum"].values) / float(ds["weight_sum"]) for k in ("loss", "D1", "D2") if f"{k}_sum" in ds
    }
    return {**json.loads(ds.attrs["unit"]), **values, "direction_norm": np.asarray(ds["direction_norm"].values)}


def _agreement(work: Work, unit: Mapping[str, Any]) -> Iterator[Finding]:
    s, error = work.settings, unit["self_check"]
    what = f"{_orders(s)} along {work.direction_name}, {len(work.partition)} groups ({work.partition.name})"
    by = f"by {unit['engine']}"
    if unit["suspect"] and np.isinf(error):
        yield Finding(
            "error", "self-check", f"{what} {by}: nested differentiation gives numbers that are not finite",
            why="PyTorch's derivative of an op is not finite at some order, so that nothing is there to compare with",
            do="write that op in others, or use a lower order",
        )  # fmt: skip
    elif unit["suspect"]:
        yield Finding(
            "error", "self-check", f"{what} {by}: off by {error:.1e}, relative, from nested differentiation",
            why="an op of the model is differentiated wrongly by one of the two, or rounding has taken over",
            do="compare with engine = 'nested', and with dtype = 'float64', where rounding is smaller",
        )  # fmt: skip
    elif np.isnan(error):
        yield Finding("warning", "self-check", f"{what} {by}: could not be compared", why=unit["engine_detail"])
    else:
        yield Finding("ok", "self-check", f"{what}, {unit['engine']}: within {error:.0e} of nested")


def _orders(s: Settings) -> str:
    above = s.diagonal is not None and s.diagonal > s.order
    return (f"D1 to D{s.order}" if s.order > 1 else "D1") + (f" and the diagonal of D{s.diagonal}" if above else "")


def _coverage(problem: Problem, work: Work, unit: Mapping[str, Any], covered: set[str]) -> Iterator[Finding]:
    """Which op got which rule; which only the generic one; why there is no captured program."""
    notes = [n for n in str(unit["engine_detail"]).split("; ") if n]
    for note in notes:
        if note.startswith("nested instead of tangents") and note not in covered:
            covered.add(note)
            yield Finding(
                "warning", "capture", "the call could not be captured, and the engine nested computes it",
                why=note.partition(": ")[2],
                do="numbers are right where PyTorch's own derivatives are; plain ops are captured, and are faster",
            )  # fmt: skip
    programs = [p for known in problem.cache.get("programs", {}).values() for p in known]
    if not programs or unit["engine"] != "tangents":
        return
    told = describe(programs[0])
    if told in covered:
        return
    covered.add(told)
    kinds = programs[0].description()
    generic = kinds.get("generic", {})
    n = sum(sum(ops.values()) for ops in kinds.values())
    each = "each with a rule of its own" if not generic else f"{sum(generic.values())} by the generic rule"
    yield Finding("ok", "capture", f"{n} ops: {each}", why=told)
    if generic:
        yield Finding(
            "note", "capture", f"only the generic rule: {', '.join(_counted(generic))}",
            why="PyTorch's own derivatives of the op are taken, which the self-check has compared",
        )  # fmt: skip


def describe(program: Program) -> str:
    """Ops by kind of rule: ``product: linear 3; scalar: tanh 2``."""
    kinds = program.description()
    return "; ".join(f"{kind}: {', '.join(_counted(ops))}" for kind, ops in kinds.items())


def _counted(ops: Mapping[str, int]) -> list[str]:
    return [f"{op.removeprefix('aten.').removesuffix('.default')} {n}" for op, n in ops.items()]


# ---- groups -----------------------------------------------------------------------------------------------------


def _groups(subject: Subject, problem: Problem, work: Work, unit: Mapping[str, Any]) -> Iterator[Finding]:
    """Parameters that the loss does not use, and groups without effect."""
    state = _state(work, subject)
    batch = problem.cast(problem.first_batch(), state.dtype)
    parameters = {n: p.detach().requires_grad_() for n, p in state.parameters.items()}
    loss = problem.batch_value(parameters, state, batch)
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    unused = [n for n, g in zip(parameters, gradients, strict=True) if g is None]
    if unused:
        yield Finding(
            "warning", "groups", f"the loss does not use {len(unused)} of {len(parameters)} tensors: {listed(unused)}",
            why="forward() does not call them, or they are behind a detach: their groups are exact zeros",
            do="freeze them where that is meant: requires_grad_(False) leaves them out",
        )  # fmt: skip
    if "D2" not in unit:
        return
    p = work.partition
    eps = eps_of(next(iter(state.parameters.values())).dtype)
    null = system_of({k: unit[k] for k in ("D1", "D2")}, unit["direction_norm"], eps).null
    names = [label for label, is_null in zip(p.labels, null, strict=True) if is_null and label not in unused]
    if names:
        yield Finding(
            "note", "groups", f"{len(names)} of {len(p)} groups have no effect on these samples: {listed(names)}",
            why="their D1 and D2 are rounding: a bias before a norm, a key bias under softmax, units that are off",
            do="they get no learning rate, and are named wherever H-bar is solved",
        )  # fmt: skip


# ---- the loss against its slopes --------------------------------------------------------------------------------


def slopes(subject: Subject, problem: Problem, seed: int = 0) -> Iterator[Finding]:
    """D1 of each parameter tensor along a random direction against the loss measured on both sides, in float64.

    With u_p random, of the size of the tensor:  (L(theta + h u_p) - L(theta - h u_p)) / 2h = D1_p. This
    uses no derivative of torch's: it sees a backward that is wrong, and values that were detached.
    """
    one = subject.problem([small_batch(problem)])
    weights = None if subject.checkpoint is None else one.fitted(subject.checkpoint)
    state = one.state(weights, dtype=torch.float64, include_frozen=subject.include_frozen)
    batch = one.cast(one.first_batch(), torch.float64)
    partition = Partition.canonical(one.model, include_frozen=subject.include_frozen)
    u = _like(state.parameters, seed)
    with keep_random_state(), naming_batch(0):
        claimed = nested.derivatives(one, state, u, partition, batch, Request(1)).tensors[1].numpy()
        names = list(state.parameters)
        if len(names) > MOST_GROUPS:
            names = sorted(names, key=lambda n: -abs(claimed[names.index(n)]))[:MOST_GROUPS]
        told = dict(zip(partition.labels, claimed.tolist(), strict=True))
        measured: dict[str, float] = {}
        wrong = [n for n in names if not _agrees(one, state, batch, n, u[n], told[n], measured)]
    if not wrong:
        yield Finding("ok", "slopes", f"D1 of {len(names)} tensors agrees with the loss measured by forward passes")
        return
    first = wrong[0]
    yield Finding(
        "error", "slopes", f"D1 is not the slope of the loss for {len(wrong)} of {len(names)} tensors: {listed(wrong)}",
        where=f"{first!r}: D1 is {told[first]:.4g} along a random direction, the loss changes by {measured[first]:.4g}",
        why=_suspects(one) or "the backward of an op is wrong, or a value is detached or rounded on its way",
        do="correct the backward (torch.autograd.gradcheck tells), or leave a straight-through estimate out: what is "
        "summarized is what the backward says, not the loss",
    )  # fmt: skip


def _agrees(
    problem: Problem, state: State, batch: Batch, name: str, u: Tensor, claimed: float, measured: dict[str, float]
) -> bool:
    """Whether the difference quotient agrees at either of two distances: between them some ReLU may switch."""
    for h in DISTANCES:
        measured[name], noise = _slope(problem, state, batch, name, u, h)
        if abs(measured[name] - claimed) <= SLOPE * max(abs(measured[name]), abs(claimed)) + 10 * noise:
            return True
    return False


def _slope(problem: Problem, state: State, batch: Batch, name: str, u: Tensor, h: float) -> tuple[float, float]:
    """The central difference along one tensor, and its rounding error."""
    values = []
    with torch.no_grad():
        for sign in (1.0, -1.0):
            moved = {**state.parameters, name: state.parameters[name] + sign * h * u}
            values.append(problem.batch_value(moved, state, batch))
    eps = torch.finfo(values[0].dtype).eps
    return float(values[0] - values[1]) / (2 * h), eps * max(1.0, abs(float(values[0]))) / h


def _like(parameters: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Random numbers of the size of each tensor."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for n, p in parameters.items():
        size = p.square().mean().sqrt() if p.numel() else p.new_tensor(0.0)
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        out[n] = (noise * torch.where(size > 0, size, torch.full_like(size, 0.1))).to(p)
    return out


def _suspects(problem: Problem) -> str:
    """Classes with a backward of their own that the gradient passes through."""
    state = problem.state(dtype=torch.float64, include_frozen=True)
    parameters = {n: p.detach().requires_grad_() for n, p in state.parameters.items()}
    loss = problem.batch_value(parameters, state, problem.cast(problem.first_batch(), torch.float64))
    todo: list[Any] = [loss.grad_fn]
    seen: set[Any] = set()
    found: list[str] = []
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            found.append(type(node).__name__.removesuffix("Backward"))
        todo += [n for n, _ in node.next_functions]
    return f"autograd functions with a backward of their own: {listed(dict.fromkeys(found))}" if found else ""
