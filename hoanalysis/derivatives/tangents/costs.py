"""What a request costs on a captured graph, from shapes and active sets alone: floating-point operations and memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from hoanalysis.derivatives.common import Request
from hoanalysis.derivatives.tangents import logits
from hoanalysis.derivatives.tangents.attention import Attention, find
from hoanalysis.derivatives.tangents.graph import Graph, Node
from hoanalysis.derivatives.tangents.groups import Groups, common, union
from hoanalysis.derivatives.tangents.logits import Logits
from hoanalysis.derivatives.tangents.rules.product import Product

#: One elementwise pass over a tensor is bound by memory traffic; this many operations of a matrix product take as long.
PASS = 12.0


@dataclass(frozen=True)
class Cost:
    """Predicted cost of one request on one batch.

    Attributes
    ----------
    flops
        Two per multiply-add, elementwise passes weighted by the memory traffic they cost.
    gradients
        The same in units of one gradient, taken as three forward passes.
    bytes
        Peak memory of the sweeps beyond the model and the batch.
    """

    flops: float
    gradients: float
    bytes: float


def active(graph: Graph, leaves: Mapping[int, Groups]) -> dict[int, Groups]:
    """The groups upstream of every live node."""
    found: dict[int, Groups] = dict(leaves)
    for n in graph.live_nodes():
        groups: Groups = ()
        for i in n.sources.values():
            groups = union(groups, found[i])
        found[n.index] = groups
    return found


def tiled_attentions(graph: Graph, groups: Mapping[int, Groups]) -> list[Attention]:
    """The attentions that the streaming sweep takes tile by tile."""
    return [a for a in find(graph) if a.pays(len(groups[a.output.index]))]


def tiled_logits(graph: Graph, groups: Mapping[int, Groups]) -> list[Logits]:
    """The logits that the streaming sweep takes tile by tile."""
    return [h for h in logits.find(graph) if h.pays(len(groups[h.product.index]))]


def bent(graph: Graph, groups: Mapping[int, Groups]) -> dict[int, Groups]:
    """The groups whose second tangent can differ from zero at every live node: empty in plain ReLU networks."""
    found: dict[int, Groups] = {}
    for n in graph.live_nodes():
        mine: Groups = ()
        for i in n.sources.values():
            mine = union(mine, found.get(i, ()))
        if n.curved:
            sources = [groups[i] for i in n.sources.values()]
            own = common(*sources[:2]) if _is_product(n) and len(sources) > 1 else groups[n.index]
            mine = union(mine, own)
        found[n.index] = mine if n.feeds_curved else ()
    return found


#: How much longer the graph of a directional derivative is: two products and one value for each product.
GROWTH = 3.0


def predict(graph: Graph, leaves: Mapping[int, Groups], size: int, request: Request) -> Cost:
    """The cost of ``request``; ``leaves`` gives each parameter node's groups, ``size`` is S."""
    low = Request(min(request.order, 3), request.diagonal if (request.diagonal or 0) <= 3 else None)
    parts = [_to_third(graph, leaves, size, low)]
    for d in range(4, request.order + 1):
        n = d - 3
        third = _to_third(graph, leaves, size, Request(3))
        parts.append(_times(third, math.comb(size + n - 1, n) * GROWTH**n, GROWTH**n))
    if (d := request.diagonal or 0) > max(request.order, 3):
        alone = _to_third(graph, {i: (0,) for i in leaves}, 1, Request(2, 3))
        parts.append(_times(alone, size * GROWTH ** (d - 3), GROWTH ** (d - 3)))
    return Cost(sum(p.flops for p in parts), sum(p.gradients for p in parts), max(p.bytes for p in parts))


def _times(cost: Cost, work: float, memory: float) -> Cost:
    return Cost(cost.flops * work, cost.gradients * work, cost.bytes * memory)


def _to_third(graph: Graph, leaves: Mapping[int, Groups], size: int, request: Request) -> Cost:
    groups = active(graph, leaves)
    second = bent(graph, groups) if request.diagonal == 3 and request.order < 3 else {}
    cut_off: set[int] = set()  # by no tangent
    if request.order < 3 and (heads := tiled_logits(graph, groups)):
        inner = {n.index for h in heads for n in h.inner}
        cut_off = logits.below(graph, heads) - inner
        groups |= dict.fromkeys(cut_off, ())
        second |= dict.fromkeys(cut_off, ())
    base = flops = 0.0
    for n in graph.live_nodes():
        N, k = _numel(n), len(groups[n.index])
        one = _pass(n)
        base += one
        flops += one * (1 + n.needs_adjoint)
        if n.index not in cut_off:
            flops += sum(one * len(groups[i]) for i in n.sources.values())
        flops += one * len(second.get(n.index, ()))
        if n.curved:
            flops += _contraction(graph, n, groups, request, size)
        if request.order >= 3 and n.needs_adjoint:
            flops += one * size * sum(graph.nodes[i].needs_adjoint for i in n.sources.values())
        if len(n.sources) > 1:
            flops += PASS * k * N
    peak = _full_bytes(graph, groups, size) if request.order >= 3 else _stream_bytes(graph, groups, second)
    return Cost(flops, flops / (3 * base) if base else math.inf, peak)


