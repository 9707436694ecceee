"""Logits and their cross-entropy in the streaming sweep: the last product and log-softmax taken together, tile by tile.

Of a language model the stacks of the logits' tangents, S x tokens x vocabulary, are larger than all others. Where
nothing below log-softmax is curved, what follows is linear, and no tangent has to go further: with lam the adjoints of
the logits z = x W^T + c,

    D1 += <lam W, x_a> + <x, lam W_a> + <sum lam, c_a>

and the stacks are needed for sums over their entries alone, a tile of tokens and words at a time. With w = -L p (L the
sum over a row of the adjoints of log p) and z~_a = z_a - <p, z_a>,

    D2 += <w, z~_a z~_b> + <x_a, lam W_b> + <x_b, lam W_a>
    D3 += <w z~_a, z~_a^2 + 3 z_aa> + 3 <x_aa, lam W_a> + 3 <x_a, lam W_aa>        on the diagonal

The mean <p, z_a> of a row comes from x_a (W^T p) before any tile is formed. z_aa needs none: <p, z~_a> = 0. These are
`Product` and `LogSoftmax` written out and added up. The full D3 keeps to those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hoanalysis.derivatives.tangents.graph import Graph, Node
from hoanalysis.derivatives.tangents.groups import Gram, Groups, Sums, common, flat, rows, take, union
from hoanalysis.derivatives.tangents.kernels import by_rows
from hoanalysis.derivatives.tangents.rules import Local, Stack, Stacks
from hoanalysis.derivatives.tangents.rules.linear import Cast, Permute, Reshape, Window
from hoanalysis.derivatives.tangents.rules.product import LinearLayer, MatrixProduct
from hoanalysis.derivatives.tangents.rules.softmax import LogSoftmax

WORTH = 2**26  # bytes of the stack of logits below which it is taken whole
TILE = 2**22  # bytes of one stack of a tile
TALL = 2**10  # rows, tangents times tokens, of a tile: enough to repay the reading of the weights


@dataclass(frozen=True)
class Logits:
    """The nodes between the last features and log p: ``inner`` ones are taken with ``product``."""

    product: Node
    moved: tuple[Node, ...]  # from the logits to what log-softmax takes: the same rows in other places
    softmax: Node

    @property
    def inner(self) -> tuple[Node, ...]:
        return (*self.moved, self.softmax)

    def pays(self, groups: int) -> bool:
        assert self.product.shape is not None
        assert self.product.dtype is not None
        return groups * self.product.dtype.itemsize * torch.Size(self.product.shape).numel() >= WORTH


def find(graph: Graph) -> list[Logits]:
    """Every log-softmax of a product with a matrix, used by it alone, below which nothing is curved."""
    users: dict[int, int] = {}
    for n in graph.live_nodes():
        for i in n.sources.values():
            users[i] = users.get(i, 0) + 1
    found = []
    for n in graph.live_nodes():
        if n.rule is not LogSoftmax or n.feeds_curved:
            continue
        axis, moved = _from_the_end(n.args[1] if len(n.args) > 1 else n.kwargs["dim"], n), []
        (above,) = (graph.nodes[i] for i in n.sources.values())
        while users[above.index] == 1 and (before := _before(graph, above, axis)) is not None:
            moved.append(above)
            (above,) = (graph.nodes[i] for i in above.sources.values())
            axis = before
        alike = len({x.dtype for x in (above, *moved, n)}) == 1
        if axis == -1 and alike and users[above.index] == 1 and _is_head(graph, above):
            found.append(Logits(above, tuple(reversed(moved)), n))
    return found


def below(graph: Graph, heads: list[Logits]) -> set[int]:
    """The nodes that no tangent reaches once those heads are taken out: what is between them and the loss."""
    found = {n.index for h in heads for n in h.inner}
    if found:
        for n in graph.live_nodes():
            if n.index not in found and n.sources and found.issuperset(n.sources.values()):
                found.add(n.index)
    return found


def _is_head(graph: Graph, n: Node) -> bool:
    if n.rule is LinearLayer:
        return 0 in n.sources
    matrix = graph.nodes[n.inputs[1]].shape if n.rule is MatrixProduct else None
    return matrix is not None and len(matrix) == 2 and 0 in n.sources


def _from_the_end(axis: int, n: Node) -> int:
    return axis - len(n.shape or ()) if axis >= 0 else axis


def _before(graph: Graph, n: Node, axis: int) -> int | None:
    """Where an axis of a node's value stands in its input; None where the node does more than move whole rows."""
    if len(n.sources) != 1 or n.rule not in (Reshape, Cast, Permute, Window):
        return None
    shape = graph.nodes[n.sources[0]].shape
    assert shape is not None
    assert n.shape is not None
    if n.rule is Cast or shape == n.shape:
        return axis
    if n.rule is Permute:
        lengths = torch.empty(tuple(range(1, len(shape) + 1)), device="meta")
        moved = n.op(lengths, *n.args[1:], **n.kwargs).shape  # type: ignore[misc]
        return moved[axis] - 1 - len(shape)
    kept = axis == -1 and shape[-1:] == n.shape[-1:]
    if n.rule is Window:
        where = n.args[1] if len(n.args) > 1 else 0
        kept &= where % len(shape) != len(shape) - 1
    return axis if kept else None


