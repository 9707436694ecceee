"""How the data act on the summaries through the direction: what makes standard errors unconditional.

With u = scale * g, the gradient over the same batches, D^(d)(u) moves with every batch twice: as one of those that
D^(d) is a mean over, and as one of those that u is made from. To first order the second adds, for block k of batches,

    E_k[s1..sd] = sum_j D^(d)[s1, .., s_j <- delta_k, .., sd],    delta_k = scale * (g_k - g)

the derivative over the whole data with one slot filled by the deviation of the block's gradient, group by group. The
errors of D + E over the blocks are unconditional: sum_k w_k E_k = 0 leaves every mean as it is, and a jackknife over
the blocks carries them to whatever is derived. For D1 it is E_k = delta_k^s . g^s, so that the error doubles. scale is
1 for means, and the total weight for sums over the data.

The derivative of sorted D^(d-1)[s1..s_(d-1)] with respect to theta is a vector of P numbers, dotted with all delta_k at
once: C(S+d-2, d-1) backward passes a batch (S for D2), by nested reverse mode. Memory: K vectors of P numbers.
Source: the infinitesimal jackknife (Jaeckel 1972), here with u recomputed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hoanalysis import schema
from hoanalysis.derivatives.chunks import chunks
from hoanalysis.derivatives.common import Request
from hoanalysis.derivatives.engines import Engine, Task
from hoanalysis.derivatives.primitives import primitive_operations
from hoanalysis.directions import batch_gradients
from hoanalysis.errors import ArgumentError
from hoanalysis.problem import Batch
from hoanalysis.shards import Shard
from hoanalysis.units import Accumulator

Bar = Callable[[Iterator[Any]], Iterator[Any]]


def influence(
    engine: Engine, sums: Accumulator, max_batches: int | None = None, progress: Bar = iter
) -> dict[str, np.ndarray]:
    """w_k E_k for every derivative in ``sums``: quantity -> (K, S, ..), K the blocks that ``sums`` keeps.

    ``sums`` must hold all the batches that the direction, the gradient, was computed from.
    """
    task = engine.task
    problem, request = task.problem, task.request
    if problem.direction_data is not None:
        raise ArgumentError(
            "errors='unconditional' follow the data through the direction, and it has data of its own",
            do="leave out errors='unconditional', or direction_data (direction_samples in a study)",
        )
    deviations = _deviations(task, sums, max_batches)
    slots: dict[int, Any] = dict.fromkeys(range(1, request.order + 1), 0.0)
    diagonal: Any = 0.0
    for raw in progress(problem.batches(max_batches)):
        batch, weight = problem.cast(raw, task.state.dtype), problem.size(raw)
        for part, share in chunks(engine, batch):
            found = _Slots(task, deviations).of(part)
            factor = share * (1.0 if problem.reduction == "sum" else weight) / sums.weight
            slots = {d: slots[d] + factor * found.full[d] for d in slots}
            diagonal = diagonal + factor * found.diagonal
    weights = sums.block_weights()
    values = {schema.derivative(d): _symmetrized(s.numpy()) for d, s in slots.items()}
    if request.diagonal is not None and request.diagonal > request.order:
        values[schema.diagonal(request.diagonal)] = request.diagonal * diagonal.numpy()
    return {k: (v.T * weights).T for k, v in values.items()}


def _symmetrized(slot: np.ndarray) -> np.ndarray:
    """Sum over the places of the filled slot, which stands last: (K, S, .., S)."""
    return sum(np.moveaxis(slot, -1, j) for j in range(1, slot.ndim))  # type: ignore[return-value]


def _deviations(task: Task, sums: Accumulator, max_batches: int | None) -> dict[str, Tensor]:
    """delta_k of every parameter, shape (K, *shape), in its dtype."""
    problem, weights = task.problem, torch.as_tensor(sums.block_weights())
    totals = {n: torch.zeros((len(weights), *p.shape), dtype=torch.float64) for n, p in task.state.parameters.items()}
    for index, (weight, gradients) in enumerate(batch_gradients(problem, task.state, Shard(0, max_batches))):
        for n, g in gradients.items():
            totals[n][sums.block_of(index)] += g.double().cpu() * (1.0 if problem.reduction == "sum" else weight)
    scale = sums.weight if problem.reduction == "sum" else 1.0
    out = {}
    for n, total in totals.items():
        means = total / weights.reshape(-1, *[1] * (total.dim() - 1))
        out[n] = (scale * (means - total.sum(0) / sums.weight)).to(task.state.parameters[n])
    return out


@dataclass
class _Found:
    full: dict[int, Tensor]  # d -> (K, S, .., S), the filled slot last
    diagonal: Tensor  # (K, S)


class _Slots:
    """One batch: D^(d)[s1, .., s_(d-1), delta_k^r] for all k and r, depth first over sorted s1 <= .. <= s_(d-1).

    v[s1..sk] = grad_theta D^(k)[s1..sk] gives both the next order, D^(k+1)[s1..sk, t] = v^t . U^t, and the filled
    slots, v^r . delta_k^r.
    """

    def __init__(self, task: Task, deviations: dict[str, Tensor]) -> None:
        self.task, self.deviations = task, deviations
        self.request: Request = task.request
        self.groups, self.blocks = len(task.partition), len(next(iter(deviations.values())))

    def of(self, batch: Batch) -> _Found:
        task, s = self.task, self.groups
        self.leaves = {n: p.detach().requires_grad_() for n, p in task.state.parameters.items()}
        self.full = {
            d: torch.zeros((self.blocks, *(s,) * d), dtype=torch.float64) for d in range(1, self.request.order + 1)
        }
        self.diagonal = torch.zeros(self.blocks, s, dtype=torch.float64)
        with primitive_operations():
            loss = task.problem.batch_value(self.leaves, task.state, batch)
        self._descend(loss, ())
        return _Found(self.full, self.diagonal)

    def _descend(self, entry: Tensor, prefix: tuple[int, ...]) -> None:
        """``entry`` is D^(k)[prefix], k = len(prefix), as a function of theta."""
        d = len(prefix) + 1
        if not entry.requires_grad:  # a polynomial below this degree
            return
        vector = self._gradient(entry, keep_graph=d < self.request.highest)
        if d <= self.request.order:
            dotted = self._dotted(vector)
            for index in set(itertools.permutations(prefix)):
                self.full[d].movedim(0, -2)[index] = dotted
        elif d == self.request.highest:
            self.diagonal[:, prefix[0]] = self._dotted(vector)[:, prefix[0]]
        if d == self.request.highest:
            return
        for t in range(prefix[-1] if prefix else 0, self.groups):
            if d < self.request.order or all(s == t for s in prefix):
                self._descend(self._along(vector, t), (*prefix, t))

    def _gradient(self, entry: Tensor, keep_graph: bool) -> dict[str, Tensor]:
        values = torch.autograd.grad(
            entry, list(self.leaves.values()), create_graph=keep_graph, retain_graph=True, allow_unused=True
        )
        return {n: v for n, v in zip(self.leaves, values, strict=True) if v is not None}

    def _along(self, vector: dict[str, Tensor], t: int) -> Tensor:
        """v^t . U^t, as a function of theta."""
        total = torch.zeros((), dtype=torch.float64)
        for n, v in vector.items():
            inside = np.asarray(self.task.partition.assignment[n] == t)
            if inside.any():
                u = self.task.direction[n]
                masked = u if inside.all() else u * torch.as_tensor(inside, device=u.device)
                total = total + (v * masked).sum().double().cpu()
        return total

    def _dotted(self, vector: dict[str, Tensor]) -> Tensor:
        """v^r . delta_k^r, shape (K, S)."""
        out = torch.zeros(self.blocks, self.groups, dtype=torch.float64)
        for n, v in vector.items():
            delta, a = self.deviations[n], self.task.partition.assignment[n]
            if isinstance(a, np.ndarray):
                terms = (delta * v.detach()).reshape(self.blocks, -1).double().cpu()
                out.index_add_(1, torch.as_tensor(a.ravel(), dtype=torch.long), terms)
            else:
                out[:, a] += (delta.reshape(self.blocks, -1) @ v.detach().reshape(-1)).double().cpu()
        return out
