"""Logits that the streaming sweep takes by tiles, against nested reverse mode in float64; and which are left alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from hoanalysis.derivatives.common import Request
from hoanalysis.derivatives.tangents import capture, logits
from hoanalysis.partitions import Partition
from tests.derivatives.cases_tangents import ARCHITECTURES, Case, loss_case, nested
from tests.derivatives.test_tangents import close, compare, double  # noqa: F401 - a fixture

WORDS, WIDTH = 150, 6  # of 64 words a tile at least: two and a rest


@pytest.fixture(params=[(2**10, 2**22), (12, 1)], ids=["one tile", "tiles"])
def taken(request, monkeypatch) -> list[int]:
    """Take logits by tiles whatever their size; a list that grows with every time that it is done."""
    calls, stream = [], logits.stream

    def recorded(*args):
        calls.append(1)
        return stream(*args)

    monkeypatch.setattr(logits, "WORTH", 0)
    monkeypatch.setattr(logits, "TALL", request.param[0])
    monkeypatch.setattr(logits, "TILE", request.param[1])
    monkeypatch.setattr(logits, "stream", recorded)
    return calls


class Words(nn.Module):
    """Tokens to logits by one tanh layer, with a head of some kind."""

    def __init__(self, head: str = "linear") -> None:
        super().__init__()
        self.embedding, self.inner = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS)
        self.matrix = nn.Parameter(torch.randn(WIDTH, WORDS) / 3)
        self.size = nn.Parameter(torch.randn(WORDS))
        self.second = nn.Linear(WIDTH, WORDS, bias=False)
        self.kind = head
        if head == "frozen":
            self.head.requires_grad_(False)

    def features(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.inner(self.embedding(tokens)))

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.features(tokens)
        if self.kind == "tied":
            return F.linear(h, self.embedding.weight)
        if self.kind == "tied, transposed":
            return h @ self.embedding.weight.T
        if self.kind == "matrix":
            return h @ self.matrix
        if self.kind == "rescaled":  # the matrix has second tangents of its own
            return F.linear(h, self.head.weight * self.size.exp()[:, None], self.head.bias * self.size)
        return self.head(h)


HEADS = ("linear", "tied", "tied, transposed", "matrix", "rescaled", "frozen")


def flat(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), y.flatten())


def shifted(z: Tensor, y: Tensor) -> Tensor:
    """The next token, with masked ones."""
    return F.cross_entropy(z[:, :-1].reshape(-1, WORDS), torch.where(y[:, 1:] % 3 == 0, -100, y[:, 1:]).flatten())


def classes_second(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.transpose(1, 2), y, label_smoothing=0.1)


def picked(z: Tensor, y: Tensor) -> Tensor:
    """By hand, without the mean; some rows of the logits are not used."""
    return -F.log_softmax(z[1], -1).gather(-1, y[1][:, None]).sum()


LOSSES = {f.__name__: f for f in (flat, shifted, classes_second, picked)}


def case(head: str = "linear", loss: Callable = flat) -> Case:
    model = Words(head)
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return Case(model, (torch.randint(0, WORDS, (2, 5)), torch.randint(0, WORDS, (2, 5))), loss)


@pytest.mark.parametrize("head", HEADS)
def test_heads(head, taken):
    compare(case(head))
    assert taken


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_of_tokens(loss, taken):
    compare(case("tied", LOSSES[loss]))
    assert taken


@pytest.mark.parametrize(
    "name", ["ignore_index", "class weights", "label smoothing", "smoothing, weights", "probabilities", "sum", "nll"]
)
def test_losses_of_classes(name, taken):
    compare(loss_case(name))
    assert taken


@pytest.mark.parametrize("kind", ["trivial", "layer", "split"])
@pytest.mark.parametrize("head", ["tied", "rescaled"])
def test_partitions(head, kind, taken):
    """Also a matrix that is cut among groups."""
    this = case(head)
    build = {
        "trivial": Partition.trivial,
        "layer": Partition.by_layer,
        "split": lambda m: Partition.split(m, {"embedding.weight": (0, 3), "head.weight": (1, 2)}),
    }
    compare(this, build[kind](this.model))
    assert taken


@pytest.mark.parametrize("name", ["gpt tied", "vit"])
def test_architectures(name, taken):
    compare(ARCHITECTURES[name]())
    assert taken


class Beside(Words):
    """Logits, and features that the loss uses as well."""

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.features(tokens)
        return self.head(h), self.second(h), h


def with_penalty(z: tuple, y: Tensor) -> Tensor:
    return flat(z[0], y) + 0.1 * z[2].square().mean()


def two_heads(z: tuple, y: Tensor) -> Tensor:
    return 0.7 * flat(z[0], y) + 0.3 * flat(z[1], y.roll(1, 1))


@pytest.mark.parametrize(("loss", "times"), [(with_penalty, 1), (two_heads, 2)])
def test_more_than_one_term(loss, times, taken):
    this = case(loss=loss)
    this.model = Beside()
    compare(this)
    assert len(taken) == 2 * times  # the streaming sweep of `compare`, and that of D1 in its check


def test_order_one(taken):
    """D1 alone takes the adjoint of the features, and no adjoint above them."""
    for head in HEADS:
        this = case(head)
        problem, state, u, partition = this.ready()
        first, _, _ = nested(problem, state, u, partition, this.batch, torch.randn(len(partition)))
        before = len(taken)
        found = capture(problem, state, this.batch).derivatives(state, u, partition, this.batch, Request(1))
        close(found.tensors[1], first)
        assert set(found.tensors) == {1}
        assert len(taken) > before


def soft_cap(z: Tensor, y: Tensor) -> Tensor:
    return flat(3 * torch.tanh(z / 3), y)


def perplexity(z: Tensor, y: Tensor) -> Tensor:
    return flat(z, y).exp()


def with_normalizer(z: Tensor, y: Tensor) -> Tensor:
    return flat(z, y) + 0.1 * z.logsumexp(-1).square().mean()


def over_tokens(z: Tensor, y: Tensor) -> Tensor:
    return -z.log_softmax(1).gather(-1, y[..., None]).mean()


@pytest.mark.parametrize("loss", [soft_cap, perplexity, with_normalizer, over_tokens])
def test_left_alone(loss, taken):
    """Curved between the logits and log-softmax or below it, logits used twice, another axis."""
    compare(case("tied", loss))
    assert not taken


def peak(call: Callable[[], object]) -> int:
    """The most bytes that are held at one time in tensors made by the call, by torch's own record of allocations."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(itertools.accumulate(e.nbytes() for e in events))


def test_no_stack_of_logits(monkeypatch):
    """Neither formed nor predicted, so that the peak is less; below `WORTH` it is formed."""
    model = nn.Sequential(nn.Embedding(1200, 4), *[nn.Linear(4, 4) for _ in range(19)], nn.Tanh(), nn.Linear(4, 1200))
    tokens = torch.randint(0, 1200, (40,))
    problem, state, u, partition = Case(model, (tokens, tokens), F.cross_entropy).ready()
    program, stack = capture(problem, state, (tokens, tokens)), 8 * len(partition) * 40 * 1200
    monkeypatch.setattr(logits, "TILE", 2**20)
    held, predicted = [], []
    for worth in (0, 2**40):
        monkeypatch.setattr(logits, "WORTH", worth)
        for request in (Request(1), Request(2), Request(2, 3)):
            call = partial(program.derivatives, state, u, partition, (tokens, tokens), request)
            held.append(peak(call) / stack)
            predicted.append(program.costs(partition, request).bytes / stack)
    assert max(held[:3]) < 0.7
    assert min(held[3:]) > 1
    assert max(predicted[:3]) < 0.5
    assert min(predicted[3:]) > 1
