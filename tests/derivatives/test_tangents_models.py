"""The engine on what users bring, against nested reverse mode, in float64; and how it is used from outside."""

import numpy as np
import pytest
import torch
from torch import nn

import hoanalysis as ho
from hoanalysis.derivatives import nested as nested_engine
from hoanalysis.derivatives.common import Request
from hoanalysis.derivatives.tangents import capture
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
