"""The engine against nested reverse mode, in float64: every architecture, loss and kind of partition."""

import time

import pytest
import torch

from hoanalysis.derivatives.common import Request
from hoanalysis.derivatives.tangents import attention, capture
from hoanalysis.derivatives.tangents.shares import shared_out
from hoanalysis.partitions import Partition
from tests.derivatives.cases_tangents import ARCHITECTURES, LOSSES, Case, loss_case, nested


@pytest.fixture(autouse=True)
def double():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these networks are too small for more
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """To 1e-10 of the largest entry: an entry that is zero up to rounding has no relative error of its own."""
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10 * max(1e-30, float(expected.abs().max())))


def compare(case: Case, partition: Partition | None = None) -> None:
    problem, state, u, canonical = case.ready()
    partition = partition or canonical
    c = torch.randn(len(partition))
    first, second, third = nested(problem, state, u, partition, case.batch, c)
    program = capture(problem, state, case.batch)
    full = program.derivatives(state, u, partition, case.batch, Request(3))
    streamed = program.derivatives(state, u, partition, case.batch, Request(2, diagonal=3))
    program.check(problem, state, u, partition, case.batch)
    for result in (full, streamed):
        close(result.tensors[1], first)
        close(result.tensors[2], second)
    D3 = full.tensors[3]
    close(D3 @ c, third)
    close(D3.transpose(0, 2), D3)
    close(D3.transpose(0, 1), D3)
    close(streamed.diagonals[3], torch.einsum("iii->i", D3))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name):
    compare(ARCHITECTURES[name]())


@pytest.mark.parametrize("tile", [2**20, 800])
@pytest.mark.parametrize("kind", ["canonical", "layer", "split"])
@pytest.mark.parametrize(
    "name", ["vit", "gpt tied", "cross attention", "gated attention", "masked in full", "masked in full, added"]
)
def test_attention_tile_by_tile(name, kind, tile, monkeypatch):
    """Taken together whatever its size, in one tile a head and in several, with groups in any order."""
    calls, stream = [], attention.stream

    def recorded(*args):
        calls.append(1)
        return stream(*args)

    monkeypatch.setattr(attention, "WORTH", 0)
    monkeypatch.setattr(attention, "TILE", tile)
    monkeypatch.setattr(attention, "stream", recorded)
    case = ARCHITECTURES[name]()
    patterns = {n: (0, 3) for n, p in case.model.named_parameters() if p.shape[0] % 3 == 0}
    build = {"layer": Partition.by_layer, "split": lambda m: Partition.split(m, patterns)}
    compare(case, build[kind](case.model) if kind in build else None)
    assert calls


@pytest.mark.parametrize("name", ["gpt tied", "cross attention"])
def test_attention_shared_among_threads(name, monkeypatch):
    """Exact, the same bits at every call, and torch's threads are put back."""
    monkeypatch.setattr(attention, "WORTH", 0)
    torch.set_num_threads(3)
    case = ARCHITECTURES[name]()
    compare(case)
    problem, state, u, partition = case.ready()
    program = capture(problem, state, case.batch)
    calls = [program.derivatives(state, u, partition, case.batch, Request(2, diagonal=3)) for _ in range(5)]
    for again in calls[1:]:
        torch.testing.assert_close(again.tensors[2], calls[0].tensors[2], rtol=0, atol=0)
        torch.testing.assert_close(again.diagonals[3], calls[0].diagonals[3], rtol=0, atol=0)
    assert torch.get_num_threads() == 3


def test_shares_keep_order_and_settings():
    """Results in the order of the pieces, gradients off inside as outside, errors raised, threads put back."""

    def work(pieces):
        assert not torch.is_grad_enabled()
        assert torch.get_num_threads() == 1
        time.sleep(0.02 * (2 in pieces))  # the first share is the last to end
        return [10 * i for i in pieces]

    torch.set_num_threads(3)
    with torch.no_grad():
        assert shared_out(work, range(1, 8), torch.device("cpu")) == [10, 20, 30, 40, 50, 60, 70]
        with pytest.raises(ZeroDivisionError):
            shared_out(lambda pieces: [1 // (i - 6) for i in pieces], range(1, 8), torch.device("cpu"))
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    compare(loss_case(name))


def test_a_count_divides_in_the_dtype_of_the_loss():
    """One over a count is of torch's default dtype, in which a third is known to eight digits."""
    case = loss_case("over a count")
    problem, state, u, partition = case.ready()
    c = torch.randn(len(partition))
    torch.set_default_dtype(torch.float32)
    first, second, _ = nested(problem, state, u, partition, case.batch, c)
    found = capture(problem, state, case.batch).derivatives(state, u, partition, case.batch, Request(2))
    close(found.tensors[1], first)
    close(found.tensors[2], second)


@pytest.mark.parametrize("name", ["mlp tanh", "vit", "gpt tied", "tied", "resnet"])
@pytest.mark.parametrize("kind", ["layer", "kind", "trivial", "split"])
def test_partitions(name, kind):
    case = ARCHITECTURES[name]()

    patterns = {n: (0, 3) for n, p in case.model.named_parameters() if p.shape[0] % 3 == 0}
    build = {
        "layer": Partition.by_layer,
        "kind": Partition.by_kind,
        "trivial": Partition.trivial,
        "split": lambda m: Partition.split(m, patterns),
    }[kind]
    compare(case, build(case.model))
