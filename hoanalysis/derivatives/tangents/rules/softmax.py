"""Softmax and log-softmax as one node each: their higher terms are moments under p.

With a~ = a - <p, a> the tangent centred under p (row by row),

    softmax       phi'[a] = p a~
                  lam . phi''[a,b]     = <w, a~ b~>                                w = p (lam - <p, lam>) = pull(lam)
                  lam . phi'''[a,b,c]  = <w, a~ b~ c~> - sum of three <w, a~> <p, b~ c~>
    log-softmax   phi'[a] = a - <p, a>                                             L = sum of lam over the row
                  lam . phi''[a,b]     = -L <p, a~ b~>,     lam . phi'''[a,b,c] = -L <p, a~ b~ c~>
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hoanalysis.derivatives.tangents.groups import Sums, add_rows, take, triple_products, weighted_gram
from hoanalysis.derivatives.tangents.rules.base import Key, Local, Stack, Stacks, rule

aten = torch.ops.aten


class _Moments(Local):
    """What the two share: p, centred tangents, and contractions as <T~_s T~_t, R_r>."""

    kind = "softmax"
    p: Tensor
    _kept: tuple[Tensor, Tensor] | None = None

    def __init__(self, op: Callable, args: tuple, kwargs: dict[str, Any], keys: tuple, order: int) -> None:
        self.value = op(*args, **kwargs)
        self.axis = args[1] % max(args[0].dim(), 1) - max(args[0].dim(), 1)  # from the end: valid for stacks too

    @classmethod
    def is_curved(cls, keys: frozenset) -> bool:
        return True

    def _centred(self, x: Stack) -> Tensor:
        """T~, kept until `release`: the second-order term and the push both need it."""
        if self._kept is None or self._kept[0] is not x.data:
            self._kept = (x.data, x.data - self._mean(x.data))
        return self._kept[1]

    def release(self) -> None:
        self._kept = None

    def _mean(self, stack: Tensor) -> Tensor:
        return (stack * self.p).sum(self.axis, keepdim=True)

    def _weight(self, lam: Tensor) -> Tensor:
        """w such that lam . phi''[a, b] = <w, a~ b~>; for stacks too."""
        raise NotImplementedError

    def _own_third(self, lam: Tensor, centred: Tensor) -> Tensor:
        """R such that lam . phi''' is the sum of the three placements of <T~_s T~_t, R_r>."""
        raise NotImplementedError

    def second(self, sums: Sums, lam: Tensor, tangents: Stacks) -> None:
        ((_, x),) = tangents.items()
        T = self._centred(x)
        w = self._weight(lam).expand_as(self.value).flatten()
        sums.add2(x.groups, x.groups, weighted_gram(T.flatten(1), w))

    def third(self, sums: Sums, lam: Tensor, lamT: Stack | None, tangents: Stacks) -> None:
        ((_, x),) = tangents.items()
        T = self._centred(x)
        groups, R = x.groups, self._own_third(lam, T)
        if lamT is not None:
            groups, R = add_rows(lamT.groups, self._weight(lamT.data), x.groups, R)
        triple_products(sums, x.groups, T.flatten(1), groups, R.flatten(1))

    def diagonal(self, sums: Sums, lam: Tensor, tangents: Stacks, bent: Stacks) -> None:
        ((_, x),) = tangents.items()
        T, w = self._centred(x), self._weight(lam)
        squares = T.square()
        total = (squares * T).flatten(1) @ w.flatten() - self._mixed(T, w, squares)
        sums.add_diagonal(x.groups, total)
        for x2 in bent.values():
            t = take(T, x.groups, x2.groups)
            centred = x2.data - self._mean(x2.data)
            sums.add_diagonal(x2.groups, 3 * (centred.mul_(t).flatten(1) @ w.flatten()))

    def _mixed(self, T: Tensor, w: Tensor, squares: Tensor) -> Tensor | float:
        """3 <w, T~> <p, T~^2> summed over rows, where the op has that term."""
        return 0.0


@rule(aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
class Softmax(_Moments):
    """p = softmax(x) along one axis. Masked entries have p = 0 and drop out; so does, of the safe form, a whole row."""

    def __init__(self, op: Callable, args: tuple, kwargs: dict[str, Any], keys: tuple, order: int) -> None:
        super().__init__(op, args, kwargs, keys, order)
        self.p = self.value

    def push(self, key: Key, stack: Tensor) -> Tensor:
        if self._kept is not None and self._kept[0] is stack:
            return self._kept[1] * self.p
        return self.pull(key, stack)

    def pull(self, key: Key, stack: Tensor) -> Tensor:
        return (stack - self._mean(stack)).mul_(self.p)

    def _weight(self, lam: Tensor) -> Tensor:
        return self.pull(0, lam)

    def _own_third(self, lam: Tensor, centred: Tensor) -> Tensor:
        w = self._weight(lam)
        weighted = centred * w
        return weighted / 3 - weighted.sum(self.axis, keepdim=True) * self.p

    def _mixed(self, T: Tensor, w: Tensor, squares: Tensor) -> Tensor:
        rows = (T * w).sum(self.axis) * (squares * self.p).sum(self.axis)
        return 3 * rows.flatten(1).sum(1)

    def pull_second(self, key: Key, lam: Tensor, tangents: Stacks) -> Stack:
        x = tangents[key]
        weighted = self._centred(x) * self._weight(lam)
        return Stack(x.groups, weighted - weighted.sum(self.axis, keepdim=True) * self.p)

    def bend(self, tangents: Stacks) -> Stack:
        ((_, x),) = tangents.items()
        squares = self._centred(x).square()
        return Stack(x.groups, (squares - self._mean(squares)).mul_(self.p))


@rule(aten.log_softmax.int, aten._log_softmax.default)
class LogSoftmax(_Moments):
    """log p along one axis."""

    def __init__(self, op: Callable, args: tuple, kwargs: dict[str, Any], keys: tuple, order: int) -> None:
        super().__init__(op, args, kwargs, keys, order)
        self.p = self.value.exp()

    def push(self, key: Key, stack: Tensor) -> Tensor:
        if self._kept is not None and self._kept[0] is stack:
            return self._kept[1]
        return stack - self._mean(stack)

    def pull(self, key: Key, stack: Tensor) -> Tensor:
        return stack - stack.sum(self.axis, keepdim=True) * self.p

    def _weight(self, lam: Tensor) -> Tensor:
        return -lam.sum(self.axis, keepdim=True) * self.p

    def _own_third(self, lam: Tensor, centred: Tensor) -> Tensor:
        return centred * (self._weight(lam) / 3)

    def pull_second(self, key: Key, lam: Tensor, tangents: Stacks) -> Stack:
        x = tangents[key]
        return Stack(x.groups, self._centred(x) * self._weight(lam))

    def bend(self, tangents: Stacks) -> Stack:
        ((_, x),) = tangents.items()
        variance = self._mean(self._centred(x).square())
        return Stack(x.groups, (-variance).expand_as(x.data))
