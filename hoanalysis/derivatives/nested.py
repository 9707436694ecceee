"""The engine ``nested``: the paper's recursion, any order, by nested reverse mode with norms in primitives.

    f(eta) = L(theta + sum_s eta_s U^s),  D^(1)[s] = d f / d eta_s,      D^(k+1)[s1..sk, t] = d/d eta_t D^(k)[s1..sk]

One backward pass with respect to eta in R^S gives a whole row over t, so D^(d) takes S^(d-1) passes, restricted here to
sorted s1 <= .. <= s_(d-1). Source: Section 2 and Appendix A of the paper (arXiv 2312.03885). It needs nothing of the
model but differentiability, which makes it the reference and the last resort.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from hoanalysis.derivatives.common import BatchDerivatives, Request, displaced
from hoanalysis.derivatives.primitives import primitive_operations
from hoanalysis.errors import LossError
from hoanalysis.partitions import Partition
from hoanalysis.problem import Batch, Problem, State


def derivatives(
    problem: Problem,
    state: State,
    direction: Mapping[str, Tensor],
    partition: Partition,
    batch: Batch,
    request: Request,
) -> BatchDerivatives:
    """The loss of one batch and its D^(1) .. D^(order), and the diagonal, at eta = 0.

    Raises
    ------
    LossError
        Where the loss depends on no selected parameter.
    """
    eta = torch.zeros(len(partition), dtype=torch.float64, requires_grad=True)
    with primitive_operations():
        loss = problem.batch_value(displaced(state.parameters, direction, partition, eta), state, batch)
    if not loss.requires_grad:
        raise LossError(
            "the loss does not depend on any selected parameter",
            why="it was computed under no_grad, detached, or by another copy of the model",
            do="let the loss use the model that it is given, and keep it attached",
        )
    return _Recursion(eta, request).run(loss)


def predicted_gradients(groups: int, request: Request) -> float:
    """The cost in gradients: about two for each backward pass, over graphs that the passes before have lengthened.

    Two is the lowest that was measured on LeNet-5, an MLP and a GPT, so that the comparison with another engine is in
    favour of this one.
    """
    order = request.order
    passes = sum(math.comb(groups + k - 1, k) for k in range(order))
    passes += sum(groups for _ in range(order, request.highest))
    return 2.0 * passes


class _Recursion:
    """Walks the sorted index tuples depth first, so that the graph of a row is freed when its subtree is done."""

    def __init__(self, eta: Tensor, request: Request) -> None:
        self.eta, self.request, self.groups = eta, request, len(eta)
        s = self.groups
        self.sorted = {d: torch.zeros((s,) * d, dtype=torch.float64) for d in range(1, request.order + 1)}
        self.diagonal = torch.zeros(s, dtype=torch.float64)

    def run(self, loss: Tensor) -> BatchDerivatives:
        self._descend(self._row(loss, self.request.highest > 1), ())
        out = BatchDerivatives(float(loss.detach()), {d: _symmetrized(t) for d, t in self.sorted.items()})
        d = self.request.diagonal
        if d is not None:
            above = d > self.request.order
            out.diagonals[d] = self.diagonal if above else diagonal_of(out.tensors[d])
        return out

    def _descend(self, row: Tensor, prefix: tuple[int, ...]) -> None:
        """``row`` is D^(k)[prefix, :] with k - 1 = len(prefix); keep its sorted part and differentiate it further."""
        k, start = len(prefix) + 1, prefix[-1] if prefix else 0
        self.sorted[k][prefix][start:] = row.detach()[start:]
        for t in range(start, self.groups):
            constant = all(s == t for s in prefix)
            if k < self.request.order:
                deeper = k + 1 < self.request.order or (constant and k + 1 < self.request.highest)
                self._descend(self._row(row[t], deeper), (*prefix, t))
            elif constant and k < self.request.highest:
                self.diagonal[t] = self._along(row[t], t, self.request.highest - k)

    def _along(self, entry: Tensor, t: int, times: int) -> Tensor:
        for left in range(times, 0, -1):
            entry = self._row(entry, left > 1)[t]
        return entry.detach()

    def _row(self, entry: Tensor, keep_graph: bool) -> Tensor:
        return gradient_row(entry, self.eta, keep_graph)


def gradient_row(entry: Tensor, variable: Tensor, keep_graph: bool) -> Tensor:
    """d entry / d variable; exact zeros where ``entry`` is constant in it (a polynomial below the order)."""
    if not entry.requires_grad:
        return torch.zeros_like(variable)
    (row,) = torch.autograd.grad(entry, variable, create_graph=keep_graph, retain_graph=True, allow_unused=True)
    return torch.zeros_like(variable) if row is None else row


def taylor(
    problem: Problem, state: State, direction: Mapping[str, Tensor], batch: Batch, order: int
) -> tuple[float, list[float]]:
    """The loss of one batch, and d^k/dt^k of t -> L(theta + t u) at t = 0 for k = 1..order (the paper's Appendix A)."""
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    moved = {n: p + t.to(p.dtype) * direction[n] for n, p in state.parameters.items()}
    with primitive_operations():
        loss = problem.batch_value(moved, state, batch)
    terms, value = [], loss
    for k in range(order):
        value = gradient_row(value, t, k + 1 < order)
        terms.append(float(value.detach()))
    return float(loss.detach()), terms


def diagonal_of(tensor: Tensor) -> Tensor:
    """The entries [s, .., s] of a cubical tensor."""
    s = torch.arange(tensor.shape[0])
    return tensor[(s,) * tensor.dim()]


def _symmetrized(values: Tensor) -> Tensor:
    """The symmetric tensor whose entries at sorted indices are given."""
    if values.dim() < 2:
        return values
    index = torch.cartesian_prod(*[torch.arange(n) for n in values.shape]).sort(dim=1).values
    return values[tuple(index.T)].reshape(values.shape)
