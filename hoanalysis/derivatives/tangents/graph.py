"""The graph of one batch's loss: nodes with their rules, and what follows from structure alone.

A node is *live* where its value depends differentiably on a parameter and the output on its value; it is *curved* where
the second derivative of its own map, between its live inputs, is not identically zero. An adjoint is needed only where
something curved lies at or above the node: D1 comes out of the forward tangents, and no weight gradient is ever formed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hoanalysis.derivatives.tangents.rules import Local, rule_for

#: Where an input sits among a node's arguments: a position, a keyword, or a position inside a list.
Key = int | str | tuple[int, int]


class TangentsUnsupported(Exception):
    """The engine cannot take this model, batch or request; its text is the reason, for provenance."""


class NotFinite(TangentsUnsupported):
    """A derivative is not finite where the loss is: of this batch at these weights, and not of the model."""


class OtherBranch(TangentsUnsupported):
    """The call took another branch, or other shapes, than the batch or weights that it was captured with."""


@dataclass(frozen=True)
class Ref:
    """A reference to another node's value."""

    index: int


@dataclass
class Node:
    """One operation. ``op`` is None for inputs and constants."""

    index: int
    op: Callable | None
    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    live: bool = False
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    parameter: str | None = None
    rule: type[Local] | None = None
    inputs: dict[Key, int] = field(default_factory=dict)  # all of them
    sources: dict[Key, int] = field(default_factory=dict)  # the live ones
    curved: bool = False
    needs_adjoint: bool = False
    work: float = 0.0  # multiply-adds of a product
    feeds_curved: bool = False  # something curved lies below
    guard: Any = None  # what Python saw of this value; see `guard_of`

    @property
    def name(self) -> str:
        return str(self.op) if isinstance(self.op, torch._ops.OpOverload) else getattr(self.op, "__name__", "input")


@dataclass
class Graph:
    """Nodes in an order of evaluation. The first are the inputs: parameters, fixed tensors, batch tensors."""

    nodes: list[Node]
    n_inputs: int
    constants: dict[int, Any]
    output: int
    last_use: list[int] = field(default_factory=list)
    last_live_use: list[int] = field(default_factory=list)

    def finish(self) -> None:
        """Mark what is needed, curved and in need of an adjoint, and when each value is used last."""
        needed, felt = self._reachable(), self._felt()
        self.last_use = list(range(len(self.nodes)))
        self.last_live_use = list(range(len(self.nodes)))
        for n in self.nodes:
            if n.index not in needed:
                n.op, n.live, n.rule, n.sources = None, n.live and n.parameter is not None, None, {}
                continue
            for i in n.inputs.values():
                self.last_use[i] = n.index
            if n.op is not None and n.index not in felt:
                n.live = False  # evaluated all the same: its value enters through a detach, a comparison or an index
            if n.op is None or not n.live:
                continue
            n.sources = {k: i for k, i in n.inputs.items() if self.nodes[i].live}
            for i in n.sources.values():
                self.last_live_use[i] = n.index
            n.rule = rule_for(n.op)
            assert n.rule is not None
            n.curved = n.rule.is_curved(frozenset(n.sources))
            n.needs_adjoint = n.curved or any(self.nodes[i].needs_adjoint for i in n.sources.values())
        self.last_use[self.output] = len(self.nodes)  # whatever reads the loss
        for n in reversed(self.nodes):
            for i in n.sources.values():
                self.nodes[i].feeds_curved |= n.curved or n.feeds_curved

    def _reachable(self) -> set[int]:
        """Nodes that the output or a guard depends on."""
        guards = [n.index for n in self.nodes if n.guard is not None and n.op is not None]
        found: set[int] = set()
        todo = [self.output, *guards]
        while todo:
            i = todo.pop()
            if i not in found:
                found.add(i)
                todo += list(self.nodes[i].inputs.values())
        return found

    def _felt(self) -> set[int]:
        """Nodes on which the output depends differentiably: by a path on which every node is live."""
        found: set[int] = set()
        todo = [self.output]
        while todo:
            i = todo.pop()
            if i not in found and self.nodes[i].live:
                found.add(i)
                todo += list(self.nodes[i].inputs.values())
        return found

    def live_nodes(self) -> Iterator[Node]:
        return (n for n in self.nodes if n.live and n.op is not None)

    def used_parameters(self) -> set[str]:
        """Parameters from which the output can be reached through live nodes."""
        return {
            str(self.nodes[i].parameter)
            for n in self.live_nodes()
            for i in n.sources.values()
            if self.nodes[i].parameter is not None
        }

    def description(self) -> dict[str, dict[str, int]]:
        """How many live nodes each op has under each kind of rule: ``{"product": {"aten.linear.default": 3}, ..}``."""
        counts: dict[str, Counter] = {}
        for n in self.live_nodes():
            assert n.rule is not None
            counts.setdefault(n.rule.kind, Counter())[n.name] += 1
        return {kind: dict(c) for kind, c in sorted(counts.items())}


def guard_of(op: Callable, value: Any) -> Any:
    """What Python saw of an op's value and may have branched on: a number or its shape. None: nothing.

    The graph is that of the branch which was taken, and right for other values wherever these guards are the same.
    """
    if not isinstance(op, torch._ops.OpOverload):
        return None
    if op in READ or reads(op):
        return value.tolist() if isinstance(value, Tensor) else value
    if torch.Tag.dynamic_output_shape in op.tags:
        return [tuple(v.shape) for v in (value if isinstance(value, (tuple, list)) else [value])]
    return None


#: What remains in a trace of ``tolist``, unused: it reads the memory behind torch's back.
READ = (torch.ops.aten.resolve_neg.default,)


def reads(op: Callable) -> bool:
    """Whether an op gives Python a number."""
    return isinstance(op, torch._ops.OpOverload) and torch.Tag.data_dependent_output in op.tags


def flatten_inputs(args: tuple, kwargs: dict[str, Any]) -> dict[Key, int]:
    """The references among the arguments, by key."""
    found: dict[Key, int] = {}
    for i, a in enumerate(args):
        if isinstance(a, Ref):
            found[i] = a.index
        elif isinstance(a, (list, tuple)):
            found.update({(i, j): x.index for j, x in enumerate(a) if isinstance(x, Ref)})
    found.update({k: a.index for k, a in kwargs.items() if isinstance(a, Ref)})
    return found


def substitute(args: Any, values: list[Any]) -> Any:
    """The arguments with every reference replaced by its value."""
    if isinstance(args, Ref):
        return values[args.index]
    if isinstance(args, tuple):
        return tuple(substitute(a, values) for a in args)
    if isinstance(args, list):
        return [substitute(a, values) for a in args]
    if isinstance(args, dict):
        return {k: substitute(a, values) for k, a in args.items()}
    return args


def lowest_dtype(graph: Graph) -> torch.dtype:
    """The coarsest floating dtype of any live value: the accuracy that two evaluations of the loss can agree to."""
    found = {n.dtype for n in graph.nodes if n.live and n.dtype is not None and n.dtype.is_floating_point}
    return max(found, key=lambda d: torch.finfo(d).eps) if found else torch.float64


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
