"""Attention in the streaming sweep: its three curved nodes taken together, tile by tile.

Between the scores s = q k^T and the output o = p v, p = softmax(s), the stacks of tangents are n x m matrices for each
head, larger than all others of a transformer. Node by node each is written, read and contracted several times from
main memory. Here a tile of query rows goes through all of it while it stays in the cache, and columns on which p
vanishes in all rows of the tile (a causal mask: nearly half) are never formed. With w = p (lam_p - <p, lam_p>), the
adjoint of the scores, and a~ = s_a - <p, s_a>:

    p_a  = p a~                                  o_a = p_a v + p v_a
    D2  += <w, a~ b~> + (w^T q_a) . k_b + (p_a^T lam_o) . v_b  and the latter two with a and b exchanged

and for the diagonal of D3, with r = s_aa + a~^2 centred under p and s_aa = q_aa k^T + q k_aa^T + 2 q_a k_a^T,

    p_aa = p r                                   o_aa = p_aa v + p v_aa + 2 p_a v_a
    D3  += 3 <w a~, r> - 2 <w a~, a~^2>
         + 3 {(w^T q_aa) . k_a + (w^T q_a) . k_aa + (p_aa^T lam_o) . v_a + (p_a^T lam_o) . v_aa}

which is `Softmax` and `MatrixProduct` written out and added up. The full D3 keeps to those.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hoanalysis.derivatives.tangents.graph import Graph, Node
from hoanalysis.derivatives.tangents.groups import Gram, Groups, Sums, rows, union
from hoanalysis.derivatives.tangents.rules import Local, Stack
from hoanalysis.derivatives.tangents.rules.linear import Add
from hoanalysis.derivatives.tangents.rules.product import MatrixProduct
from hoanalysis.derivatives.tangents.rules.softmax import Softmax
from hoanalysis.derivatives.tangents.shares import shared_out

TILE = 2**20  # bytes of one stack of a tile: the few that are in use at a time stay in the cache
WORTH = 2**15  # entries of one head's stack of scores below which the loop over heads costs more than it saves


@dataclass(frozen=True)
class Attention:
    """The nodes of one attention in a graph: ``inner`` ones are taken with ``output``."""

    scores: Node
    inner: tuple[Node, ...]  # scores, perhaps a mask that is added, softmax
    softmax: Node
    output: Node

    @property
    def sources(self) -> tuple[int, int, int]:
        """q, k^T and v."""
        return self.scores.sources[0], self.scores.sources[1], self.output.sources[1]

    def pays(self, groups: int) -> bool:
        assert self.scores.shape is not None
        n, m = self.scores.shape[-2:]
        return groups * n * m >= WORTH


def find(graph: Graph) -> list[Attention]:
    """Every softmax over the last axis of a matrix product, with q, k and v live, used by one further product alone."""
    users: dict[int, list[Node]] = {}
    for n in graph.live_nodes():
        for i in n.sources.values():
            users.setdefault(i, []).append(n)

    def only_user(n: Node) -> Node | None:
        return users[n.index][0] if len(users.get(n.index, ())) == 1 and n.index != graph.output else None

    found = []
    for n in graph.live_nodes():
        if n.rule is not MatrixProduct or not {0, 1} <= set(n.sources) or not _plain(graph, n):
            continue
        inner, following = [n], only_user(n)
        if following is not None and following.rule is Add and _adds_constant(following, n):
            inner.append(following)
            following = only_user(following)
        if following is None or following.rule is not Softmax or following.args[1] not in (-1, len(n.shape or ()) - 1):
            continue
        inner.append(following)
        output = only_user(following)
        if output is None or output.rule is not MatrixProduct or output.sources.get(0) != following.index:
            continue
        if 1 in output.sources and _plain(graph, output) and len({x.dtype for x in (*inner, output)}) == 1:
            found.append(Attention(n, tuple(inner), following, output))
    return found


def _plain(graph: Graph, n: Node) -> bool:
    """A product without broadcasting, of matrices in some leading axes."""
    a, b = (graph.nodes[n.inputs[key]].shape for key in (0, 1))
    return a is not None and b is not None and len(a) > 2 and a[:-2] == b[:-2]


def _adds_constant(n: Node, scores: Node) -> bool:
    if len(n.sources) != 1 or n.shape != scores.shape:
        return False
    name = n.op._schema.name  # type: ignore[union-attr]
    return name == "aten::add" and n.sources.get(0) == scores.index


def stream(
    this: Attention,
    local: Mapping[int, Local],
    lam: Mapping[int, Tensor],
    tangents: Mapping[int, Stack],
    bent: Mapping[int, Stack],
    sums: Sums,
) -> tuple[Stack, Stack | None]:
    """The tangents of the output and, where ``sums`` asks for the diagonal, the second ones; adds to the sums."""
    scores, softmax, output = (local[n.index] for n in (this.scores, this.softmax, this.output))
    assert isinstance(scores, MatrixProduct)
    assert isinstance(softmax, Softmax)
    assert isinstance(output, MatrixProduct)
    groups = functools.reduce(union, (tangents[i].groups for i in this.sources))
    fixed = (scores.a, scores.b.mT, output.b, softmax.p, lam[this.scores.index], lam[this.output.index])
    q, k, v = (_aligned(tangents[i], groups) for i in this.sources)
    second = sums.diagonal is not None
    if second:
        q2, k2, v2 = (_rows(bent.get(i), x, groups) for i, x in zip(this.sources, (q, k, v), strict=True))
        k2 = (k2[0], k2[1].mT)
    out = _empty(q, output.value.shape)
    out2 = _empty(q, output.value.shape) if second else None
    p, k = softmax.p, k.mT
    size = len(groups)
    fine = _tiles(p, max(8, TILE // (size * p.shape[-1] * p.element_size()) // 8 * 8))
    largest = max((i1 - i0) * (j1 - j0) for i0, i1, j0, j1 in fine)
    coarse = _tiles(p, 64)

    def work(heads: Sequence[tuple[int, ...]]) -> list[_Found]:
        buffers = [q.new_empty(size * largest) for _ in range(5 if second else 3)]
        return [one(h, buffers) for h in heads]

    def one(h: tuple[int, ...], buffers: list[Tensor]) -> _Found:
        at: tuple[slice | int, ...] = (slice(None), *h)
        head = _Head([x[h] for x in fixed], [x[at] for x in (q, k, v)])
        head.start(coarse)
        if second:
            head.start_second(coarse, *((where, x[at]) for where, x in (q2, k2, v2)))
        for i0, i1, j0, j1 in fine:
            i, j = slice(i0, i1), slice(j0, j1)
            tile = [b[: size * (i1 - i0) * (j1 - j0)].view(size, i1 - i0, j1 - j0) for b in buffers]
            out[at][:, i] = head.first(i, j, tile)
            if out2 is not None:
                out2[at][:, i] = head.second(i, j, tile)
        return head.found()

    for found in shared_out(work, list(itertools.product(*map(range, p.shape[:-2]))), q.device):
        sums.add2(groups, groups, found.within)
        sums.add2(groups, groups, found.across, both=True)
        if found.diagonal is not None:
            sums.add_diagonal(groups, found.diagonal)
    return Stack(groups, out), None if out2 is None else Stack(groups, out2)


def _aligned(stack: Stack, groups: Groups) -> Tensor:
    """The stack with zeros for the groups that it lacks."""
    if stack.groups == groups:
        return stack.data
    whole = stack.data.new_zeros(len(groups), *stack.data.shape[1:])
    whole[rows(stack.groups, groups)] = stack.data
    return whole


def _empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A stack (k, .., heads, n, e) in the order (k, .., n, heads, e), in which the heads are put together next."""
    *lead, heads, n, e = shape
    return like.new_empty(len(like), *lead, n, heads, e).transpose(-3, -2)


