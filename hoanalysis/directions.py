"""Directions: u = (U^1..U^S), whole tensors keyed by parameter name. The partition cuts them.

| recipe | u |
|---|---|
| ``gradient`` | the gradient of L over the whole data (or ``Problem.direction_data``), in a first pass of its own |
| ``weights`` | -theta: eta_s = 1 removes group s |
| ``random`` | independent standard normal entries from a recorded seed |
| ``to:init``, ``to:next``, ``to:<file>`` | theta' - theta: eta = 1 replaces a group by its value in that checkpoint |
| ``momentum`` | the momentum buffer of SGD, kept in the checkpoint |
| ``adam`` | Adam's step before its learning rate, m / (sqrt(v) + eps), bias-corrected where its step count is kept |

``to:next`` is the step that training really took, whatever made it: noise of the batch, momentum, weight decay. A file
is looked for beside the run's checkpoints first. Adam's betas and eps are those that the checkpoint records (the entry
``training`` of its metadata, the parameter groups of torch.save), else torch's defaults; the provenance says which. The
decay of AdamW is no part of ``adam``. What a checkpoint lacks for its direction is a `NoDirection`: in a run, a gap.

A mapping name -> tensor is taken as it is, detached; a callable gets (checkpoint, run) and returns such a mapping.

Signs: f moves by +U, and training steps are theta - eta U; so gradient, momentum and adam point uphill.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hoanalysis import culprits, schema
from hoanalysis.checkpoints import Checkpoint, Run, fit_optimizer_state, load_checkpoint
from hoanalysis.errors import DirectionError, LossError, NoDirection, NonFiniteWeights, listed, nearest
from hoanalysis.partitions import describe_parameters
from hoanalysis.problem import Problem, State, naming_batch, tensors_of
from hoanalysis.shards import WHOLE, Shard

NAMES = schema.DIRECTIONS
UPHILL = ("gradient", "momentum", "adam")  # a training step is minus a learning rate times one of these

#: Where the loss is measured along a direction unless told otherwise: multiples of a step, and minus learning rates.
MULTIPLES = (-1.0, -0.5, -0.25, 0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


def default_taus(name: str) -> tuple[float, ...]:
    """The multiples of a direction at which the loss is worth measuring, ascending.

    ``to:next`` arrives at 1 where training did; along a gradient -eta is a step of the learning rate eta.
    """
    return tuple(-r for r in reversed(RATES)) if name in UPHILL else MULTIPLES


Recipe = str | Mapping[str, Tensor] | Callable[[Checkpoint | None, Run | None], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Direction:
    """A direction and where it came from."""

    tensors: dict[str, Tensor]
    name: str
    provenance: dict[str, Any] = field(default_factory=dict)

    def norms(self, partition) -> np.ndarray:
        """|U^s|, shape (S,)."""
        return group_norms(self.tensors, partition)


def group_norms(tensors: Mapping[str, Tensor], partition) -> np.ndarray:
    """The Euclidean norm of each group's entries, shape (S,), accumulated in float64."""
    squares = np.zeros(len(partition))
    for name, t in tensors.items():
        a = partition.assignment[name]
        if isinstance(a, np.ndarray):
            squares += group_sums({name: t.detach().double().square()}, partition)
        else:
            squares[a] += float(torch.linalg.vector_norm(t.detach(), dtype=torch.float64)) ** 2
    return np.sqrt(squares)


def group_sums(tensors: Mapping[str, Tensor], partition) -> np.ndarray:
    """The sum of each group's entries, shape (S,), accumulated in float64."""
    sums = np.zeros(len(partition))
    for name, t in tensors.items():
        a, values = partition.assignment[name], t.detach().double()
        if isinstance(a, np.ndarray):
            sums += np.bincount(a.ravel(), values.cpu().numpy().ravel(), minlength=len(partition))
        else:
            sums[a] += float(values.sum())
    return sums


#: The provenance of a gradient, computed or out of a store.
OF_GRADIENT = {"over": "whole data, first pass"}