def stream(
    this: Logits, local: Mapping[int, Local], lam: Mapping[int, Tensor], tangents: Stacks, bent: Stacks, sums: Sums,
    second: bool,
) -> None:  # fmt: skip
    """Add what the logits and their cross-entropy give to D1 and, where ``second`` is set, to the other sums.

    ``tangents`` and ``bent`` are those of the product's operands.
    """
    head = _Head(this, local, lam)
    x, weight, bias = tangents.get(0), tangents.get(1), tangents.get(2)
    if x is not None:
        sums.add1(x.groups, flat(x.data) @ head.times(head.lam, head.product.b[None]).flatten())
    if bias is not None:
        sums.add1(bias.groups, flat(bias.data) @ head.lam.sum(0))
    if weight is not None:
        mu = head.times(head.lam, weight.data)
        sums.add1(weight.groups, flat(mu) @ head.x.flatten())
        if second and x is not None:
            sums.add2(x.groups, weight.groups, flat(x.data) @ flat(mu).T, both=True)
        if sums.diagonal is not None:
            _across(sums, bent.get(0), Stack(weight.groups, mu))
    if sums.diagonal is not None and (w2 := bent.get(1)) is not None:
        _across(sums, x, Stack(w2.groups, head.times(head.lam, w2.data)))
    if second:
        head.curve(tangents, bent, sums)


def _across(sums: Sums, a: Stack | None, b: Stack) -> None:
    """The diagonal of D3 += 3 <a, b> for the groups that both have."""
    if a is not None and (both := common(a.groups, b.groups)):
        u, v = take(a.data, a.groups, both), take(b.data, b.groups, both)
        sums.add_diagonal(both, 3 * (flat(u) * flat(v)).sum(1))


