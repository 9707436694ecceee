"""The graph of a directional derivative, of which orders above three are made.

With g(theta) = d/dt L(theta + t U^s) at t = 0, the derivatives of g are those of L with one index more:

    D^(d)[s, ..] of L = D^(d-1)[..] of g,

so that D4 takes S full third orders, and D^(d) takes S^(d-3) of them: O(S^(d-2)) passes. The graph of g is made from
the graph of L by the chain rule, node by node, with the same three kinds of node in it; it can be differentiated again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hoanalysis.derivatives.tangents import sweeps
from hoanalysis.derivatives.tangents.capture import Builder
from hoanalysis.derivatives.tangents.graph import Graph, Key, Node, Ref, TangentsUnsupported, flatten_inputs, substitute
from hoanalysis.derivatives.tangents.groups import Sums
from hoanalysis.derivatives.tangents.rules import Local, Stack, linear, normalize, product, rule, scalar, softmax
from hoanalysis.derivatives.tangents.rules.base import operand, replaced
from hoanalysis.derivatives.tangents.rules.generic import Generic

aten = torch.ops.aten


def directional(graph: Graph, inputs: list[Tensor]) -> Graph:
    """The graph of the derivative along tangents of the parameters, which are its last inputs, in their order.

    ``inputs`` are some values of the graph's own inputs: the builder evaluates as it goes.
    """
    parameters = [n for n in graph.nodes[: graph.n_inputs] if n.parameter is not None]
    seeds = [torch.zeros_like(inputs[n.index]) for n in parameters]
    b = Builder([*inputs, *seeds], [str(n.parameter) for n in parameters])
    value: list[Any] = [Ref(i) for i in range(graph.n_inputs)] + [None] * (len(graph.nodes) - graph.n_inputs)
    dot = {n.index: Ref(graph.n_inputs + i) for i, n in enumerate(parameters)}
    for n in graph.nodes[graph.n_inputs :]:
        if n.op is None:
            value[n.index] = b.constant(graph.constants[n.index]) if n.index in graph.constants else None
            continue
        args, kwargs = substitute(n.args, value), substitute(n.kwargs, value)
        value[n.index] = out = b.again(n, args, kwargs)
        if n.live:
            dots = {key: dot[i] for key, i in n.sources.items()}
            dot[n.index] = _tangent(_At(b, n, args, kwargs, out), dots)
    zero = torch.zeros_like(b.values[value[graph.output].index])
    return b.finish(dot.get(graph.output) or b.constant(zero))


class _At:
    """One node of the graph that is differentiated: where its operands and its value stand in the new one."""

    def __init__(self, b: Builder, node: Node, args: tuple, kwargs: dict[str, Any], out: Ref) -> None:
        self.b, self.node, self.args, self.kwargs, self.out = b, node, args, kwargs, out
        self.shape = list(b.value(out).shape)
        self.dtype = b.value(out).dtype

    def fixed(self, op: Callable) -> Ref:
        """Another function of the node's operands, whose derivative does not count."""
        return self.b._emit(op, self.args, self.kwargs, flatten_inputs(self.args, self.kwargs), live=False)

    def with_operands(self, dots: Mapping[Key, Ref]) -> Ref:
        """The node's op with some operands replaced."""
        args, kwargs = replaced(self.args, self.kwargs, dots)
        return self.b(self.node.op, *args, **kwargs)  # type: ignore[arg-type]

    def zeros(self, like: Ref) -> Ref:
        return self.b(aten.zeros_like.default, like)

    def filled(self, x: Ref) -> Ref:
        """``x`` in the dtype of the node's value and repeated to its shape."""
        if self.b.value(x).dtype != self.dtype:
            x = self.b(aten._to_copy.default, x, dtype=self.dtype)
        return x if list(self.b.value(x).shape) == self.shape else self.b(aten.expand.default, x, self.shape)

    def total(self, terms: list[Ref]) -> Ref:
        out = terms[0]
        for t in terms[1:]:
            out = self.b(aten.add.Tensor, out, t)
        return out


Dots = dict[Key, Ref]
_TANGENTS: dict[type[Local], Callable[[_At, Dots], Ref]] = {}


def _of(*rules: type[Local]) -> Callable[[Callable[[_At, Dots], Ref]], Callable[[_At, Dots], Ref]]:
    def register(f: Callable[[_At, Dots], Ref]) -> Callable[[_At, Dots], Ref]:
        _TANGENTS.update(dict.fromkeys(rules, f))
        return f

    return register


def _tangent(at: _At, dots: Dots) -> Ref:
    """The tangent of a node's value, from those of its live operands."""
    assert at.node.rule is not None
    for kind in at.node.rule.__mro__:
        if kind in _TANGENTS:
            return _TANGENTS[kind](at, dots)
    raise TangentsUnsupported(f"{at.node.name} has no rule for orders above 3")


