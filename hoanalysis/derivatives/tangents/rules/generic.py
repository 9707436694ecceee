"""The generic rule: any smooth op with one tensor output, through `torch.func` at that node alone.

Slow (k Hessian-vector products of the node for D2, k^2 for D3), and only as right as torch's own formulas for the op:
norms and attention never come here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from hoanalysis.derivatives.tangents.groups import Groups, Sums, common, flat, rows, union
from hoanalysis.derivatives.tangents.rules.base import Key, Local, Stack, Stacks, operand, replaced


class Generic(Local):
    """phi as a function of its live inputs; every term by nested jvp and vjp."""

    kind = "generic"

    def __init__(self, op: Callable, args: tuple, kwargs: dict[str, Any], keys: tuple, order: int) -> None:
        self.op, self.args, self.kwargs, self.keys = op, args, kwargs, keys
        self.x = tuple(self._input(k).detach() for k in keys)
        self.value = self.f(*self.x)

    @classmethod
    def is_curved(cls, keys: frozenset) -> bool:
        return True

    def _input(self, key: Key) -> Tensor:
        return operand(self.args, self.kwargs, key)

    def f(self, *x: Tensor) -> Tensor:
        args, kwargs = replaced(self.args, self.kwargs, dict(zip(self.keys, x, strict=True)))
        return self.op(*args, **kwargs)

    @contextlib.contextmanager
    def _naming_the_op(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(f"{self.op} has no rule, and torch cannot differentiate it: {error}") from error

    def push(self, key: Key, stack: Tensor) -> Tensor:
        i = self.keys.index(key)
        zeros = [torch.zeros_like(x) for x in self.x]
        with self._naming_the_op():
            return vmap(lambda t: jvp(self.f, self.x, (*zeros[:i], t, *zeros[i + 1 :]))[1])(stack)

    def pull(self, key: Key, stack: Tensor) -> Tensor:
        i = self.keys.index(key)
        with self._naming_the_op():
            back = vjp(self.f, *self.x)[1]
            return vmap(lambda y: back(y)[i])(stack)

    def _aligned(self, tangents: Stacks, wanted: Groups | None = None) -> tuple[Groups, tuple[Tensor, ...]]:
        """One stack per live input over the same groups, zero where an input has none."""
        groups: Groups = ()
        for t in tangents.values():
            groups = union(groups, t.groups)
        groups = groups if wanted is None else wanted
        out = []
        for key, x in zip(self.keys, self.x, strict=True):
            whole = x.new_zeros(len(groups), *x.shape)
            if key in tangents and (both := common(tangents[key].groups, groups)):
                whole[rows(both, groups)] = tangents[key].data[rows(both, tangents[key].groups)]
            out.append(whole)
        return groups, tuple(out)

    def _gradient(self, lam: Tensor) -> Callable[..., tuple[Tensor, ...]]:
        return lambda *x: vjp(self.f, *x)[1](lam)

    def _hessian_rows(self, lam: Tensor, T: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """lam . phi''[T_s, .] for every row of the stacks T."""
        with self._naming_the_op():
            return vmap(lambda *t: jvp(self._gradient(lam), self.x, t)[1])(*T)

    def second(self, sums: Sums, lam: Tensor, tangents: Stacks) -> None:
        groups, T = self._aligned(tangents)
        H = self._hessian_rows(lam, T)
        sums.add2(groups, groups, _gram(H, T))

    def _third_rows(self, lam: Tensor, U: tuple[Tensor, ...], V: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """lam . phi'''[U_s, V_s, .], row by row."""

        def along(u: tuple[Tensor, ...]) -> Callable[..., tuple[Tensor, ...]]:
            return lambda *x: jvp(self._gradient(lam), x, u)[1]

        m = len(self.x)
        with self._naming_the_op():
            return vmap(lambda *uv: jvp(along(uv[:m]), self.x, uv[m:])[1])(*U, *V)

    def third(self, sums: Sums, lam: Tensor, lamT: Stack | None, tangents: Stacks) -> None:
        groups, T = self._aligned(tangents)
        k = len(groups)
        G = torch.zeros(k, k, k, dtype=torch.float64)
        for s in range(k):
            W = self._third_rows(lam, tuple(t[s : s + 1].expand_as(t) for t in T), T)
            G[s] = _gram(W, T)
        sums.add3_pairs(groups, groups, G / 3)
        if lamT is not None:
            G = torch.zeros(k, k, len(lamT.groups), dtype=torch.float64)
            for r, y in enumerate(lamT.data):
                H = self._hessian_rows(y, T)
                G[:, :, r] = _gram(H, T)
            sums.add3_pairs(groups, lamT.groups, G)

    def pull_second(self, key: Key, lam: Tensor, tangents: Stacks) -> Stack:
        groups, T = self._aligned(tangents)
        return Stack(groups, self._hessian_rows(lam, T)[self.keys.index(key)])

    def bend(self, tangents: Stacks) -> Stack:
        groups, T = self._aligned(tangents)
        with self._naming_the_op():
            return Stack(groups, vmap(lambda *t: jvp(lambda *x: jvp(self.f, x, t)[1], self.x, t)[1])(*T))

    def diagonal(self, sums: Sums, lam: Tensor, tangents: Stacks, bent: Stacks) -> None:
        groups, T = self._aligned(tangents)
        W = self._third_rows(lam, T, T)
        sums.add_diagonal(groups, _dots(W, T))
        if bent:
            groups, T2 = self._aligned(bent)
            H = self._hessian_rows(lam, self._aligned(tangents, groups)[1])
            sums.add_diagonal(groups, 3 * _dots(H, T2))


def _gram(U: tuple[Tensor, ...], V: tuple[Tensor, ...]) -> Tensor:
    """Inner products of all rows with all rows, summed over the inputs."""
    return torch.stack([flat(u) @ flat(v).T for u, v in zip(U, V, strict=True)]).sum(0)


def _dots(U: tuple[Tensor, ...], V: tuple[Tensor, ...]) -> Tensor:
    """Inner products row by row, summed over the inputs."""
    return torch.stack([flat(u * v).sum(1) for u, v in zip(U, V, strict=True)]).sum(0)