class _Head:
    """Features x (n, d), a matrix W (v, d), and of the logits the adjoints ``lam`` and the curvature ``w`` (n, v)."""

    def __init__(self, this: Logits, local: Mapping[int, Local], lam: Mapping[int, Tensor]) -> None:
        product, softmax = local[this.product.index], local[this.softmax.index]
        assert isinstance(product, (LinearLayer, MatrixProduct))
        assert isinstance(softmax, LogSoftmax)
        self.product, self.turned = product, isinstance(product, MatrixProduct)
        self.x = product.a.reshape(-1, product.a.shape[-1])
        self.W = self.matrix(product.b)
        last, back = lam[this.softmax.index], [local[n.index] for n in reversed(this.moved)]

        def to_logits(y: Tensor) -> Tensor:
            y = y[None]
            for n in back:
                y = n.pull(0, y)
            return y.reshape(-1, len(self.W))

        self.lam = to_logits(softmax.pull(0, last[None])[0])
        self.w = to_logits(softmax._weight(last))

    def matrix(self, weight: Tensor) -> Tensor:
        """A weight or a stack of them as (.., v, d)."""
        return weight.mT if self.turned else weight

    def times(self, y: Tensor, weights: Tensor) -> Tensor:
        """y W_b for rows ``y`` (n, v) and each of a stack of weights: (k, n, d)."""
        return torch.stack([by_rows(y, W.mT) for W in self.matrix(weights)])

    def curve(self, tangents: Stacks, bent: Stacks, sums: Sums) -> None:
        """D2 += <w, z~_a z~_b> and the diagonal of D3 += <w z~_a, z~_a^2 + 3 z_aa>, by tiles."""
        kept = (self.w != 0).any(1).nonzero()[:, 0]  # masked tokens have no curvature
        if not len(kept):
            return
        w, first = self.w[kept], _Tangents(self, tangents, kept)
        second = None if sums.diagonal is None else _Tangents(self, bent, kept, first)
        where = slice(0) if second is None else rows(second.groups, first.groups)
        size, mean = len(first.groups), first.mean(w)
        gram, diagonal = Gram(self.x, size), torch.zeros(size, dtype=torch.float64, device=self.x.device)
        tokens = min(len(kept), max(1, TALL // size))
        words = max(64, TILE // (size * tokens * self.x.element_size()) // 64 * 64)
        for i in (slice(s, s + tokens) for s in range(0, len(kept), tokens)):
            stacks = [t.at(i) for t in (first, second) if t is not None and t.groups]
            for j in (slice(s, s + words) for s in range(0, len(self.W), words)):
                z = stacks[0](j).sub_(mean[:, i, None])
                wz = z * w[i, j]
                gram.add(wz.flatten(1), z.flatten(1))
                if sums.diagonal is not None:
                    z.square_()
                    for more in stacks[1:]:
                        _onto(z, where, more(j).mul_(3))
                    diagonal += z.mul_(wz).flatten(1).sum(1)
        sums.add2(first.groups, first.groups, gram.matrix())
        if sums.diagonal is not None:
            sums.add_diagonal(first.groups, diagonal)


class _Tangents:
    """Tangents of the logits, x_a W^T + x W_a^T + c_a, of which any tile can be had; with ``twice``, the second ones:
    x_aa W^T + x W_aa^T + c_aa + 2 x_a W_a^T."""

    def __init__(self, head: _Head, stacks: Stacks, kept: Tensor, twice: _Tangents | None = None) -> None:
        self.head = head
        self.whole = len(kept) == len(head.x)
        self.x = self._kept(head.x, kept)
        self.features, self.weights, self.biases = stacks.get(0), stacks.get(1), stacks.get(2)
        if self.features is not None:
            data = self.features.data.reshape(len(self.features.groups), -1, self.x.shape[-1])
            self.features = Stack(self.features.groups, data if self.whole else data[:, kept])
        self.both: Groups = ()
        self.twice = twice
        if twice is not None and twice.features is not None and twice.weights is not None:
            self.both = common(twice.features.groups, twice.weights.groups)
        self.groups = self.both
        for stack in (self.features, self.weights, self.biases):
            self.groups = self.groups if stack is None else union(self.groups, stack.groups)

    def _kept(self, x: Tensor, kept: Tensor) -> Tensor:
        return x if self.whole else x[kept]

    def mean(self, w: Tensor) -> Tensor:
        """<p, z_a> of every token, (k, n), with p = w over its sum."""
        out = self.x.new_zeros(len(self.groups), len(self.x))
        if (x := self.features) is not None:
            _onto(out, rows(x.groups, self.groups), torch.einsum("knd,nd->kn", x.data, w @ self.head.W))
        if (W := self.weights) is not None:
            _onto(out, rows(W.groups, self.groups), (self.head.times(w, W.data) * self.x).sum(-1))
        if (c := self.biases) is not None:
            _onto(out, rows(c.groups, self.groups), c.data @ w.T)
        return out / w.sum(1)

    def at(self, i: slice) -> Callable[[slice], Tensor]:
        """For some tokens, the stack of any words: (k, tokens, words)."""
        x, features, tokens = self.x[i], None, len(self.x[i])
        if self.features is not None:
            features = self.features.data[:, i].contiguous()

        def words(j: slice) -> Tensor:
            W = self.head.W[j]
            if features is not None and self.features is not None and self.features.groups == self.groups:
                out = by_rows(features, W)
            else:
                out = x.new_zeros(len(self.groups), tokens, len(W))
                if features is not None and self.features is not None:
                    _onto(out, rows(self.features.groups, self.groups), by_rows(features, W))
            for s, W_s in self._weights(self.weights):
                out[s] += by_rows(x, W_s[j])
            if (c := self.biases) is not None:
                _onto(out, rows(c.groups, self.groups), c.data[:, None, j])
            for s, x_s, W_s in self._pairs():
                out[s] += by_rows(x_s[i], W_s[j]).mul_(2)
            return out

        return words

    def _weights(self, stack: Stack | None) -> Iterator[tuple[int, Tensor]]:
        if stack is not None:
            for g, W in zip(stack.groups, self.head.matrix(stack.data), strict=True):
                yield self.groups.index(g), W

    def _pairs(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Of groups that both the features and the weights have: where they stand here, and both tangents."""
        if not self.both:
            return
        assert self.twice is not None
        assert self.twice.features is not None
        assert self.twice.weights is not None
        x, W = self.twice.features, self.twice.weights
        for g in self.both:
            yield self.groups.index(g), x.data[x.groups.index(g)], self.head.matrix(W.data)[W.groups.index(g)]


def _onto(total: Tensor, where: slice | Tensor, part: Tensor) -> None:
    """total[where] += part"""
    if isinstance(where, slice):
        total[where] += part
    else:
        total.index_add_(0, where, part.expand(len(where), *total.shape[1:]))