@_of(linear.Linear)
def _linear(at: _At, dots: Dots) -> Ref:
    return at.with_operands(dots)


@_of(linear.Placed, linear.Concatenate, linear.Where)
def _jointly_linear(at: _At, dots: Dots) -> Ref:
    """Linear in all floating operands together: zeros for those without a tangent."""
    inputs = flatten_inputs(at.args, at.kwargs)
    others = {k: Ref(i) for k, i in inputs.items() if k not in dots and at.b.values[i].is_floating_point()}
    return at.with_operands({**{k: at.zeros(x) for k, x in others.items()}, **dots})


@_of(linear.Pad)
def _pad(at: _At, dots: Dots) -> Ref:
    return at.b(aten.constant_pad_nd.default, dots[0], at.args[1])


@_of(linear.MaskedFill)
def _masked_fill(at: _At, dots: Dots) -> Ref:
    return at.b(aten.masked_fill.Scalar, at.filled(dots[0]), at.args[1], 0)


@_of(linear.Add)
def _add(at: _At, dots: Dots) -> Ref:
    alpha = at.kwargs.get("alpha", at.args[2] if len(at.args) > 2 else 1)
    factor = {"add": (1, alpha), "sub": (1, -alpha), "rsub": (-alpha, 1)}[at.node.name.split(".")[1]]
    terms = [
        at.filled(d if factor[key] == 1 else at.b(aten.mul.Scalar, d, factor[key]))  # type: ignore[index]
        for key, d in dots.items()
    ]
    return at.total(terms)


@_of(linear.PiecewiseLinear)
def _piecewise_linear(at: _At, dots: Dots) -> Ref:
    return at.b(aten.mul.Tensor, dots[0], at.fixed(_slope(at.node.op, at.node.rule)))  # type: ignore[arg-type]


@cache
def _slope(op: Callable, kind: Any) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: kind(op, args, kwargs, (0,), 1).factor


@_of(linear.MaxPool2d)
def _max_pool(at: _At, dots: Dots) -> Ref:
    index = at.fixed(_places)
    shape = list(at.b.value(dots[0]).shape)
    rows = at.b(aten.reshape.default, dots[0], [*shape[:-2], -1])
    return at.b(aten.reshape.default, at.b(aten.gather.default, rows, len(shape) - 2, index), at.shape)


