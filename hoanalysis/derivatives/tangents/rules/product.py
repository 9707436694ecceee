"""Product nodes: bilinear in two arguments, such as linear, conv, matmul and mul; a bias may be added.

With inputs (a, b) and tangents (a_s, b_s),

    phi''[s, t] = a_s b_t + a_t b_s        phi''' = 0

A weight whose tensor is one group has a single tangent, so that each sum below costs a few products in all. Tied,
re-parameterized and finely partitioned weights have a stack of them, like activations; each contraction is then done on
the side where it is cheapest: on the output, on a, or on b.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hoanalysis.derivatives.tangents.groups import Sums, common, flat, take
from hoanalysis.derivatives.tangents.kernels import by_rows, by_rows_into, by_rows_onto
from hoanalysis.derivatives.tangents.rules.base import Key, Local, Stack, Stacks, rule
from hoanalysis.derivatives.tangents.shapes import lift, spread, sum_to

aten = torch.ops.aten


class Product(Local):
    """phi(a, b) = a b (+ c): the terms of second and third order from three bilinear maps.

    `apply`, `pull_a` and `pull_b` take plain tensors or stacks, as the flags say; two stacks are paired row by row.
    """

    kind = "product"
    keys: tuple[Key, Key] = (0, 1)
    work: float  # multiply-adds of one product

    def __init__(self, op: Callable, args: tuple, kwargs: dict[str, Any], keys: tuple, order: int) -> None:
        self.args, self.kwargs = args, kwargs
        self.value = op(*args, **kwargs)
        self.a, self.b = args[self.keys[0]], args[self.keys[1]]
        self.work = self.count()
        self._mu: tuple[Tensor | None, Tensor | None] = (None, None)

    @classmethod
    def is_curved(cls, keys: frozenset) -> bool:
        return cls.keys[0] in keys and cls.keys[1] in keys

    # ---- what a product defines ---------------------------------------------------------------------------------

    def count(self) -> float:
        return float(self.value.numel())

    def apply(self, a: Tensor, b: Tensor, stacked_a: bool, stacked_b: bool) -> Tensor:
        raise NotImplementedError

    def pull_a(self, y: Tensor, b: Tensor, stacked_y: bool, stacked_b: bool) -> Tensor:
        raise NotImplementedError

    def pull_b(self, y: Tensor, a: Tensor, stacked_y: bool, stacked_a: bool) -> Tensor:
        raise NotImplementedError

    # ---- first order --------------------------------------------------------------------------------------------

    def push(self, key: Key, stack: Tensor) -> Tensor:
        if key == self.keys[0]:
            return self.apply(stack, self.b, True, False)
        if key == self.keys[1]:
            return self.apply(self.a, stack, False, True)
        return self.push_bias(stack)

    def pull(self, key: Key, stack: Tensor) -> Tensor:
        if key == self.keys[0]:
            return self.pull_a(stack, self.b, True, False)
        if key == self.keys[1]:
            return self.pull_b(stack, self.a, True, False)
        return self.pull_bias(stack)

    def push_bias(self, stack: Tensor) -> Tensor:
        raise NotImplementedError

    def pull_bias(self, stack: Tensor) -> Tensor:
        raise NotImplementedError

    # ---- second and third order ---------------------------------------------------------------------------------

    def _factors(self, tangents: Stacks) -> tuple[Stack, Stack] | None:
        a, b = tangents.get(self.keys[0]), tangents.get(self.keys[1])
        return None if a is None or b is None else (a, b)

    def second(self, sums: Sums, lam: Tensor, tangents: Stacks) -> None:
        if (pair := self._factors(tangents)) is None:
            return
        a, b = pair
        ka, kb = len(a.groups), len(b.groups)
        on_a = kb * self.work + ka * kb * self.a.numel()
        on_b = ka * self.work + ka * kb * self.b.numel()
        if on_a <= on_b:
            mu = self.pull_a(lam, b.data, False, True)
            self._mu = (mu, None)
            sums.add2(a.groups, b.groups, flat(a.data) @ flat(mu).T, both=True)
        else:
            mu = self.pull_b(lam, a.data, False, True)
            self._mu = (None, mu)
            sums.add2(a.groups, b.groups, flat(mu) @ flat(b.data).T, both=True)

    def third(self, sums: Sums, lam: Tensor, lamT: Stack | None, tangents: Stacks) -> None:
        pair = self._factors(tangents)
        if pair is None or lamT is None:
            return
        a, b = pair
        r, ka, kb = len(lamT.groups), len(a.groups), len(b.groups)
        triples = r * ka * kb
        cost = {
            "out": min(ka, kb) * max(ka, kb) * self.work + triples * self.value.numel(),
            "a": r * kb * self.work + triples * self.a.numel(),
            "b": r * ka * self.work + triples * self.b.numel(),
        }
        side = min(cost, key=lambda name: cost[name])
        G = torch.empty(r, ka, kb, dtype=torch.float64)
        A, B, Y = flat(a.data), flat(b.data), flat(lamT.data)
        if side == "out" and ka >= kb:
            for t in range(kb):
                G[:, :, t] = Y @ flat(self.apply(a.data, b.data[t], True, False)).T
        elif side == "out":
            for s in range(ka):
                G[:, s] = Y @ flat(self.apply(a.data[s], b.data, False, True)).T
        elif side == "a":
            for t in range(kb):
                G[:, :, t] = flat(self.pull_a(lamT.data, b.data[t], True, False)) @ A.T
        else:
            for s in range(ka):
                G[:, s] = flat(self.pull_b(lamT.data, a.data[s], True, False)) @ B.T
        sums.add3_six((lamT.groups, a.groups, b.groups), G)

    def pull_second(self, key: Key, lam: Tensor, tangents: Stacks) -> Stack | None:
        if (pair := self._factors(tangents)) is None:
            return None
        a, b = pair
        if key == self.keys[0]:
            mu = self._mu[0]
            return Stack(b.groups, self.pull_a(lam, b.data, False, True) if mu is None else mu)
        if key == self.keys[1]:
            mu = self._mu[1]
            return Stack(a.groups, self.pull_b(lam, a.data, False, True) if mu is None else mu)
        return None

    def release(self) -> None:
        self._mu = (None, None)

    def bend(self, tangents: Stacks) -> Stack | None:
        if (pair := self._factors(tangents)) is None:
            return None
        a, b = pair
        both = common(a.groups, b.groups)
        if not both:
            return None
        return Stack(both, 2 * self._paired(take(a.data, a.groups, both), take(b.data, b.groups, both)))

    def _paired(self, a: Tensor, b: Tensor) -> Tensor:
        return self.apply(a, b, True, True)

    def diagonal(self, sums: Sums, lam: Tensor, tangents: Stacks, bent: Stacks) -> None:
        for mine, other in (self.keys, self.keys[::-1]):
            x2, x = bent.get(mine), tangents.get(other)
            if x2 is None or x is None or not (both := common(x2.groups, x.groups)):
                continue
            u, v = take(x2.data, x2.groups, both), take(x.data, x.groups, both)
            y = self._paired(u, v) if mine == self.keys[0] else self._paired(v, u)
            sums.add_diagonal(both, 3 * (flat(y) @ lam.flatten()))


@rule(aten.mul.Tensor, aten.mul.Scalar, aten.div.Scalar)
class Multiply(Product):
    """a * b with broadcasting. A number as one factor makes it linear."""

    keys = (0, 1)

    def __init__(self, op: Callable, args: tuple, kwargs: dict[str, Any], keys: tuple, order: int) -> None:
        if op is aten.div.Scalar:
            args = (args[0], 1 / args[1])
        like = next(a for a in args if isinstance(a, Tensor))
        args = tuple(
            a if isinstance(a, Tensor) else torch.as_tensor(a, dtype=like.dtype, device=like.device) for a in args
        )
        super().__init__(torch.mul, args, {}, keys, order)

    def _times(self, x: Tensor, y: Tensor, stacked_x: bool, stacked_y: bool) -> Tensor:
        n = self.value.dim()
        if stacked_x:
            x = lift(x, n)
        if stacked_y:
            y = lift(y, n)
        out = x * y
        return out if out.dtype == self.value.dtype else out.to(self.value.dtype)

    def apply(self, a: Tensor, b: Tensor, stacked_a: bool, stacked_b: bool) -> Tensor:
        out = self._times(a, b, stacked_a, stacked_b)
        return spread(out, self.value.shape) if stacked_a or stacked_b else out

    def push_into(self, key: Key, stack: Tensor, out: Tensor) -> None:
        if key == 0 or key == 1:
            torch.mul(lift(stack, self.value.dim()), self.b if key == 0 else self.a, out=out)
        else:
            out.copy_(self.push_bias(stack))

    def push_onto(self, key: Key, stack: Tensor, out: Tensor) -> None:
        if key == 0 or key == 1:
            out.addcmul_(lift(stack, self.value.dim()), self.b if key == 0 else self.a)
        else:
            out += self.push_bias(stack)

    def pull_a(self, y: Tensor, b: Tensor, stacked_y: bool, stacked_b: bool) -> Tensor:
        out = self._times(y, b, stacked_y, stacked_b)
        return sum_to(out, self.a.shape).to(self.a.dtype) if stacked_y or stacked_b else out

    def pull_b(self, y: Tensor, a: Tensor, stacked_y: bool, stacked_a: bool) -> Tensor:
        out = self._times(y, a, stacked_y, stacked_a)
        return sum_to(out, self.b.shape).to(self.b.dtype) if stacked_y or stacked_a else out


def scale_shift(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """weight * x + bias with broadcasting: the affine part of a norm, as one node."""
    return torch.addcmul(bias, weight, x)


@rule(scale_shift)
class ScaleShift(Multiply):
    """`Multiply`, and a bias."""

    def __init__(self, op: Callable, args: tuple, kwargs: dict[str, Any], keys: tuple, order: int) -> None:
        Product.__init__(self, op, args, kwargs, keys, order)

    def push_bias(self, stack: Tensor) -> Tensor:
        return spread(stack, self.value.shape)

    def pull_bias(self, stack: Tensor) -> Tensor:
        return sum_to(stack, self.args[2].shape)


@rule(aten.linear.default)
class LinearLayer(Product):
    """x W^T + c, with the tangent axis folded into the rows of x: one matrix product per stack."""

    def count(self) -> float:
        return float(self.value.numel()) * self.b.shape[-1]

    def apply(self, a: Tensor, b: Tensor, stacked_a: bool, stacked_b: bool) -> Tensor:
        if not stacked_b:
            return by_rows(a, b)
        a = a.reshape(len(b), -1, a.shape[-1]) if stacked_a else a.reshape(-1, a.shape[-1])
        return torch.matmul(a, b.mT).reshape(len(b), *self.value.shape)

    def pull_a(self, y: Tensor, b: Tensor, stacked_y: bool, stacked_b: bool) -> Tensor:
        if not stacked_b:
            return by_rows(y, b.mT)
        y = y.reshape(len(b), -1, y.shape[-1]) if stacked_y else y.reshape(-1, y.shape[-1])
        return torch.matmul(y, b).reshape(len(b), *self.a.shape)

    def pull_b(self, y: Tensor, a: Tensor, stacked_y: bool, stacked_a: bool) -> Tensor:
        y = y.reshape(len(y), -1, y.shape[-1]) if stacked_y else y.reshape(-1, y.shape[-1])
        a = a.reshape(len(a), -1, a.shape[-1]) if stacked_a else a.reshape(-1, a.shape[-1])
        return torch.matmul(y.mT, a)

    def push_into(self, key: Key, stack: Tensor, out: Tensor) -> None:
        if key == 0:
            by_rows_into(stack, self.b, out)
        elif key == 1 and len(stack) == 1:
            by_rows_into(self.a, stack[0], out)
        else:
            out.copy_(self.push(key, stack))

    def push_onto(self, key: Key, stack: Tensor, out: Tensor) -> None:
        if key == 0:
            by_rows_onto(stack, self.b, out)
        else:
            out += self.push(key, stack)

    def push_bias(self, stack: Tensor) -> Tensor:
        return spread(stack, self.value.shape)

    def pull_bias(self, stack: Tensor) -> Tensor:
        return sum_to(stack, self.args[2].shape)


@rule(aten.matmul.default, aten.mm.default, aten.bmm.default)
class MatrixProduct(Product):
    """a @ b with broadcasting of leading axes; both have at least two axes (others are decomposed)."""

    def count(self) -> float:
        return float(self.value.numel()) * self.a.shape[-1]

    def _multiply(self, x: Tensor, y: Tensor, stacked_x: bool, stacked_y: bool) -> Tensor:
        n = self.value.dim()
        return torch.matmul(lift(x, n) if stacked_x else x, lift(y, n) if stacked_y else y)

    def apply(self, a: Tensor, b: Tensor, stacked_a: bool, stacked_b: bool) -> Tensor:
        return self._multiply(a, b, stacked_a, stacked_b)

    def _batched(self, key: Key, stack: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The product as one batch of matrices: the fixed factor is repeated, which is small beside the output."""
        shape = out.shape[:-2]
        pair = (stack, self.b) if key == 0 else (self.a, stack)
        x, y = (lift(t, self.value.dim()) if t is stack else t for t in pair)
        x, y = (t.expand(*shape, *t.shape[-2:]).reshape(-1, *t.shape[-2:]) for t in (x, y))
        return out.view(-1, *out.shape[-2:]), x, y

    def push_into(self, key: Key, stack: Tensor, out: Tensor) -> None:
        flat, x, y = self._batched(key, stack, out)
        torch.bmm(x, y, out=flat)

    def push_onto(self, key: Key, stack: Tensor, out: Tensor) -> None:
        flat, x, y = self._batched(key, stack, out)
        flat.baddbmm_(x, y)

    def pull_a(self, y: Tensor, b: Tensor, stacked_y: bool, stacked_b: bool) -> Tensor:
        return sum_to(self._multiply(y, b.mT, stacked_y, stacked_b), self.a.shape)

    def pull_b(self, y: Tensor, a: Tensor, stacked_y: bool, stacked_a: bool) -> Tensor:
        return sum_to(self._multiply(a.mT, y, stacked_a, stacked_y), self.b.shape)


