"""Small models with their data in float64, and for each an independent f(eta)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hoanalysis.models import LeNet5
from hoanalysis.partitions import Partition
from hoanalysis.problem import Problem
from tests import oracles


@dataclass
class Case:
    """A problem of one batch, a direction, and the oracle's f."""

    model: nn.Module
    batch: tuple[Tensor, Tensor]
    loss: Callable
    oracle_model: nn.Module | None = None  # the same function, with norms written out; None: the model itself

    def problem(self) -> Problem:
        return Problem(self.model, [self.batch], self.loss)

    def parameters(self) -> dict[str, Tensor]:
        return {n: p.detach() for n, p in self.model.named_parameters()}

    def direction(self, seed: int = 7) -> dict[str, Tensor]:
        return oracles.random_like(self.parameters(), seed)

    def partition(self) -> Partition:
        return Partition.canonical(self.model)

    def f(self, direction: dict[str, Tensor], groups: list[list[str]] | None = None) -> Callable[[Tensor], Tensor]:
        groups = groups or [[n] for n in self.parameters()]
        of = oracles.model_loss(self.oracle_model or self.model, *self.batch, self.loss)
        return oracles.along_groups(of, self.parameters(), direction, groups)


class WrittenLayerNorm(nn.Module):
    """LayerNorm from its definition; parameters named as torch names them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        away = x - x.mean(-1, keepdim=True)
        return away / torch.sqrt((away * away).mean(-1, keepdim=True) + 1e-5) * self.weight + self.bias


class NormBlock(nn.Module):
    """x + MLP(LayerNorm(x)), then a linear head."""

    def __init__(self, norm: type[nn.Module], width: int = 6) -> None:
        super().__init__()
        self.norm, self.up = norm(width), nn.Linear(width, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + torch.tanh(self.up(self.norm(x))))


def mlp() -> Case:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.GELU(), nn.Linear(6, 4)).double()
    return Case(model, (torch.randn(9, 5).double(), torch.randint(0, 4, (9,))), F.cross_entropy)


def lenet() -> Case:
    torch.manual_seed(1)
    model = LeNet5().double()
    return Case(model, (torch.randn(3, 1, 32, 32).double(), torch.randint(0, 10, (3,))), F.cross_entropy)


def layer_norm() -> Case:
    torch.manual_seed(2)
    model, written = NormBlock(nn.LayerNorm).double(), NormBlock(WrittenLayerNorm).double()
    with torch.no_grad():
        for p in model.norm.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return Case(model, (torch.randn(8, 6).double(), torch.randint(0, 3, (8,))), F.cross_entropy, written)


CASES = {"mlp": mlp, "lenet": lenet, "layer_norm": layer_norm}