def _places(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return F.max_pool2d(x, *args, **kwargs, return_indices=True)[1].flatten(-2)


@_of(product.Product)
def _product(at: _At, dots: Dots) -> Ref:
    """a' b + a b' and, where there is one, the bias."""
    keys = at.node.rule.keys  # type: ignore[union-attr]
    bias = {2: None} if len(at.args) > 2 and isinstance(at.args[2], Ref) else {}
    terms = [at.filled(at.with_operands({**bias, key: dots[key]})) for key in keys if key in dots]  # type: ignore[dict-item]
    if 2 in dots and 2 not in keys:
        d = dots[2]
        if issubclass(at.node.rule, product.Convolution):  # type: ignore[arg-type]
            d = at.b(aten.reshape.default, d, [1, -1, *[1] * (len(at.shape) - 2)])
        terms.append(at.filled(d))
    return at.total(terms)


@_of(product.ScaleShift)
def _scale_shift(at: _At, dots: Dots) -> Ref:
    x, weight, _ = at.args
    terms = []
    if 0 in dots:
        terms.append(at.b(aten.mul.Tensor, dots[0], weight))
    if 1 in dots:
        terms.append(at.b(aten.mul.Tensor, x, dots[1]))
    if 2 in dots:
        terms.append(at.filled(dots[2]))
    return at.total(terms)


@_of(scalar.Scalar)
def _scalar(at: _At, dots: Dots) -> Ref:
    ((key, d),) = dots.items()
    slope = at.b(_derivative(at.node.op, key), *at.args, **at.kwargs)
    return at.b(aten.mul.Tensor, d, slope)


@cache
def _derivative(op: Callable, key: int) -> Callable[..., Tensor]:
    """sigma' as a scalar function of its own, by autodiff, differentiable again."""

    def derivative(*args: Any, **kwargs: Any) -> Tensor:
        with torch.enable_grad():
            x = args[key] if args[key].requires_grad else args[key].detach().requires_grad_()
            y = op(*args[:key], x, *args[key + 1 :], **kwargs)
            if not y.requires_grad:
                return torch.zeros_like(x)
            (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True, allow_unused=True)
            return torch.zeros_like(x) if slope is None else slope

    derivative.__name__ = f"derivative of {getattr(op, '__name__', op)}"
    rule(derivative)(scalar.Scalar)
    return derivative


def _row_sum(at: _At, x: Ref, axis: int, op: Callable = aten.sum.dim_IntList) -> Ref:
    return at.b(op, x, [axis], True)


@_of(softmax.Softmax)
def _softmax(at: _At, dots: Dots) -> Ref:
    """p (x' - <p, x'>)."""
    mean = _row_sum(at, at.b(aten.mul.Tensor, at.out, dots[0]), at.args[1])
    return at.b(aten.mul.Tensor, at.out, at.b(aten.sub.Tensor, dots[0], mean))


@_of(softmax.LogSoftmax)
def _log_softmax(at: _At, dots: Dots) -> Ref:
    """x' - <p, x'>."""
    p = at.b(aten.exp.default, at.out)
    return at.b(aten.sub.Tensor, dots[0], _row_sum(at, at.b(aten.mul.Tensor, p, dots[0]), at.args[1]))


@_of(normalize.Normalize)
def _normalize(at: _At, dots: Dots) -> Ref:
    """r (c' - y mean(y c')) row by row, with r = (mean(c^2) + eps)^-1/2."""
    b, (x, axes, eps, center) = at.b, at.args
    lead = at.shape[: len(at.shape) - axes]

    def rows(t: Ref) -> Ref:
        return b(aten.reshape.default, t, [*lead, -1])

    def mean(t: Ref) -> Ref:
        return _row_sum(at, t, len(lead), aten.mean.dim)

    def centred(t: Ref) -> Ref:
        return b(aten.sub.Tensor, t, mean(t)) if center else t

    c, d, y = centred(rows(x)), centred(rows(dots[0])), rows(at.out)
    r = b(aten.rsqrt.default, b(aten.add.Scalar, mean(b(aten.square.default, c)), eps))
    along = b(aten.mul.Tensor, y, mean(b(aten.mul.Tensor, y, d)))
    return b(aten.reshape.default, b(aten.mul.Tensor, r, b(aten.sub.Tensor, d, along)), at.shape)


@_of(Generic)
def _generic(at: _At, dots: Dots) -> Ref:
    keys = tuple(dots)
    return at.b(_jvp(at.node.op, keys), list(dots.values()), *at.args, **at.kwargs)


@cache
def _jvp(op: Callable, keys: tuple[Key, ...]) -> Callable[..., Tensor]:
    """The tangent of an op without a rule, as an op without a rule."""

    def tangent(dots: list[Tensor], *args: Any, **kwargs: Any) -> Tensor:
        node = Generic(op, args, kwargs, keys, 1)
        live = tuple(operand(args, kwargs, k) for k in keys)
        return torch.func.jvp(node.f, live, tuple(dots))[1]

    tangent.__name__ = f"tangent of {getattr(op, '__name__', op)}"
    rule(tangent)(Generic)
    return tangent


class Higher:
    """Orders above three of one batch, as third orders of directional derivatives.

    Parameters
    ----------
    graphs
        ``graphs[n]`` is the graph of the n-th directional derivative.
    size
        The number of groups, in the order of first use.
    inputs, leaves
        The inputs of ``graphs[0]``, and the tangents of those that are parameters.
    """

    def __init__(self, graphs: list[Graph], size: int, inputs: list[Tensor], leaves: Mapping[int, Stack]) -> None:
        self.graphs, self.size, self.inputs, self.leaves = graphs, size, inputs, leaves

    def _along(self, groups: tuple[int, ...]) -> list[Tensor]:
        """The inputs of the derivative along U^s for each of some groups."""
        return [*self.inputs, *(self._part(i, s) for s in groups for i in self.leaves)]

    def _part(self, i: int, s: int) -> Tensor:
        """What of a parameter's tangents belongs to a group."""
        leaf = self.leaves[i]
        return leaf.data[leaf.groups.index(s)] if s in leaf.groups else torch.zeros_like(self.inputs[i])

    def tensor(self, order: int) -> Tensor:
        """D^(order), of shape (S,)*order."""
        n = order - 3
        out = torch.zeros((self.size,) * order, dtype=torch.float64)
        for groups in itertools.combinations_with_replacement(range(self.size), n):
            graph, sums = self.graphs[n], Sums(self.size, 3, False)
            values, local = sweeps.forward(graph, self._along(groups), 3)
            if graph.output in local:
                sweeps.full(graph, local, values[graph.output], self.leaves, sums)
            for placed in set(itertools.permutations(groups)):
                out[placed] = sums.D3  # type: ignore[assignment]
        return out

    def diagonal(self, order: int) -> Tensor:
        """D^(order)[s, .., s], of shape (S,)."""
        graph, n = self.graphs[order - 3], order - 3
        out = torch.zeros(self.size, dtype=torch.float64)
        for s in range(self.size):
            own = {i: Stack((s,), self._part(i, s)[None]) for i in self.leaves}
            values, local = sweeps.forward(graph, self._along((s,) * n), 3)
            if graph.output in local:
                sums = Sums(self.size, 2, True)
                sweeps.stream(graph, local, values[graph.output], own, sums)
                out[s] = sums.diagonal[s]  # type: ignore[index]
        return out
