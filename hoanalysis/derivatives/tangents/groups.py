"""Sets of groups, and the sums that the sweeps add to.

Groups are numbered by first use along the graph, so that the set of groups upstream of a node is a prefix in a chain,
and a slice or an index set elsewhere.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

Groups = tuple[int, ...]


@functools.lru_cache(maxsize=4096)
def union(a: Groups, b: Groups) -> Groups:
    """Both sets, sorted."""
    if a == b or not b:
        return a
    return tuple(sorted(set(a) | set(b))) if a else b


@functools.lru_cache(maxsize=4096)
def common(a: Groups, b: Groups) -> Groups:
    """The groups in both sets, sorted."""
    inside = set(b)
    return a if a == b else tuple(g for g in a if g in inside)


@functools.lru_cache(maxsize=4096)
def rows(part: Groups, whole: Groups) -> slice | Tensor:
    """Where the groups of ``part`` stand in ``whole``: a slice where they are contiguous there.

    >>> rows((2, 3), (0, 2, 3))
    slice(1, 3, None)
    """
    place = {g: i for i, g in enumerate(whole)}
    found = [place[g] for g in part]
    if not found:
        return slice(0, 0)
    if found[-1] - found[0] == len(found) - 1:
        return slice(found[0], found[-1] + 1)
    return torch.tensor(found)


def flat(stack: Tensor) -> Tensor:
    """A stack as (k, n): one row for each tangent, also of a number."""
    return stack.reshape(len(stack), -1)


def take(data: Tensor, have: Groups, want: Groups) -> Tensor:
    """The rows of ``want`` out of a stack with the groups ``have``; a view where it can be."""
    return data if have == want else data[rows(want, have)]


PARTS, BAND = 4, 16  # of `Gram`: parts of the columns, rows of a band
BLOCK = 2**18  # bytes; a few temporaries of this size stay in a second-level cache of 1 MiB


def blocks(stack: Tensor) -> list[slice]:
    """A stack's tangents in blocks: chains of elementwise operations on one of them stay in the cache."""
    each = max(1, stack[0].numel() * stack.element_size()) if len(stack) else 1
    step = max(1, BLOCK // each)
    return [slice(i, i + step) for i in range(0, max(1, len(stack)), step)]


@functools.lru_cache(maxsize=4096)
def _index(groups: Groups) -> Tensor:
    return torch.tensor(groups, dtype=torch.long)


def _block(tensor: Tensor, *groups: Groups) -> Tensor | None:
    """The block of a tensor that some contiguous sets of groups span, as a view; None where one is not contiguous."""
    for g in groups:
        if not g or g[-1] - g[0] != len(g) - 1:
            return None
    return tensor[tuple(slice(g[0], g[-1] + 1) for g in groups)]


class Sums:
    """D1, D2, D3 and the third diagonal of one batch, in float64, over groups in the order of first use."""

    def __init__(self, size: int, order: int, diagonal: bool) -> None:
        self.size = size
        self.D1 = torch.zeros(size, dtype=torch.float64)
        self.D2 = torch.zeros(size, size, dtype=torch.float64)
        self.D3 = torch.zeros(size, size, size, dtype=torch.float64) if order >= 3 else None
        self.diagonal = torch.zeros(size, dtype=torch.float64) if diagonal else None

    def add1(self, groups: Groups, values: Tensor) -> None:
        self.D1[_index(groups)] += values.double()

    @staticmethod
    def _add(tensor: Tensor, groups: tuple[Groups, ...], values: Tensor) -> None:
        if (block := _block(tensor, *groups)) is not None:
            block += values
            return
        d = len(groups)
        index = tuple(_index(g).view([-1 if i == j else 1 for j in range(d)]) for i, g in enumerate(groups))
        tensor.index_put_(index, values, accumulate=True)

    def add2(self, a: Groups, b: Groups, values: Tensor, both: bool = False) -> None:
        """D2[a, b] += values of shape (len(a), len(b)), and the transpose too where ``both``."""
        values = values.double()
        self._add(self.D2, (a, b), values)
        if both:
            self._add(self.D2, (b, a), values.T)

    def add3_pairs(self, pair: Groups, other: Groups, values: Tensor) -> None:
        """The three placements of values[s, t, r], symmetric in s and t: D3 += G_str + G_srt + G_rst."""
        assert self.D3 is not None
        values = values.double()
        self._add(self.D3, (pair, pair, other), values)
        self._add(self.D3, (pair, other, pair), values.transpose(1, 2))
        self._add(self.D3, (other, pair, pair), values.permute(2, 0, 1))

    def add3_six(self, groups: tuple[Groups, Groups, Groups], values: Tensor) -> None:
        """All six placements of values[r, s, t]."""
        assert self.D3 is not None
        values = values.double()
        for p in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)):
            self._add(self.D3, (groups[p[0]], groups[p[1]], groups[p[2]]), values.permute(p))

    def add_diagonal(self, groups: Groups, values: Tensor) -> None:
        assert self.diagonal is not None
        self.diagonal[_index(groups)] += values.double()


