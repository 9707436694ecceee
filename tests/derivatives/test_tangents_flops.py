"""Counted operations: VGG-11' near its floors, and the growth with S on deep tanh networks."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from hoanalysis.derivatives.common import Request
from hoanalysis.derivatives.tangents import capture
from hoanalysis.models import MLP, VGG11Prime
from hoanalysis.partitions import Partition
from hoanalysis.problem import Problem


def counts(model: torch.nn.Module, batch: tuple, requests: list[Request]) -> tuple[float, list[float]]:
    """Floating-point operations of a gradient, and of each request."""
    problem = Problem(model, [batch], loss=F.cross_entropy)
    state = problem.state()
    u = {n: torch.randn_like(p) for n, p in state.parameters.items()}
    program = capture(problem, state, batch)

    def counted(f) -> float:
        with FlopCounterMode(display=False) as counter:
            f()
        return counter.get_total_flops()

    leaves = {n: p.detach().requires_grad_() for n, p in state.parameters.items()}
    gradient = counted(lambda: problem.batch_value(leaves, state, batch).backward())
    partition = Partition.canonical(model)
    return gradient, [counted(lambda r=r: program.derivatives(state, u, partition, batch, r)) for r in requests]


def test_vgg_is_near_its_floors():
    """Floors from the active sets: D2 11.3 F, full D3 36.6 F, with F one forward pass."""
    torch.manual_seed(0)
    batch = (torch.randn(2, 3, 32, 32), torch.randint(0, 10, (2,)))
    gradient, (second, both, third) = counts(VGG11Prime(), batch, [Request(2), Request(2, diagonal=3), Request(3)])
    first = 2 * 2 * 64 * 27 * 32 * 32  # the first layer's input has no gradient
    forward = (gradient + first) / 3
    assert second / forward <= 1.15 * 11.3
    assert third / forward <= 1.25 * 36.6
    assert both == second  # x_aa = 0 in a ReLU network that uses each weight once


def test_order_four_takes_a_third_order_for_each_group():
    """D4 against D3: S times the passes, over graphs of three times the products; nested takes S^3 / 6 gradients."""
    torch.manual_seed(0)
    for depth in (3, 6):
        model = MLP([64] * depth + [10], "tanh")
        batch = (torch.randn(64, 64), torch.randint(0, 10, (64,)))
        _, (third, fourth, diagonal) = counts(model, batch, [Request(3), Request(4), Request(3, 4)])
        groups = 2 * depth
        assert fourth - third <= 3.5 * groups * third
        assert diagonal - third <= 3.5 * 5 * third


def test_growth_with_the_number_of_groups():
    """tanh, width 128, batch 256, depth 4 to 32: S^1.15 or slower for D2, S^1.7 or slower for D3, in gradients."""
    torch.manual_seed(0)
    cost = {}
    for depth in (4, 32):
        model = MLP([128] * depth + [10], "tanh")
        batch = (torch.randn(256, 128), torch.randint(0, 10, (256,)))
        gradient, found = counts(model, batch, [Request(2), Request(3)])
        cost[depth] = [f / gradient for f in found]
    slopes = [math.log(b / a) / math.log(8) for a, b in zip(cost[4], cost[32], strict=True)]
    assert slopes[0] <= 1.15
    assert slopes[1] <= 1.7


@pytest.mark.parametrize("request_", [Request(2), Request(3)], ids=["D2", "D3"])
def test_predicted_operations_follow_the_counted(request_):
    """Within a factor of two on a network of matrix products, where elementwise passes matter little."""
    torch.manual_seed(0)
    batch = (torch.randn(2, 3, 32, 32), torch.randint(0, 10, (2,)))
    model = VGG11Prime(width=0.5)
    _, (counted,) = counts(model, batch, [request_])
    problem = Problem(model, [batch], loss=F.cross_entropy)
    program = capture(problem, problem.state(), batch)
    predicted = program.costs(Partition.canonical(model), request_).flops
    assert 0.5 < predicted / counted < 2