def _tiles(p: Tensor, height: int) -> list[tuple[int, int, int, int]]:
    """Tiles of query rows, each with the columns between which p does not vanish in some head."""
    used = (p != 0).flatten(0, -3).any(0)
    found = []
    for start in range(0, len(used), height):
        stop = min(len(used), start + height)
        columns = used[start:stop].any(0).nonzero().flatten().tolist() or [0]  # all masked: one column of zeros
        found.append((start, stop, columns[0], columns[-1] + 1))
    return found


def _dots(x: Tensor, y: Tensor) -> Tensor:
    """Inner products row by row of two stacks."""
    return (x * y).flatten(1).sum(1)


class _Head:
    """One head of one sample: (n, d) queries, (m, d) keys, (m, e) values, and stacks of their tangents."""

    def __init__(self, fixed: list[Tensor], tangents: list[Tensor]) -> None:
        self.q, self.k, self.v, self.p, self.w, self.lo = fixed
        self.Q, self.K, self.V = tangents
        self.size = len(self.Q)
        self.gram = Gram(self.Q, self.size)
        self.mu, self.nu = torch.zeros_like(self.K), torch.zeros_like(self.V)  # w^T q_a, p_a^T lam_o
        self.diagonal: Tensor | None = None

    def _all(self, x: Tensor) -> Tensor:
        return x.expand(self.size, *x.shape)

    def start(self, tiles: list[tuple[int, int, int, int]]) -> None:
        for i0, i1, j0, j1 in tiles:
            self.mu[:, j0:j1].baddbmm_(self._all(self.w[i0:i1, j0:j1].mT), self.Q[:, i0:i1])

    def start_second(self, tiles: list[tuple[int, int, int, int]], *bent: tuple[slice, Tensor]) -> None:
        """Take the second tangents of q, k and v, each with the rows where it stands among all groups."""
        self.bent = bent
        where, q2 = bent[0]
        self.nu2 = torch.zeros_like(self.V)
        mu2 = torch.zeros_like(self.K[where])
        for i0, i1, j0, j1 in tiles:
            mu2[:, j0:j1].baddbmm_(self.w[i0:i1, j0:j1].mT.expand(len(q2), -1, -1), q2[:, i0:i1])
        self.diagonal = self.Q.new_zeros(self.size)
        self.diagonal[where] += 3 * _dots(mu2, self.K[where])

    def first(self, i: slice, j: slice, tile: list[Tensor]) -> Tensor:
        """p_a v + p v_a on a tile; leaves a~, p_a and w a~ in the buffers."""
        a, pa, wa = tile[:3]
        p = self.p[i, j]
        torch.bmm(self.Q[:, i], self._all(self.k[j].mT), out=a)
        a.baddbmm_(self._all(self.q[i]), self.K[:, j].mT)
        a.sub_(torch.mul(a, p, out=pa).sum(-1, keepdim=True))
        torch.mul(a, p, out=pa)
        torch.mul(a, self.w[i, j], out=wa)
        self.gram.add(wa.flatten(1), a.flatten(1))
        self.nu[:, j].baddbmm_(pa.mT, self._all(self.lo[i]))
        return torch.bmm(pa, self._all(self.v[j])).baddbmm_(self._all(p), self.V[:, j])

    def second(self, i: slice, j: slice, tile: list[Tensor]) -> Tensor:
        """p_aa v + p v_aa + 2 p_a v_a on the tile that `first` was called for."""
        assert self.diagonal is not None
        a, pa, wa, r, b = tile
        p = self.p[i, j]
        (at_q, q2), (at_k, k2), (at_v, v2) = self.bent
        torch.baddbmm(r, self.Q[:, i], self.K[:, j].mT, beta=0, alpha=2, out=r)
        r[at_q].baddbmm_(q2[:, i], self.k[j].mT.expand(len(q2), -1, -1))
        r[at_k].baddbmm_(self.q[i].expand(len(k2), -1, -1), k2[:, j].mT)
        r.addcmul_(a, a)
        r.sub_(torch.mul(r, p, out=b).sum(-1, keepdim=True))
        torch.mul(a, a, out=b)
        b.mul_(-2).add_(r, alpha=3).mul_(wa)
        self.diagonal += b.flatten(1).sum(1)
        torch.mul(r, p, out=b)
        self.nu2[:, j].baddbmm_(b.mT, self._all(self.lo[i]))
        out = torch.bmm(pa, self.V[:, j]).mul_(2).baddbmm_(b, self._all(self.v[j]))
        out[at_v].baddbmm_(p.expand(len(v2), -1, -1), v2[:, j])
        return out

    def found(self) -> _Found:
        K, V = self.K.flatten(1), self.V.flatten(1)
        across = (self.mu.flatten(1) @ K.T).addmm_(self.nu.flatten(1), V.T)
        if self.diagonal is not None:
            (at_k, k2), (at_v, v2) = self.bent[1:]
            self.diagonal += 3 * _dots(self.nu2, self.V)
            self.diagonal[at_k] += 3 * _dots(self.mu[at_k], k2)
            self.diagonal[at_v] += 3 * _dots(self.nu[at_v], v2)
        return _Found(self.gram.matrix(), across, self.diagonal)


@dataclass(frozen=True)
class _Found:
    """What one head adds to D2, ``across`` with its transpose, and to the diagonal of D3."""

    within: Tensor
    across: Tensor
    diagonal: Tensor | None


def _rows(stack: Stack | None, like: Tensor, groups: Groups) -> tuple[slice, Tensor]:
    """A stack and where it stands in ``groups``; empty where there is none, padded where it is scattered."""
    if stack is None:
        return slice(0, 0), like[:0]
    where = rows(stack.groups, groups)
    return (where, stack.data) if isinstance(where, slice) else (slice(None), _aligned(stack, groups))