def _contraction(graph: Graph, n: Node, groups: Mapping[int, Groups], request: Request, size: int) -> float:
    sources = list(n.sources.values())
    if _is_product(n) and len(sources) > 1:
        (a, ka), (b, kb) = ((_numel(graph.nodes[i]), len(groups[i])) for i in sources[:2])
        one = _pass(n)
        cost = min(kb * one + 2 * ka * kb * a, ka * one + 2 * ka * kb * b)
        if request.order >= 3:
            triples = 2 * size * ka * kb
            cost += min(
                min(ka, kb) * max(ka, kb) * one + triples * _numel(n),
                size * kb * one + triples * a,
                size * ka * one + triples * b,
            )
        return cost
    N, k = _numel(graph.nodes[sources[0]]), len(groups[sources[0]])
    cost = (2 * k * k + 2 * PASS * k) * N
    if request.order >= 3:
        per_pair = 2 * size + PASS
        cost += k * k / 2 * N * (2 if n.rule is not None and n.rule.kind == "normalization" else per_pair)
    return cost


def _stream_bytes(graph: Graph, groups: Mapping[int, Groups], second: Mapping[int, Groups]) -> float:
    """Values, adjoints, the stacks still to be used, and temporaries as large as the node's own stacks.

    An attention that is taken tile by tile has no stacks inside, and holds its inputs until its output is there; logits
    that are have none at all.
    """
    base = 3 * sum(_bytes(n) for n in graph.live_nodes())
    held: dict[int, float] = {}
    peak = 0.0
    tiled = {n.index: a for a in tiled_attentions(graph, groups) for n in (*a.inner, a.output)}
    heads = tiled_logits(graph, groups)
    products = {h.product.index for h in heads}
    cut_off = logits.below(graph, heads)
    for n in graph.live_nodes():
        if n.index in cut_off:
            continue
        if (a := tiled.get(n.index)) is not None:
            if n is a.output:
                mine = (len(groups[n.index]) + len(second.get(n.index, ()))) * _bytes(n)
                peak = max(peak, sum(held.values()) + 2 * mine)
                held[n.index] = mine
                for i in a.sources:
                    if tiled.get(graph.last_live_use[i]) is a:
                        held.pop(i, None)
            continue
        mine = (len(groups[n.index]) + len(second.get(n.index, ()))) * _bytes(n)
        inputs = [held.get(i, 0.0) for i in n.sources.values()]
        in_blocks = n.rule is not None and n.rule.kind == "scalar"
        temporary = 2 * max(inputs, default=0.0) if n.curved and not in_blocks else 0.0
        if n.index in products:  # the weight's adjoint, and a copy of the features
            mine, temporary = 0.0, 2 * max(inputs)
        peak = max(peak, sum(held.values()) + max(2 * mine, mine + temporary, temporary))
        held[n.index] = mine
        for i in n.sources.values():
            if graph.last_live_use[i] == n.index:
                held.pop(i, None)
    return base + peak


def _full_bytes(graph: Graph, groups: Mapping[int, Groups], size: int) -> float:
    """Every tangent that the reverse sweep needs, the frontier of adjoint tangents, and temporaries."""
    base = 4 * sum(_bytes(n) for n in graph.live_nodes())
    kept = {i for n in graph.live_nodes() if n.curved for i in n.sources.values() if graph.nodes[i].op is not None}
    tangents = {i: len(groups[i]) * _bytes(graph.nodes[i]) for i in kept}
    frontier: dict[int, float] = {}
    peak = 0.0
    for n in reversed(list(graph.live_nodes())):
        if n.needs_adjoint:
            mine = size * _bytes(n) if n.index in frontier else 0.0
            below = [size * _bytes(graph.nodes[i]) for i in n.sources.values() if graph.nodes[i].needs_adjoint]
            temporary = 2 * max([mine, *below]) if n.curved else max([0.0, *below])
            peak = max(peak, sum(tangents.values()) + sum(frontier.values()) + mine + temporary)
            frontier.pop(n.index, None)
            for i in n.sources.values():
                if graph.nodes[i].needs_adjoint:
                    parts = 2 if n.curved else 1
                    frontier[i] = frontier.get(i, 0.0) + parts * size * _bytes(graph.nodes[i])
        tangents.pop(n.index, None)
    return base + peak


def _is_product(n: Node) -> bool:
    return n.rule is not None and issubclass(n.rule, Product)


def _numel(n: Node) -> float:
    return float(math.prod(n.shape or ()))


def _bytes(n: Node) -> float:
    return _numel(n) * (n.dtype.itemsize if n.dtype is not None else 4)


def _pass(n: Node) -> float:
    """One application of a node: the multiply-adds of a matrix product, or one elementwise pass."""
    return max(2 * n.work, PASS * _numel(n))