@rule(aten.convolution.default)
class Convolution(Product):
    """x * W + c in any number of axes, also transposed, with the tangent axis folded into the batch."""

    def __init__(self, op: Callable, args: tuple, kwargs: dict[str, Any], keys: tuple, order: int) -> None:
        self.rest = args[3:]
        super().__init__(op, args, kwargs, keys, order)

    def count(self) -> float:
        transposed, groups = self.rest[3], self.rest[5]
        through = self.a if transposed else self.value
        return float(through.numel()) * self.b[0].numel() / (groups if transposed else 1)

    def _conv(self, a: Tensor, b: Tensor) -> Tensor:
        return aten.convolution.default(a, b, None, *self.rest)

    def _backward(self, y: Tensor, a: Tensor, b: Tensor, mask: list[bool]) -> Tensor:
        out = aten.convolution_backward.default(y, a, b, None, *self.rest, mask)
        return out[0] if mask[0] else out[1]

    def apply(self, a: Tensor, b: Tensor, stacked_a: bool, stacked_b: bool) -> Tensor:
        if not stacked_b:
            return self._conv(a.flatten(0, 1), b).view(len(a), *self.value.shape)
        return torch.stack([self._conv(a[i] if stacked_a else a, w) for i, w in enumerate(b)])

    def push_into(self, key: Key, stack: Tensor, out: Tensor) -> None:
        if key != 1:
            super().push_into(key, stack, out)
            return
        for w, into in zip(stack, out, strict=True):
            into.copy_(self._conv(self.a, w))

    def pull_a(self, y: Tensor, b: Tensor, stacked_y: bool, stacked_b: bool) -> Tensor:
        if not stacked_b:
            folded = y.flatten(0, 1)
            like = self.a.new_empty(()).expand(len(folded), *self.a.shape[1:])
            return self._backward(folded, like, b, [True, False, False]).view(len(y), *self.a.shape)
        rows = [self._backward(y[i] if stacked_y else y, self.a, w, [True, False, False]) for i, w in enumerate(b)]
        return torch.stack(rows)

    def pull_b(self, y: Tensor, a: Tensor, stacked_y: bool, stacked_a: bool) -> Tensor:
        n = len(y) if stacked_y else len(a)
        pairs = ((y[i] if stacked_y else y, a[i] if stacked_a else a) for i in range(n))
        return torch.stack([self._backward(u, v, self.b, [False, True, False]) for u, v in pairs])

    def push_bias(self, stack: Tensor) -> Tensor:
        return stack.view(len(stack), 1, -1, *[1] * (self.value.dim() - 2)).expand(len(stack), *self.value.shape)

    def pull_bias(self, stack: Tensor) -> Tensor:
        return stack.sum([1, *range(3, stack.dim())])
