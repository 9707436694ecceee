"""The nested engine against torch.func's forward mode, against fitted first-order gradients, and on polynomials."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from hoanalysis.derivatives import nested
from hoanalysis.derivatives.common import Request
from hoanalysis.errors import LossError
from hoanalysis.partitions import Partition
from hoanalysis.problem import Problem
from tests import oracles
from tests.cases import CASES, Case

CLOSE = {"rtol": 1e-10, "atol": 1e-13}
ORDER = {"mlp": 4, "lenet": 3, "layer_norm": 4}  # lenet's fourth order: on groups by layer, below


def derivatives(case: Case, u: dict[str, Tensor], partition: Partition, order: int, diagonal: int | None = None):
    problem = case.problem()
    return nested.derivatives(problem, problem.state(), u, partition, case.batch, Request(order, diagonal))


@pytest.mark.parametrize("name", CASES)
def test_every_order_equals_forward_mode(name: str) -> None:
    case, order = CASES[name](), ORDER[name]
    u, partition = case.direction(), case.partition()
    got = derivatives(case, u, partition, order)
    expected = oracles.by_forward_mode(case.f(u), len(partition), order)
    for d in range(1, order + 1):
        torch.testing.assert_close(got.tensors[d], expected[d - 1], **CLOSE)


def test_lenet_fourth_order_by_layer() -> None:
    case = CASES["lenet"]()
    u, partition = case.direction(), Partition.by_layer(case.model)
    got = derivatives(case, u, partition, 4)
    expected = oracles.by_forward_mode(case.f(u, partition.members()), len(partition), 4)
    for d in range(1, 5):
        torch.testing.assert_close(got.tensors[d], expected[d - 1], **CLOSE)


@pytest.mark.parametrize(("order", "diagonal"), [(1, 3), (2, 3), (2, 4), (1, 2), (3, 3), (3, 2)])
def test_diagonal_is_that_of_the_full_tensor(order: int, diagonal: int) -> None:
    case = CASES["layer_norm"]()
    u, partition = case.direction(), case.partition()
    got = derivatives(case, u, partition, order, diagonal).diagonals[diagonal]
    full = oracles.by_forward_mode(case.f(u), len(partition), diagonal)[-1]
    torch.testing.assert_close(got, torch.stack([full[(s,) * diagonal] for s in range(len(partition))]), **CLOSE)


@pytest.mark.parametrize("name", ["mlp", "layer_norm"])
def test_contractions_equal_a_fit_of_first_order_gradients(name: str) -> None:
    case = CASES[name]()
    u, partition = case.direction(), case.partition()
    got = derivatives(case, u, partition, 3)
    c = torch.linspace(-1.3, 0.9, len(partition), dtype=torch.float64)
    fitted = oracles.by_polynomial_fit(case.f(u), c, 3, radius=0.15)
    values = torch.tensor([oracles.contracted(got.tensors[d], c) for d in (1, 2, 3)])
    torch.testing.assert_close(values, fitted, rtol=1e-6, atol=1e-9, check_dtype=False)


@pytest.mark.parametrize("name", CASES)
def test_taylor_terms_are_the_sums_of_all_entries(name: str) -> None:
    case = CASES[name]()
    u, partition = case.direction(), Partition.by_layer(case.model)
    got = derivatives(case, u, partition, 4)
    problem = case.problem()
    loss, terms = nested.taylor(problem, problem.state(), u, case.batch, 4)
    sums = torch.stack([got.tensors[d].sum() for d in range(1, 5)])
    torch.testing.assert_close(torch.tensor(terms, dtype=torch.float64), sums, **CLOSE)
    assert loss == pytest.approx(got.loss, rel=1e-12)


class Polynomial(nn.Module):
    """L = a^2 . b + sum a + 3 (sum c)^3: closed-form derivatives, exactly zero above order 3."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.tensor(v).double()) for v in ([0.3, -1.2], [0.7, 0.4], [0.5]))

    def forward(self, x: Tensor) -> Tensor:
        return (self.a**2 @ self.b + self.a.sum() + 3 * self.c.sum() ** 3) * x.mean()


def test_closed_form_polynomial_and_exact_zeros_above_its_degree() -> None:
    model = Polynomial()
    problem = Problem(model, [torch.ones(2).double()], batch_loss=lambda m, x: m(x), batch_size=len)
    u = {"a": torch.tensor([1.5, -0.4]).double(), "b": torch.tensor([0.2, 2.0]).double(), "c": torch.tensor([-0.8])}
    u["c"] = u["c"].double()
    partition = Partition.canonical(model)
    got = nested.derivatives(problem, problem.state(), u, partition, torch.ones(2).double(), Request(4))
    a, b, c = (p.detach() for p in (model.a, model.b, model.c))
    zero = torch.zeros((), dtype=torch.float64)
    d1 = torch.stack([2 * (a * b) @ u["a"] + u["a"].sum(), a**2 @ u["b"], 9 * c.sum() ** 2 * u["c"].sum()])
    aa, ab, cc = 2 * b @ u["a"] ** 2, 2 * (a * u["a"]) @ u["b"], 18 * c.sum() * u["c"].sum() ** 2
    d2 = torch.stack([torch.stack(r) for r in ([aa, ab, zero], [ab, zero, zero], [zero, zero, cc])])
    d3 = torch.zeros(3, 3, 3, dtype=torch.float64)
    for i in set(itertools.permutations((0, 0, 1))):
        d3[i] = 2 * u["a"] ** 2 @ u["b"]
    d3[2, 2, 2] = 18 * u["c"].sum() ** 3
    for d, expected in ((1, d1), (2, d2), (3, d3)):
        torch.testing.assert_close(got.tensors[d], expected, **CLOSE)
    torch.testing.assert_close(got.tensors[4], torch.zeros(3, 3, 3, 3, dtype=torch.float64), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["detached", "no_grad", "another model"])
@pytest.mark.row("M7")
def test_a_loss_that_ignores_the_parameters_is_refused(kind: str) -> None:
    model, other = nn.Linear(3, 2).double(), nn.Linear(3, 2).double().requires_grad_(False)

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        if kind == "another model":
            return other(x).square().mean()
        if kind == "detached":
            return m(x).square().mean().detach()
        with torch.no_grad():
            return m(x).square().mean()

    problem = Problem(model, [torch.randn(4, 3).double()], batch_loss=loss, batch_size=len)
    state = problem.state()
    with pytest.raises(LossError, match="does not depend on any selected parameter"):
        nested.derivatives(
            problem, state, oracles.random_like(state.parameters, 0), Partition.canonical(model),
            torch.randn(4, 3).double(), Request(2),
        )  # fmt: skip
