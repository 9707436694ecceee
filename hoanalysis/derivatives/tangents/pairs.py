"""Complex numbers as pairs of real ones, as in rotary positions: the graph itself is real.

A complex value that depends on parameters is its real and its imaginary part. What `view_as_complex` begins is ended by
`view_as_real`, ``.real``, ``.imag`` or `abs`; in between are products, sums, and whatever only moves entries about.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from hoanalysis.derivatives.tangents.graph import Ref, TangentsUnsupported

if TYPE_CHECKING:
    from hoanalysis.derivatives.tangents.capture import Builder

aten = torch.ops.aten


@dataclass(frozen=True)
class Pair:
    """A complex value as references to two real ones."""

    real: Any
    imag: Any


#: Linear with real coefficients, and of one kind of operand: done to both parts alike.
ALIKE = {
    "add", "sub", "neg", "view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze", "permute",
    "transpose", "t", "expand", "contiguous", "clone", "slice", "select", "cat", "stack", "unbind", "split", "chunk",
    "split_with_sizes", "sum", "mean", "repeat", "repeat_interleave", "index_select", "index", "gather", "roll", "flip",
    "narrow", "alias",
}  # fmt: skip


def begins(b: Builder, op: Callable, args: tuple) -> Pair | None:
    """The pair that `view_as_complex` makes of a live value; None where it does not."""
    if op is not aten.view_as_complex.default or not b.is_live(args[0]):
        return None
    return Pair(b(aten.select.int, args[0], -1, 0), b(aten.select.int, args[0], -1, 1))


def concerned(args: tuple, kwargs: dict[str, Any]) -> bool:
    return any(isinstance(x, Pair) for x in pytree.tree_leaves((args, kwargs), is_leaf=lambda x: isinstance(x, Pair)))


def emit(b: Builder, op: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """An op with pairs among its arguments, in real ops."""
    name = op._schema.name.removeprefix("aten::") if isinstance(op, torch._ops.OpOverload) else op.__name__
    if name == "mul":
        return _product(b, _pair(b, args[0]), _pair(b, args[1]))
    if name in ALIKE:
        leaves, spec = pytree.tree_flatten((args, kwargs), is_leaf=lambda x: isinstance(x, Pair))
        halves = []
        for part in ("real", "imag"):
            a, k = pytree.tree_unflatten([_part(b, x, part) for x in leaves], spec)
            halves.append(b(op, *a, **k))
        real, imag = halves
        if isinstance(real, (tuple, list)):
            return tuple(Pair(x, y) for x, y in zip(real, imag, strict=True))
        return Pair(real, imag)
    x = args[0]
    if name == "view_as_real":
        return b(aten.stack.default, [x.real, x.imag], -1)
    if name in ("real", "imag"):
        return getattr(x, name)
    if name in ("conj", "_conj", "conj_physical"):
        return Pair(x.real, b(aten.neg.default, x.imag))
    if name in ("resolve_conj", "resolve_neg"):
        return x
    if name == "abs":
        squares = [b(aten.square.default, part) for part in (x.real, x.imag)]
        return b(aten.sqrt.default, b(aten.add.Tensor, *squares))
    raise TangentsUnsupported(f"{op} of complex numbers that depend on parameters")


def _pair(b: Builder, x: Any) -> Pair:
    """Any factor as a pair: a complex constant in its parts, a real value with no imaginary part."""
    if isinstance(x, Pair):
        return x
    value = b.value(x)
    if isinstance(x, Ref) and value.is_complex():
        parts = b(aten.view_as_real.default, b(aten.resolve_conj.default, x))
        return Pair(b(aten.select.int, parts, -1, 0), b(aten.select.int, parts, -1, 1))
    if isinstance(value, complex):
        return Pair(value.real, value.imag)
    return Pair(x, None)


def _part(b: Builder, x: Any, part: str) -> Any:
    """One part of an operand; sizes and other plain values as they are."""
    if isinstance(x, Pair) or (isinstance(x, Ref) and b.value(x).is_complex()):
        return getattr(_pair(b, x), part)
    if isinstance(x, Ref) and b.value(x).is_floating_point():
        return x if part == "real" else b(aten.zeros_like.default, x)
    return x


def _product(b: Builder, x: Pair, y: Pair) -> Pair:
    """(a + ib)(c + id) = ac - bd + i(ad + bc), without what is missing."""

    def times(u: Any, v: Any) -> Any:
        if u is None or v is None:
            return None
        u, v = (v, u) if not isinstance(u, Ref) else (u, v)
        return b(aten.mul.Tensor, u, v) if isinstance(v, Ref) else b(aten.mul.Scalar, u, v)

    ac, bd, ad, bc = times(x.real, y.real), times(x.imag, y.imag), times(x.real, y.imag), times(x.imag, y.real)
    real = ac if bd is None else b(aten.sub.Tensor, ac, bd)
    imag = ad if bc is None else bc if ad is None else b(aten.add.Tensor, ad, bc)
    return Pair(real, imag)
