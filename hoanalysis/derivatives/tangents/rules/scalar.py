"""Scalar functions, elementwise: y = sigma(x), with sigma', sigma'', sigma''' by nested autodiff, not by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hoanalysis.derivatives.tangents.groups import Sums, add_rows, blocks, flat, take, triple_products, weighted_gram
from hoanalysis.derivatives.tangents.rules.base import Key, Local, Stack, Stacks, rule

aten = torch.ops.aten


def derivatives(f: Callable[[Tensor], Tensor], x: Tensor, order: int) -> list[Tensor]:
    """[sigma(x), sigma'(x), ..] up to ``order``, elementwise.

    In reverse mode: the gradient of sum(sigma(x)) is sigma'(x), and torch knows more second derivatives of activations
    in reverse than in forward mode (silu, softplus).
    """
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        found = [f(z)]
        for d in range(1, order + 1):
            y = found[-1]
            if not y.requires_grad:
                found.append(torch.zeros_like(x))
                continue
            (slope,) = torch.autograd.grad(y.sum(), z, create_graph=d < order, allow_unused=True)
            found.append(torch.zeros_like(x) if slope is None else slope)
    return [y.detach() for y in found]


class Scalar(Local):
    """sigma(x). Contractions are matrix products of the tangents with weights lam sigma'' and lam sigma'''."""

    kind = "scalar"

    def __init__(self, op: Callable, args: tuple, kwargs: dict[str, Any], keys: tuple, order: int) -> None:
        (key,) = keys
        fixed = list(args)
        x = args[key].detach()

        def f(z: Tensor) -> Tensor:
            fixed[key] = z
            return op(*fixed, **kwargs)

        self.value, *self.d = derivatives(f, x, max(order, 1))

    @classmethod
    def is_curved(cls, keys: frozenset) -> bool:
        return True

    def push(self, key: Key, stack: Tensor) -> Tensor:
        return stack * self.d[0]

    pull = push

    def push_into(self, key: Key, stack: Tensor, out: Tensor) -> None:
        torch.mul(stack, self.d[0], out=out)

    def push_onto(self, key: Key, stack: Tensor, out: Tensor) -> None:
        out.addcmul_(stack, self.d[0])

    def second(self, sums: Sums, lam: Tensor, tangents: Stacks) -> None:
        ((_, x),) = tangents.items()
        sums.add2(x.groups, x.groups, weighted_gram(flat(x.data), (lam * self.d[1]).flatten()))

    def third(self, sums: Sums, lam: Tensor, lamT: Stack | None, tangents: Stacks) -> None:
        # sigma''' enters with 1/3 because the triple product places it three times
        ((_, x),) = tangents.items()
        T = flat(x.data)
        own = T * (lam * self.d[2]).flatten().div(3)
        if lamT is None:
            triple_products(sums, x.groups, T, x.groups, own)
            return
        total = flat(lamT.data) * self.d[1].flatten()
        groups, total = add_rows(lamT.groups, total, x.groups, own)
        triple_products(sums, x.groups, T, groups, total)

    def pull_second(self, key: Key, lam: Tensor, tangents: Stacks) -> Stack:
        x = tangents[key]
        return Stack(x.groups, x.data * (lam * self.d[1]))

    def bend(self, tangents: Stacks) -> Stack:
        ((_, x),) = tangents.items()
        out = torch.empty_like(x.data)
        for i in blocks(out):
            torch.mul(x.data[i], x.data[i], out=out[i]).mul_(self.d[1])
        return Stack(x.groups, out)

    def diagonal(self, sums: Sums, lam: Tensor, tangents: Stacks, bent: Stacks) -> None:
        ((_, x),) = tangents.items()
        third, second = (lam * self.d[2]).flatten(), (lam * self.d[1]).flatten()
        T = flat(x.data)
        parts = [(T[i] * T[i]).mul_(T[i]) @ third for i in blocks(T)]
        sums.add_diagonal(x.groups, torch.cat(parts))
        for x2 in bent.values():
            t, t2 = flat(take(x.data, x.groups, x2.groups)), flat(x2.data)
            parts = [(t[i] * t2[i]) @ second for i in blocks(t)]
            sums.add_diagonal(x2.groups, 3 * torch.cat(parts))


rule(
    aten.tanh.default,
    aten.gelu.default,
    aten.silu.default,
    aten.sigmoid.default,
    aten.exp.default,
    aten.expm1.default,
    aten.log.default,
    aten.log1p.default,
    aten.log2.default,
    aten.exp2.default,
    aten.sqrt.default,
    aten.rsqrt.default,
    aten.reciprocal.default,
    aten.pow.Tensor_Scalar,
    aten.pow.Scalar,
    aten.square.default,
    aten.erf.default,
    aten.erfc.default,
    aten.sin.default,
    aten.cos.default,
    aten.tan.default,
    aten.atan.default,
    aten.sinh.default,
    aten.cosh.default,
    aten.softplus.default,
    aten.log_sigmoid.default,
    aten.elu.default,
    aten.selu.default,
    aten.celu.default,
    aten.mish.default,
    aten.hardswish.default,
)(Scalar)