def resolve(
    recipe: Recipe,
    problem: Problem,
    state: State,
    *,
    checkpoint: Checkpoint | None = None,
    run: Run | None = None,
    seed: int = 0,
    shards: Sequence[Shard] = (WHOLE,),
    progress: Callable[[Iterator], Iterator] = iter,
) -> Direction:
    """The direction that a recipe describes at ``state``; ``shards`` are those that a gradient is summed over.

    Raises
    ------
    DirectionError
        Where it does not fit the parameters or is not finite; `NoDirection` where it is zero or this checkpoint lacks
        what it is made from.
    LossError
        Where the gradient is asked for and the loss depends on no selected parameter.
    """
    provenance: dict[str, Any] = {}
    if isinstance(recipe, str):
        name = recipe
        tensors, provenance = _named(recipe, problem, state, checkpoint, run, seed, shards, progress)
    elif isinstance(recipe, Mapping):
        name, tensors = "custom", dict(recipe)
    elif callable(recipe):
        name, tensors = getattr(recipe, "__name__", "custom"), recipe(checkpoint, run)
        if not isinstance(tensors, Mapping):
            raise DirectionError(
                f"the direction {name!r} gave a {type(tensors).__name__}, not a mapping of names to tensors",
                do="return {name: tensor} for every parameter",
            )
    else:
        raise DirectionError(
            f"a direction is a name, a mapping or a callable, not {type(recipe).__name__}", do=f"use {listed(NAMES)}"
        )
    checked = _checked(tensors, state, name)
    if name not in NAMES:
        provenance = {**provenance, "digest": digest(checked)}
    return Direction(checked, name, provenance)


def _named(recipe, problem, state, checkpoint, run, seed, shards, progress):
    theta = state.parameters
    if recipe == "gradient":
        return gradient(problem.of_direction(), state, shards, progress), dict(OF_GRADIENT)
    if recipe == "weights":
        return {n: -p for n, p in theta.items()}, {}
    if recipe == "random":
        g = torch.Generator().manual_seed(seed)
        return {n: torch.randn(p.shape, generator=g, dtype=torch.float64).to(p) for n, p in theta.items()}, {
            "seed": seed
        }
    if recipe.startswith("to:"):
        other = _destination(recipe[3:], checkpoint, run)
        try:
            fitted = problem.fitted(other)
        except NonFiniteWeights as error:
            raise NoDirection(
                "the checkpoint that the direction leads to is not finite", where=error.where, why=error.why
            ) from error
        return {n: fitted[n].to(p) - p for n, p in theta.items()}, {"to_sha256": other.sha256}
    if recipe in ("momentum", "adam"):
        return _from_optimizer(recipe, checkpoint, problem, theta)
    raise DirectionError(f"there is no direction named {recipe!r}", do=nearest(recipe, [*NAMES, "to:<file>"]))


@dataclass(frozen=True)
class Part:
    """Of the gradient over the data: sum_b w_b g_b over the batches of a shard (for sums over the data, of the g_b) in
    float64, and sum_b w_b."""

    sums: dict[str, Tensor]
    weight: float

    def plus(self, other: Part) -> Part:
        return Part({n: t + other.sums[n] for n, t in self.sums.items()}, self.weight + other.weight)


def gradient(
    problem: Problem,
    state: State,
    shards: Sequence[Shard] = (WHOLE,),
    progress: Callable[[Iterator], Iterator] = iter,
) -> dict[str, Tensor]:
    """The gradient of L at ``state`` over the data, accumulated in float64, in the dtype of the parameters."""
    return joined((part_of_gradient(problem, state, shard, progress) for shard in shards), problem, state)


def part_of_gradient(
    problem: Problem, state: State, shard: Shard, progress: Callable[[Iterator], Iterator] = iter
) -> Part:
    """What a shard of the data adds to the gradient."""
    total = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in state.parameters.items()}
    weight = 0.0
    for w, grads in batch_gradients(problem, state, shard, progress):
        for n, g in grads.items():
            total[n] += g.double() * (1.0 if problem.reduction == "sum" else w)
        weight += w
    return Part(total, weight)


