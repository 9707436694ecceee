"""What every engine takes and gives: the derivatives of one batch with respect to eta, as float64 tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hoanalysis.partitions import Partition


@dataclass(frozen=True)
class Request:
    """Which derivatives of f(eta) = L(theta + sum_s eta_s U^s) are wanted.

    Parameters
    ----------
    order
        The full tensors D^(1) .. D^(order).
    diagonal
        Additionally the diagonal D^(diagonal)[s, .., s], where it is above ``order``.
    """

    order: int
    diagonal: int | None = None

    @property
    def highest(self) -> int:
        return max(self.order, self.diagonal or 0)


@dataclass
class BatchDerivatives:
    """The loss of one batch and its derivatives at eta = 0.

    ``tensors[d]`` has shape (S,)*d, ``diagonals[d]`` shape (S,); float64, on the CPU.
    """

    loss: float
    tensors: dict[int, Tensor] = field(default_factory=dict)
    diagonals: dict[int, Tensor] = field(default_factory=dict)

    def scaled(self, factor: float) -> BatchDerivatives:
        return BatchDerivatives(
            self.loss * factor,
            {d: t * factor for d, t in self.tensors.items()},
            {d: t * factor for d, t in self.diagonals.items()},
        )

    def add(self, other: BatchDerivatives) -> None:
        """Add the derivatives of another part of the same batch in place."""
        self.loss += other.loss
        for mine, theirs in ((self.tensors, other.tensors), (self.diagonals, other.diagonals)):
            for d, t in theirs.items():
                mine[d] = mine[d] + t if d in mine else t


def displaced(
    parameters: Mapping[str, Tensor], direction: Mapping[str, Tensor], partition: Partition, eta: Tensor
) -> dict[str, Tensor]:
    """theta + sum_s eta_s U^s, by parameter name. Differentiable in ``eta`` of shape (S,)."""
    moved = {}
    for name, p in parameters.items():
        a = partition.assignment[name]
        step = eta[a] if isinstance(a, int) else eta[torch.as_tensor(a, device=eta.device)]
        moved[name] = p + step.to(p.dtype) * direction[name]
    return moved
