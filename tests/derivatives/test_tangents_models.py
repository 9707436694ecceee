"""The engine on what users bring, against nested reverse mode, in float64; and how it is used from outside."""

import contextlib

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils import checkpoint as checkpointing

import hoanalysis as ho
from hoanalysis.derivatives import nested as nested_engine
from hoanalysis.derivatives.common import Request
from hoanalysis.derivatives.tangents import capture
from hoanalysis.errors import ModelError
from hoanalysis.partitions import Partition
from tests.derivatives.cases_models import MODELS, Recurrent, ready
from tests.derivatives.cases_tangents import nested


@pytest.fixture(autouse=True)
def double():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """To 1e-10 of the largest entry."""
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    problem, state, u, partition, batch = ready(name)
    c = torch.randn(len(partition))
    first, second, third = nested(problem, state, u, partition, batch, c)
    program = capture(problem, state, batch)
    full = program.derivatives(state, u, partition, batch, Request(3))
    streamed = program.derivatives(state, u, partition, batch, Request(2, diagonal=3))
    program.check(problem, state, u, partition, batch, full)
    for result in (full, streamed):
        close(result.tensors[1], first)
        close(result.tensors[2], second)
    close(full.tensors[3] @ c, third)
    close(streamed.diagonals[3], torch.einsum("iii->i", full.tensors[3]))


@pytest.mark.parametrize("name", MODELS)
def test_order_four_of_models(name):
    problem, state, u, _, batch = ready(name)
    partition = Partition.blocks(problem.model, 2)
    fourth = nested_engine.derivatives(problem, state, u, partition, batch, Request(4)).tensors[4]
    program = capture(problem, state, batch)
    close(program.derivatives(state, u, partition, batch, Request(4)).tensors[4], fourth)


@pytest.mark.parametrize("name", ["lstm", "gru", "experts", "llama", "contrastive", "messages"])
def test_the_engine_is_used_and_agrees_from_outside(name):
    problem, _, u, _, _ = ready(name)
    tangents, other = (ho.summarize(problem, 3, direction=u, engine=e, progress=False) for e in ("tangents", "nested"))
    assert tangents.engine.item() == "tangents"
    for d in ("D1", "D2", "D3"):
        np.testing.assert_allclose(tangents[d], other[d], rtol=1e-9, atol=1e-10 * float(abs(other[d]).max()))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_in_single_precision(kind):
    """torch takes other kernels there, that can be differentiated once only."""
    torch.set_default_dtype(torch.float32)
    model = Recurrent(kind)
    problem = ho.Problem(model, [(torch.randn(3, 6, 3), torch.tensor([0, 4, 2]))], nn.functional.cross_entropy)
    single = ho.summarize(problem, 3, engine="tangents", direction="weights", progress=False)
    exact = ho.summarize(problem, 3, engine="nested", direction="weights", dtype="float64", progress=False)
    for d in ("D1", "D2", "D3"):
        np.testing.assert_allclose(single[d], exact[d], rtol=1e-3, atol=1e-5 * float(abs(exact[d]).max()))


# ---- what must not be silently wrong ------------------------------------------------------------------------------


def classes(n: int = 6) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(n, 4), torch.randint(0, 3, (n,))) for _ in range(3)]


def the_same(a, b, *names: str) -> None:
    for d in names or ("D1", "D2"):
        np.testing.assert_allclose(a[d], b[d], rtol=1e-9, atol=1e-11 * float(abs(b[d]).max()), err_msg=d)


class Checkpointed(nn.Module):
    """A block that torch may compute again in the backward pass."""

    def __init__(self, again: bool | None) -> None:
        super().__init__()
        self.first, self.norm, self.last, self.again = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3), again

    def block(self, x):
        return self.norm(self.first(x)).tanh()

    def forward(self, x):
        if self.again is None:
            return self.last(self.block(x))
        return self.last(checkpointing.checkpoint(self.block, x, use_reentrant=self.again))