def joined(parts: Iterable[Part], problem: Problem, state: State) -> dict[str, Tensor]:
    """The gradient from the parts of all shards. Their order fixes its last bits."""
    whole = functools.reduce(Part.plus, parts)
    scale = 1.0 if problem.reduction == "sum" else 1 / whole.weight
    return {n: (t * scale).to(state.parameters[n].dtype) for n, t in whole.sums.items()}


def of_parts(parts: Sequence[Part], problem: Problem, state: State) -> Direction:
    """The direction ``"gradient"`` from its parts, as `resolve` gives it."""
    return Direction(_checked(joined(parts, problem, state), state, "gradient"), "gradient", dict(OF_GRADIENT))


def batch_gradients(
    problem: Problem,
    state: State,
    shard: Shard = WHOLE,
    progress: Callable[[Iterator], Iterator] = iter,
) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """The weight and the gradient of every batch, without the parameters that it does not use."""
    leaves = {n: p.detach().requires_grad_() for n, p in state.parameters.items()}
    for index, raw in enumerate(progress(problem.batches(shard.stop, shard.first)), shard.first):
        with naming_batch(index):
            batch = problem.cast(raw, state.dtype)
            loss = problem.batch_value(leaves, state, batch)
            if not loss.requires_grad:
                raise LossError(
                    "the loss does not depend on any selected parameter",
                    why="it was computed under no_grad, detached, or by another copy of the model",
                    do="let the loss use the model that it is given, and keep it attached",
                )
            try:
                grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            except RuntimeError as error:
                again = functools.partial(problem.batch_value, leaves, state, batch)
                raise culprits.of_backward(error, again, f"batch {index}") from error
            if not all(math.isfinite(t.detach().sum()) for t in (loss, *grads) if t is not None):
                culprits.refuse_nonfinite(tensors_of(batch), index)
        yield problem.size(raw), {n: g for n, g in zip(leaves, grads, strict=True) if g is not None}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and bytes."""
    h = hashlib.sha256()
    for name, t in tensors.items():
        h.update(f"{name}{t.dtype}{tuple(t.shape)}".encode())
        h.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()


def _destination(which: str, checkpoint: Checkpoint | None, run: Run | None) -> Checkpoint:
    if which not in ("init", "next"):
        return load_checkpoint(file_of(which, run))
    if run is None or checkpoint is None:
        raise DirectionError(
            f"the direction 'to:{which}' needs a run of checkpoints",
            do="call ho.summarize_run(run, problem, ...), or use 'to:<file>'",
        )
    if which == "init":
        return run[0]
    if checkpoint.path not in run.paths:
        raise DirectionError("the checkpoint is not one of the run", where=str(checkpoint.path), why=f"it is {run}")
    position = run.paths.index(checkpoint.path)
    if position + 1 == len(run):
        raise NoDirection(LAST, where=str(checkpoint.path), do="use 'to:<file>' or another direction for it")
    return run[position + 1]


LAST = "the last checkpoint of a run has no next one"


def file_of(which: str, run: Run | None) -> Path:
    """The file of ``to:<file>``: beside the run's checkpoints where it is there, else as it is written."""
    beside = Path(run.paths[0]).parent / which if run is not None and len(run) else Path(which)
    return beside if beside.exists() else Path(which)