class Gram:
    """Sums of products left right^T of stacks (k, n) that are symmetric: only the lower bands of rows are formed.

    That is a third less time at k = 77. The columns are cut into `PARTS` that the cores share: products of few rows
    with many columns run on one core otherwise. The parts are added in their order, whatever the number of cores.
    """

    def __init__(self, like: Tensor, k: int) -> None:
        self.bands = [(slice(i, i + BAND), slice(i + BAND)) for i in range(0, k, BAND)]
        self.sums = [like.new_zeros(PARTS, min(BAND, k - i.start), min(k, j.stop)) for i, j in self.bands]

    def add(self, left: Tensor, right: Tensor) -> None:
        n = left.shape[1]
        parts = PARTS if n % PARTS == 0 else 1
        x, y = (t.unflatten(1, (parts, n // parts)).transpose(0, 1) for t in (left, right))
        for (i, j), total in zip(self.bands, self.sums, strict=True):
            total[:parts].baddbmm_(x[:, i], y[:, j].mT)

    def matrix(self) -> Tensor:
        """The sum, of shape (k, k)."""
        k = self.sums[-1].shape[2]
        G = self.sums[0].new_zeros(k, k)
        for (i, j), total in zip(self.bands, self.sums, strict=True):
            G[i, j] = total.sum(0)
        return G.tril() + G.tril(-1).T


def weighted_gram(T: Tensor, w: Tensor) -> Tensor:
    """G[s, t] = sum_i w_i T_si T_ti, of shape (k, k), for a stack T (k, N).

    In blocks of columns, so that the weighted stack stays in the cache.
    """
    k, n = T.shape
    gram = Gram(T, k)
    block = PARTS * max(4096, BLOCK // T.element_size() // max(1, k) // 64 * 64)
    buffer = T.new_empty(k * min(n, block))
    for start in range(0, n, block):
        t = T[:, start : start + block]
        gram.add(torch.mul(t, w[start : start + block], out=buffer[: t.numel()].view(t.shape)), t)
    return gram.matrix()


def triple_products(sums: Sums, pair: Groups, T: Tensor, other: Groups, R: Tensor) -> None:
    """D3 += the three placements of G[s, t, r] = <T_s * T_t, R_r>, for stacks T (k, N) and R (K, N).

    Pairs are formed for s <= t only, one row of them at a time and in blocks of columns that stay in the cache: S^2
    times the activations is never materialised.
    """
    k, n = T.shape
    G = torch.zeros(k, k, len(R), dtype=torch.float64)
    block = max(1024, (1 << 20) // (k + len(R)))
    for start in range(0, n, block):
        t, r = T[:, start : start + block].contiguous(), R[:, start : start + block].T
        for s in range(k):
            G[s, s:] += (t[s:] * t[s]) @ r
    lower = torch.ones(k, k, dtype=torch.bool).tril(-1)
    G[lower] = G.transpose(0, 1)[lower]
    sums.add3_pairs(pair, other, G)


def add_rows(a: Groups, A: Tensor, b: Groups, B: Tensor) -> tuple[Groups, Tensor]:
    """A + B over the union of their groups. ``A`` is overwritten where it has all of them."""
    both = union(a, b)
    if both != a:
        whole = A.new_zeros(len(both), *A.shape[1:])
        whole[rows(a, both)] = A
        A = whole
    where = rows(b, both)
    if isinstance(where, slice):
        A[where] += B
    else:
        A.index_add_(0, where, B.expand(len(where), *A.shape[1:]))
    return both, A