@pytest.mark.parametrize("engine", ["tangents", "nested"])
@pytest.mark.parametrize("again", [True, False])
@pytest.mark.row("M5")
def test_activation_checkpointing_at_other_weights_than_the_models_own(again, engine):
    """The backward pass computes the block again when the weights that were put in are gone."""
    plain, model = Checkpointed(None), Checkpointed(again)
    weights = {n: p.detach() + 0.7 * torch.randn_like(p) for n, p in model.named_parameters()}
    data = classes()
    problems = [ho.Problem(m, data, loss=nn.functional.cross_entropy) for m in (model, plain)]
    got, expected = (ho.summarize(p, 3, checkpoint=weights, engine=engine, progress=False) for p in problems)
    assert got.engine.item() == engine
    the_same(got, expected, "D1", "D2", "D3")
    with checkpointing_untouched():
        x = torch.randn(2, 4, requires_grad=True)
        model(x).sum().backward()


@contextlib.contextmanager
def checkpointing_untouched():
    """torch's own checkpointing is as it was before."""
    assert checkpointing.CheckpointFunction.__name__ == "CheckpointFunction"
    assert "_checkpoint_without_reentrant_generator" in str(checkpointing._checkpoint_without_reentrant_generator)
    yield


def test_a_mode_or_number_that_changes_between_calls_is_seen():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
            self.beta = 1.0

        def forward(self, x):
            return self.beta * self.net(x)

    model, data = Scaled(), classes(40)
    model.net[1].running_mean += 1.0
    problem = ho.Problem(model, data, loss=nn.functional.cross_entropy)

    def both(**options):
        fresh = ho.Problem(model, data, loss=nn.functional.cross_entropy)
        return (ho.summarize(p, 2, engine="tangents", progress=False, **options) for p in (problem, fresh))

    model.eval()
    the_same(*both(memory=60_000))  # in chunks
    model.train()
    the_same(*both(memory=60_000))  # whole: the samples are coupled
    model.beta = 3.0
    the_same(*both())
    the_same(*both(self_check=False))


def test_dropout_that_is_switched_on_between_calls_is_refused():
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3)).eval()
    problem = ho.Problem(model, classes(), loss=nn.functional.cross_entropy)
    ho.summarize(problem, 1, progress=False)
    model.train()
    with pytest.raises(ModelError, match="dropout is active"):
        ho.summarize(problem, 1, progress=False)


def test_a_self_check_that_is_no_number_makes_the_numbers_suspect():
    class Sinc(nn.Module):
        """torch's second derivative of sinc at 0 is NaN in reverse mode, and a wrong number in another."""

        def __init__(self):
            super().__init__()
            self.w, self.last = nn.Parameter(torch.tensor([0.0, 0.7, -0.4])), nn.Linear(3, 3)

        def forward(self, x):
            return self.last(torch.sinc(x * self.w))

    problem = ho.Problem(Sinc(), [(torch.randn(6, 3), torch.randint(0, 3, (6,)))], loss=nn.functional.cross_entropy)
    direction = {n: torch.ones_like(p) for n, p in problem.model.named_parameters()}
    ds = ho.summarize(problem, 2, direction=direction, engine="tangents", progress=False)
    assert ds.attrs["suspect"] == 1


@pytest.mark.parametrize("name", ["hardsigmoid", "transposed"])
@pytest.mark.row("M4")
def test_what_nested_cannot_differentiate_is_not_self_checked(name):
    """The numbers are those of the tangents engine alone, and the note says so. Against differences of gradients."""
    torch.set_num_threads(1)
    model = {
        "hardsigmoid": nn.Sequential(nn.Linear(4, 6), nn.Hardsigmoid(), nn.Linear(6, 3), nn.Tanh()),
        "transposed": nn.Sequential(
            nn.Unflatten(1, (1, 2, 2)), nn.ConvTranspose2d(1, 2, 3, 2, 1, output_padding=1), nn.Tanh(), nn.Flatten(),
            nn.Linear(32, 3),
        ),
    }[name]  # fmt: skip
    problem = ho.Problem(model, classes()[:1], loss=nn.functional.cross_entropy)
    state, u = problem.state(), {n: torch.randn_like(p) for n, p in model.named_parameters()}
    ds = ho.summarize(problem, 3, direction=u, partition="trivial", progress=False)
    assert ds.engine.item() == "tangents"
    assert ds.attrs["suspect"] == 0

    def slope(t: float) -> float:
        leaves = {n: (p + t * u[n]).requires_grad_() for n, p in state.parameters.items()}
        loss = problem.batch_value(leaves, state, problem.first_batch())
        grads = torch.autograd.grad(loss, list(leaves.values()))
        return float(sum((g * v).sum() for g, v in zip(grads, u.values(), strict=True)))

    h = 1e-3
    second = (8 * (slope(h) - slope(-h)) - (slope(2 * h) - slope(-2 * h))) / (12 * h)
    np.testing.assert_allclose(ds.D2.item(), second, rtol=1e-7)