def _from_optimizer(
    kind: str, checkpoint: Checkpoint | None, problem: Problem, theta: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    have = {} if checkpoint is None else _optimizer_state(checkpoint, problem)
    need = ("momentum_buffer",) if kind == "momentum" else ("exp_avg", "exp_avg_sq")
    missing = [k for k in need if k not in have]
    if missing:
        raise NoDirection(
            f"the direction {kind!r} needs the optimizer state {listed(missing)}",
            where=str(checkpoint.path) if checkpoint is not None else "no checkpoint was given",
            why=f"the checkpoint keeps {listed(have) if have else 'no optimizer state'}",
            do="save it as optimizer.<state>.<parameter>, or use 'gradient' or 'to:next'",
        )
    for k in need:
        if lacking := [n for n in theta if n not in have[k]]:
            raise DirectionError(f"the optimizer state {k!r} lacks {listed(lacking)}")
    if kind == "momentum":
        return {n: have["momentum_buffer"][n].to(p) for n, p in theta.items()}, {}
    assert checkpoint is not None
    return _adam(theta, have, settings := _adam_settings(checkpoint)), settings


def _adam(
    theta: Mapping[str, Tensor], have: Mapping[str, Mapping[str, Tensor]], settings: Mapping[str, Any]
) -> dict[str, Tensor]:
    """m / (sqrt(v) + eps), with m and v bias-corrected; of AMSGrad, v is the largest so far."""
    (beta1, beta2), out = settings["betas"], {}
    for n, p in theta.items():
        m, v = have["exp_avg"][n].double(), have["exp_avg_sq"][n].double()
        v = have.get("max_exp_avg_sq", {}).get(n, v).double()
        if n in have.get("step", {}):
            t = float(have["step"][n])
            m, v = m / (1 - beta1**t), v / (1 - beta2**t)
        out[n] = (m / (v.sqrt() + settings["eps"])).to(p)
    return out


def _adam_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """``betas`` and ``eps`` as the checkpoint records them, torch's defaults for what it does not, and which is so."""
    try:
        recorded = json.loads(checkpoint.metadata.get("training", "{}"))["optimizer"]
    except (ValueError, KeyError, TypeError):
        recorded = {}
    recorded = recorded if isinstance(recorded, Mapping) else {}
    betas, eps = recorded.get("betas", ()), recorded.get("eps")
    known = isinstance(betas, list) and len(betas) == 2 and all(isinstance(b, (int, float)) for b in betas)
    source = {True: "the checkpoint", False: "torch's defaults"}
    return {
        "betas": [float(b) for b in betas] if known else [0.9, 0.999],
        "eps": float(eps) if isinstance(eps, (int, float)) else 1e-8,
        "betas_from": source[known],
        "eps_from": source[isinstance(eps, (int, float))],
    }


def _optimizer_state(checkpoint: Checkpoint, problem: Problem) -> dict[str, dict[str, Tensor]]:
    """State name -> parameter name -> tensor, tied parameters under the model's first name for them."""
    known, _ = describe_parameters(problem.model, include_frozen=True)
    first = {other: n for n, info in known.items() for other in (n, *info.aliases)}
    held = fit_optimizer_state(checkpoint, {other: known[n].shape for other, n in first.items()})
    return {k: {first[n]: t for n, t in tensors.items()} for k, tensors in held.items()}


def _checked(tensors: Mapping[str, Any], state: State, name: str) -> dict[str, Tensor]:
    theta = state.parameters
    if unknown := [n for n in tensors if n not in theta]:
        raise DirectionError(
            f"the direction names parameters that are not differentiated: {listed(unknown)}",
            do=nearest(unknown[0], theta),
        )
    if missing := [n for n in theta if n not in tensors]:
        raise DirectionError(
            f"the direction lacks the parameters {listed(missing)}", do="give zeros for those that should not move"
        )
    out = {}
    for n, p in theta.items():
        t = tensors[n]
        if not isinstance(t, Tensor) or t.shape != p.shape:
            got = f"has shape {tuple(t.shape)}" if isinstance(t, Tensor) else f"is a {type(t).__name__}"
            raise DirectionError(f"the direction of {n!r} {got}, the parameter has shape {tuple(p.shape)}")
        t = t.detach().to(p)
        # a sum is finite only where all entries are; one that overflows is looked into
        if not math.isfinite(t.sum()) and (bad := int((~torch.isfinite(t)).sum())):
            raise DirectionError(
                f"the direction of {n!r} has {bad} entries that are not finite",
                do="look at the loss and the weights of this checkpoint",
            )
        out[n] = t
    if all(not bool(t.any()) for t in out.values()):
        raise NoDirection(
            f"the direction {name!r} is zero everywhere",
            why="every summary would be zero" + (": this is a critical point" if name == "gradient" else ""),
            do="use another direction, for instance 'weights' or 'random'",
        )
    return out
