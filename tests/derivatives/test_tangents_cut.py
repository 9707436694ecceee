"""Branches that the loss does not feel: detached, under no_grad, compared, rounded, used as indices, unused."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hoanalysis as ho
from tests import oracles


class Cut(nn.Module):
    """tanh of one layer, modified by another one and a scale in a way that only values pass."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.felt, self.cut, self.scale = nn.Linear(4, 3), nn.Linear(4, 3), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.felt(x))
        if self.kind == "no_grad":
            with torch.no_grad():
                factor = torch.tanh(self.cut(x))
            return y * factor
        z = self.cut(x) * self.scale
        if self.kind == "detached":
            return y * torch.sigmoid(z).detach()
        if self.kind == "compared":
            return torch.where(torch.tanh(z) > 0, y, self.scale)
        if self.kind == "largest":
            return y * z.argmax(1, keepdim=True)
        if self.kind == "rounded":
            return y + torch.round(torch.exp(z))
        if self.kind == "index":
            return torch.gather(y * self.scale, 1, z.long().clamp(0, 2))
        if self.kind == "straight through":
            return y + (torch.sign(z * y) - y).detach() * torch.exp(self.scale)
        return y


KINDS = ["no_grad", "detached", "compared", "largest", "rounded", "index", "straight through", "unused"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_branch_that_only_passes_values_is_evaluated_and_has_no_derivatives(kind: str) -> None:
    torch.manual_seed(0)
    model = Cut(kind).double()
    problem = ho.Problem(model, [(torch.randn(6, 4).double(), torch.randint(0, 3, (6,)))], F.cross_entropy)
    u = oracles.random_like(dict(model.named_parameters()), 4)
    asked = {"direction": u, "progress": False, "self_check": False}
    ours = ho.summarize(problem, 3, engine="tangents", **asked)
    streamed = ho.summarize(problem, 2, diagonal=3, engine="tangents", **asked)
    nested = ho.summarize(problem, 3, engine="nested", **asked)
    for d in (1, 2, 3):
        expected = torch.as_tensor(nested[f"D{d}"].values)
        torch.testing.assert_close(torch.as_tensor(ours[f"D{d}"].values), expected, rtol=1e-10, atol=1e-12)
    diagonal = torch.einsum("iii->i", torch.as_tensor(nested["D3"].values))
    torch.testing.assert_close(torch.as_tensor(streamed["D3_diag"].values), diagonal, rtol=1e-10, atol=1e-12)
