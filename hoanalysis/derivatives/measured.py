"""The loss measured where the summaries predict it: along the direction, and with whole groups moved by their U^s.

    change_along[tau]          L(theta + tau u) - L(theta)
    change_removed[s]          L(theta + U^s) - L(theta)              u = weights: group s is really removed
    change_removed_pair[s,t]   L(theta + U^s + U^t) - L(theta)        on the diagonal: s alone
    change_path[q]             L(theta + t_q u) - L(theta)            at the nodes t_q of a quadrature over 0..1
    slope_path[q,s]            U^s . gradient L(theta + t_q u)

Forward passes, and for the last two a gradient at each node: what each group did to the loss along the step is the
integral of its slope (`hoanalysis.analysis.path`). The change is taken batch by batch, so that its standard error is
that of paired differences, which is far smaller than that of either loss. A loss that overflows is kept as inf or NaN:
that is what was measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hoanalysis import schema
from hoanalysis.derivatives.chunks import chunks
from hoanalysis.derivatives.engines import Engine, Task
from hoanalysis.directions import group_sums
from hoanalysis.problem import Batch

#: What can be measured, and the names of the quantities that hold it.
MEASURES = {
    "along": (schema.CHANGE_ALONG,),
    "removed": (schema.CHANGE_REMOVED,),
    "pairs": (schema.CHANGE_REMOVED_PAIR,),
    "path": (schema.CHANGE_PATH, schema.SLOPE_PATH),
}


@dataclass(frozen=True)
class Measure:
    """Which losses to measure; ``taus`` are the multiples of u for ``along``, ``nodes`` those for ``path``."""

    what: tuple[str, ...] = ()
    taus: tuple[float, ...] = ()
    nodes: tuple[float, ...] = ()


NOTHING = Measure()


def forward_passes(measure: Measure, groups: int) -> int:
    """Forward passes of one batch; a gradient counts as three."""
    what = set(measure.what)
    count = 1 + len(measure.taus) * ("along" in what) + groups * bool({"removed", "pairs"} & what)
    return count + groups * (groups - 1) // 2 * ("pairs" in what) + 3 * len(measure.nodes) * ("path" in what)


def measured(engine: Engine, measure: Measure, batch: Batch) -> dict[str, np.ndarray]:
    """The changes of the loss of one batch (already cast): quantity -> (tau,), (S,), (S, S), (node,) or
    (node, S).

    A batch is cut into the chunks that the engine would take, and into none where the loss couples its samples.
    """
    if not measure.what:
        return {}
    total: dict[str, np.ndarray] = {}
    for part, share in chunks(engine, batch):
        changes = _changes(engine.task, measure, part)
        total = {k: total.get(k, 0.0) + share * v for k, v in changes.items()}
    return total


def _changes(task: Task, measure: Measure, batch: Batch) -> dict[str, np.ndarray]:
    groups = range(len(task.partition))
    here = _loss(task, task.state.parameters, batch)
    out: dict[str, np.ndarray] = {}
    if "along" in measure.what:
        losses = [_loss(task, _along(task, tau), batch) for tau in measure.taus]
        out[schema.CHANGE_ALONG] = np.array(losses) - here
    if {"removed", "pairs"} & set(measure.what):
        alone = np.array([_loss(task, _moved(task, (s,)), batch) for s in groups]) - here
    if "removed" in measure.what:
        out[schema.CHANGE_REMOVED] = alone
    if "pairs" in measure.what:
        pairs = np.diag(alone)
        for s, t in itertools.combinations(groups, 2):
            pairs[s, t] = pairs[t, s] = _loss(task, _moved(task, (s, t)), batch) - here
        out[schema.CHANGE_REMOVED_PAIR] = pairs
    if "path" in measure.what:
        losses, slopes = zip(*[_sloped(task, node, batch) for node in measure.nodes], strict=True)
        out[schema.CHANGE_PATH], out[schema.SLOPE_PATH] = np.array(losses) - here, np.stack(slopes)
    return out


def _sloped(task: Task, node: float, batch: Batch) -> tuple[float, np.ndarray]:
    """The loss at theta + node u, and U^s . gradient of each group there, shape (S,); NaN as in `_loss`."""
    leaves = {n: p.detach().requires_grad_() for n, p in _along(task, node).items()}
    try:
        loss = task.problem.batch_value(leaves, task.state, batch)
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    except torch.linalg.LinAlgError:
        return float("nan"), np.full(len(task.partition), np.nan)
    products = {n: g * task.direction[n] for n, g in zip(leaves, gradients, strict=True) if g is not None}
    return float(loss.detach()), group_sums(products, task.partition)


def _along(task: Task, tau: float) -> dict[str, Tensor]:
    return {n: p + tau * task.direction[n] for n, p in task.state.parameters.items()}


def _moved(task: Task, groups: Sequence[int]) -> dict[str, Tensor]:
    """theta + the sum of U^s over ``groups``; what is not in them is theta itself, to the last bit."""
    moved = dict(task.state.parameters)
    for n, p in task.state.parameters.items():
        inside = np.isin(task.partition.assignment[n], groups)
        if inside.all():
            moved[n] = p + task.direction[n]
        elif inside.any():
            moved[n] = torch.where(torch.as_tensor(inside, device=p.device), p + task.direction[n], p)
    return moved


def _loss(task: Task, parameters: Mapping[str, Tensor], batch: Batch) -> float:
    """The loss of one batch; NaN where a decomposition in the model does not exist at these parameters."""
    try:
        with torch.no_grad():
            return float(task.problem.batch_value(parameters, task.state, batch).detach())
    except torch.linalg.LinAlgError:
        return float("nan")
