"""What a rule is: one node's map phi at one batch, with its linearization and the terms of second and third order.

Stacks have the tangent axis in front: a stack of k tangents of a tensor of shape (B, C) has shape (k, B, C). A rule
sees which of its arguments are live by *key* (a position, a keyword, or a position inside a list).

To teach the engine a new op, subclass `Local` (or one of the three kinds) and register it::

    @rule(torch.ops.aten.neg.default)
    class Neg(Linear): ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hoanalysis.derivatives.tangents.groups import Groups, Sums

Key = Any


@dataclass
class Stack:
    """Tangents (or adjoint tangents) of one value for the groups that reach it: data[i] belongs to groups[i]."""

    groups: Groups
    data: Tensor


Stacks = dict[Key, Stack]


class Local:
    """One node at one batch. Constructed in the forward sweep: computes ``value`` and keeps what the others need.

    With x_s the tangents of the inputs, lam the adjoint of the output and lam^s its tangents::

        push(key, X)         phi'[X]                       for a stack X of one input
        pull(key, Y)         phi'^T Y                      for a stack Y of the output
        second(..)           D2[s,t]   += lam . phi''[x_s, x_t]
        third(..)            D3[s,t,u] += lam . phi'''[x_s,x_t,x_u] + lam^s . phi''[x_t,x_u] + two more
        pull_second(key, ..) lam . phi''[x_s, .]           the curvature's part of the adjoint tangents
        bend(..)             phi''[x_s, x_s]               the curvature's part of the second tangents
        diagonal(..)         sum over rows of lam . {phi'''[x,x,x] + 3 phi''[x2, x]}
    """

    kind = "linear"
    value: Tensor

    def __init__(self, op: Callable, args: tuple, kwargs: dict[str, Any], keys: tuple, order: int) -> None:
        raise NotImplementedError

    @classmethod
    def is_curved(cls, keys: frozenset) -> bool:
        """Whether phi'' between the live inputs ``keys`` can differ from zero."""
        return False

    def push(self, key: Key, stack: Tensor) -> Tensor:
        raise NotImplementedError

    def push_into(self, key: Key, stack: Tensor, out: Tensor) -> None:
        """`push` written to ``out``: worth overriding where it saves a copy of the whole stack."""
        out.copy_(self.push(key, stack))

    def push_onto(self, key: Key, stack: Tensor, out: Tensor) -> None:
        """`push` added to ``out``."""
        out += self.push(key, stack)

    def pull(self, key: Key, stack: Tensor) -> Tensor:
        raise NotImplementedError

    def second(self, sums: Sums, lam: Tensor, tangents: Stacks) -> None:
        raise NotImplementedError

    def third(self, sums: Sums, lam: Tensor, lamT: Stack | None, tangents: Stacks) -> None:
        raise NotImplementedError

    def pull_second(self, key: Key, lam: Tensor, tangents: Stacks) -> Stack | None:
        raise NotImplementedError

    def bend(self, tangents: Stacks) -> Stack | None:
        raise NotImplementedError

    def diagonal(self, sums: Sums, lam: Tensor, tangents: Stacks, bent: Stacks) -> None:
        raise NotImplementedError

    def release(self) -> None:
        """Drop what `second` kept for the calls after it."""


def operand(args: tuple, kwargs: dict[str, Any], key: Key) -> Any:
    """The argument at a key."""
    if isinstance(key, tuple):
        return args[key[0]][key[1]]
    return kwargs[key] if isinstance(key, str) else args[key]


def replaced(args: tuple, kwargs: dict[str, Any], values: Mapping[Key, Any]) -> tuple[list, dict[str, Any]]:
    """The arguments with those at some keys replaced."""
    new, named = [list(a) if isinstance(a, (list, tuple)) else a for a in args], dict(kwargs)
    for key, value in values.items():
        if isinstance(key, tuple):
            new[key[0]][key[1]] = value
        elif isinstance(key, str):
            named[key] = value
        else:
            new[key] = value
    return new, named


_RULES: dict[Callable, type[Local]] = {}


def rule(*ops: Callable) -> Callable[[type[Local]], type[Local]]:
    """Register a `Local` for some ops."""

    def register(cls: type[Local]) -> type[Local]:
        for op in ops:
            _RULES[op] = cls
        return cls

    return register


def rule_for(op: Callable) -> type[Local] | None:
    """The rule of an op, or None."""
    return _RULES.get(op)