def test_a_loss_that_is_read_in_the_call():
    def loss(x, y):
        value = nn.functional.cross_entropy(x, y)
        assert bool(torch.isfinite(value))
        return value if value.item() < 3 else 2 * value

    problem = ho.Problem(nn.Linear(4, 3), classes(), loss=loss, batch_size=lambda b: len(b[0]))
    the_same(*(ho.summarize(problem, 2, engine=e, progress=False) for e in ("tangents", "nested")))


def test_a_minimum_is_no_reason_to_refuse():
    """Where the samples' gradients cancel, D1 is rounding and its sign is anyone's."""
    model, (x, y) = nn.Linear(4, 1), (torch.randn(30, 4), torch.randn(30, 1))
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(30, 1)], 1), y).solution
    model.load_state_dict({"weight": solution[:4].T, "bias": solution[4]})
    problem = ho.Problem(model, [(x, y)], loss=nn.functional.mse_loss)
    ds = ho.summarize(problem, 2, direction="weights", engine="tangents", progress=False)
    assert ds.engine.item() == "tangents"
    assert float(abs(ds.D1).max()) < 1e-10


class Table(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.table, self.head = nn.Embedding(7, 4, **options), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.table(x).tanh().sum(1))


@pytest.mark.parametrize("options", [{"padding_idx": 2}, {"sparse": True}])
def test_tables_with_padding_and_sparse_gradients(options):
    """torch gives the padding row no gradient, although the forward pass reads it."""
    data = [(torch.randint(0, 7, (6, 3)), torch.randint(0, 3, (6,)))]
    problem = ho.Problem(Table(**options), data, loss=nn.functional.cross_entropy)
    the_same(*(ho.summarize(problem, 2, direction="weights", engine=e, progress=False) for e in ("tangents", "nested")))


def test_a_table_scaled_by_frequency_is_refused():
    data = [(torch.randint(0, 7, (6, 3)), torch.randint(0, 3, (6,)))]
    problem = ho.Problem(Table(scale_grad_by_freq=True), data, loss=nn.functional.cross_entropy)
    with pytest.raises(ModelError, match="frequency"):
        ho.summarize(problem, 2, engine="tangents", progress=False)


@pytest.mark.row("M4")
def test_what_torch_cannot_differentiate_twice_is_named():
    def loss(x, y):
        return torch.cdist(x, x[:2]).mean()

    problem = ho.Problem(nn.Linear(4, 3), classes(), loss=loss, batch_size=lambda b: len(b[0]))
    with pytest.raises(ModelError, match="differentiated 3 times"):
        ho.summarize(problem, 3, engine="nested", progress=False)


def test_each_checkpoint_is_compared_once_without_the_self_check():
    """A weight that is read behind torch's back is a constant of the first checkpoint's graph."""

    class Behind(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.last(nn.functional.linear(self.first(x).tanh(), self.first.weight.data))

    problem = ho.Problem(Behind(), classes(), loss=nn.functional.cross_entropy)
    ho.summarize(problem, 2, self_check=False, progress=False)
    other = {n: p.detach() * 1.5 for n, p in problem.model.named_parameters()}
    got = ho.summarize(problem, 2, checkpoint=other, self_check=False, progress=False)
    the_same(got, ho.summarize(problem, 2, checkpoint=other, engine="nested", progress=False))
