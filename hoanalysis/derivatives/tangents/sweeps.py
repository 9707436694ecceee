"""The sweeps over one batch's graph.

forward      values, and each node's local rule
backward     adjoints lam = dL/dx, only where something curved lies at or above the node
streaming    forward once more with tangents x_s: D1 at the output, D2 (and the third diagonal) node by node;
             a node's tangents are dropped after their last use
full         tangents kept, then backward with adjoint tangents lam^s: D2 and D3 node by node, dropping both
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hoanalysis.derivatives.tangents import attention, logits
from hoanalysis.derivatives.tangents.costs import active, tiled_attentions, tiled_logits
from hoanalysis.derivatives.tangents.graph import Graph, Key, Node, OtherBranch, guard_of, substitute
from hoanalysis.derivatives.tangents.groups import Groups, Sums, rows, union
from hoanalysis.derivatives.tangents.rules import Local, Stack, Stacks

Locals = dict[int, Local]


def forward(graph: Graph, inputs: list[Tensor], order: int) -> tuple[list[Any], Locals]:
    """Evaluate every node; live ones through their rule, prepared for derivatives up to ``order``."""
    values: list[Any] = [*inputs, *[None] * (len(graph.nodes) - len(inputs))]
    for i, constant in graph.constants.items():
        values[i] = constant
    local: Locals = {}
    for n in graph.nodes[len(inputs) :]:
        if n.op is None:
            continue
        args, kwargs = substitute(n.args, values), substitute(n.kwargs, values)
        if n.live:
            assert n.rule is not None
            local[n.index] = n.rule(n.op, args, kwargs, tuple(n.sources), order)
            values[n.index] = local[n.index].value
        else:
            values[n.index] = n.op(*args, **kwargs)
        if n.guard is not None and guard_of(n.op, values[n.index]) != n.guard:
            raise OtherBranch(f"the call depends on values: {n.op} gives {guard_of(n.op, values[n.index])}")
        for i in set(n.inputs.values()):
            if graph.last_use[i] == n.index and i >= len(inputs) and i not in graph.constants:
                values[i] = None  # the rules hold what they need
    return values, local


def adjoints(graph: Graph, local: Locals, loss: Tensor, lowest: int = 0) -> dict[int, Tensor]:
    """lam of every curved node from ``lowest`` on."""
    lam: dict[int, Tensor] = {graph.output: torch.ones_like(loss)}
    for n in reversed(graph.nodes[lowest:]):
        if n.index not in local or not n.needs_adjoint:
            continue
        for key, i in n.sources.items():
            if graph.nodes[i].needs_adjoint:
                part = _pull(graph, local[n.index], key, i, lam[n.index][None])[0]
                lam[i] = lam[i] + part if i in lam else part
        if not n.curved:
            del lam[n.index]
    return lam


def _pull(graph: Graph, rule: Local, key: Key, source: int, stack: Tensor) -> Tensor:
    """phi'^T of a stack, in the dtype of the input: operands of different dtypes are promoted before an op."""
    return rule.pull(key, stack).to(graph.nodes[source].dtype)


def assemble(parts: list[Stack], n: Node) -> Stack:
    """The sum of some stacks over the union of their groups."""
    if len(parts) == 1:
        return parts[0]
    return _sum([(p.groups, p.data, None) for p in parts], n)


def push_node(n: Node, local: Local, tangents: Stacks) -> Stack:
    """The first-order tangents of a node."""
    if len(tangents) == 1:
        ((key, t),) = tangents.items()
        return Stack(t.groups, local.push(key, t.data).to(n.dtype))
    return _sum([(t.groups, t.data, (local, key)) for key, t in tangents.items()], n)


def bend_node(n: Node, local: Local, tangents: Stacks, bents: Stacks) -> Stack | None:
    """The second tangents of a node: those of its inputs pushed through, and its own curvature."""
    own = local.bend(tangents) if n.curved else None
    if own is None and len(bents) < 2:
        return push_node(n, local, bents) if bents else None
    if own is not None and not bents:
        return own
    parts: list[tuple[Groups, Tensor, tuple[Local, Key] | None]] = []
    if own is not None:
        have = set(own.groups)
        if own.data.is_contiguous() and all(have.issuperset(b.groups) for b in bents.values()):
            for key, b in bents.items():
                _onto(own, b, local, key)
            return own
        parts.append((own.groups, own.data, None))
    parts += [(b.groups, b.data, (local, key)) for key, b in bents.items()]
    return _sum(parts, n)


def _onto(total: Stack, part: Stack, local: Local, key: Key) -> None:
    """total += push(part), in place; the groups of ``part`` are among those of ``total``."""
    where = rows(part.groups, total.groups)
    if isinstance(where, slice):
        local.push_onto(key, part.data, total.data[where])
    else:
        total.data.index_add_(0, where, local.push(key, part.data).contiguous())


def _sum(parts: list[tuple[Groups, Tensor, tuple[Local, Key] | None]], n: Node) -> Stack:
    """The sum of a node's stacks, each pushed through a rule where one is given, straight into its rows."""
    groups: Groups = ()
    for g, _, _ in parts:
        groups = union(groups, g)
    out = parts[0][1].new_empty(len(groups), *(n.shape or ()), dtype=n.dtype)
    written: set[int] = set()
    for have, data, through in sorted(parts, key=lambda p: -len(p[0])):
        where = rows(have, groups)
        if written.isdisjoint(have) and isinstance(where, slice):
            if through is None:
                out[where] = data
            else:
                through[0].push_into(through[1], data, out[where])
        elif through is not None and written.issuperset(have) and isinstance(where, slice):
            through[0].push_onto(through[1], data, out[where])
        else:
            pushed = data if through is None else through[0].push(through[1], data)
            if new := tuple(g for g in have if g not in written):
                out[rows(new, groups)] = pushed[rows(new, have)]
            old = tuple(g for g in have if g in written)
            into = rows(old, groups)
            if isinstance(into, slice):
                out[into] += pushed[rows(old, have)]
            else:
                out.index_add_(0, into, pushed[rows(old, have)].contiguous())
        written.update(have)
    return Stack(groups, out)


def stream(
    graph: Graph, local: Locals, loss: Tensor, leaves: Mapping[int, Stack], sums: Sums, second: bool = True
) -> None:
    """D1 and, where ``second`` is set, D2 and (where ``sums`` asks for it) the third diagonal, holding only the stacks
    still to be used."""
    T: dict[int, Stack] = dict(leaves)
    bent: dict[int, Stack] = {}
    groups = active(graph, {i: leaf.groups for i, leaf in leaves.items()})
    heads = {h.product.index: h for h in tiled_logits(graph, groups)}
    cut_off = logits.below(graph, list(heads.values()))  # reached by no tangent
    together = {a.output.index: a for a in tiled_attentions(graph, groups)} if second else {}
    inner = {n.index for a in together.values() for n in a.inner} | cut_off
    last = list(graph.last_live_use)
    for i, source in ((i, source) for i, a in together.items() for source in a.sources):
        last[source] = max(last[source], i)  # q and k are used where the output is, after all that lies between
    lam: dict[int, Tensor] = {}
    if second or heads:
        lam = adjoints(graph, local, loss, 0 if second else min(h.softmax.index for h in heads.values()))
    for n in graph.live_nodes():
        if n.index in inner:
            continue
        if (a := together.get(n.index)) is not None:
            T[n.index], bend = attention.stream(a, local, lam, T, bent, sums)
            if bend is not None and n.feeds_curved:
                bent[n.index] = bend
            for i in a.sources:
                if last[i] == n.index:
                    T.pop(i, None)
                    bent.pop(i, None)
            continue
        rule = local[n.index]
        tangents = {key: T[i] for key, i in n.sources.items() if i not in cut_off}
        bents = {key: bent[i] for key, i in n.sources.items() if i in bent}
        if (head := heads.get(n.index)) is not None:
            logits.stream(head, local, lam, tangents, bents, sums, second)
        else:
            if n.curved and second:
                rule.second(sums, lam[n.index], tangents)
            if sums.diagonal is not None:
                if n.curved:
                    rule.diagonal(sums, lam[n.index], tangents, bents)
                if n.feeds_curved and (bend := bend_node(n, rule, tangents, bents)) is not None:
                    bent[n.index] = bend
            T[n.index] = push_node(n, rule, tangents)
        rule.release()
        del tangents, bents
        for i in set(n.sources.values()):
            if last[i] == n.index:
                T.pop(i, None)
                bent.pop(i, None)
    _first(graph, T, sums)


def full(graph: Graph, local: Locals, loss: Tensor, leaves: Mapping[int, Stack], sums: Sums) -> None:
    """D1, D2 and D3: tangents forward, adjoint tangents backward."""
    T = _tangents(graph, local, leaves)
    _first(graph, T, sums)
    lam: dict[int, Tensor] = {graph.output: torch.ones_like(loss)}
    parts: dict[int, list[Stack]] = {}
    for n in reversed(graph.nodes):
        if n.index not in local or not n.needs_adjoint:
            continue
        rule, mine = local.pop(n.index), lam.pop(n.index)
        lamT = assemble(found, n) if (found := parts.pop(n.index, None)) else None
        tangents = {key: T[i] for key, i in n.sources.items()} if n.curved else {}
        if n.curved:
            rule.second(sums, mine, tangents)
            rule.third(sums, mine, lamT, tangents)
        for key, i in n.sources.items():
            if not graph.nodes[i].needs_adjoint:
                continue
            part = _pull(graph, rule, key, i, mine[None])[0]
            lam[i] = lam[i] + part if i in lam else part
            if lamT is not None:
                parts.setdefault(i, []).append(Stack(lamT.groups, _pull(graph, rule, key, i, lamT.data)))
            if n.curved and (own := rule.pull_second(key, mine, tangents)) is not None:
                parts.setdefault(i, []).append(own)
        rule.release()
        T.pop(n.index, None)


def _tangents(graph: Graph, local: Locals, leaves: Mapping[int, Stack]) -> dict[int, Stack]:
    """The tangents of every input of a curved node, and of the output."""
    T: dict[int, Stack] = dict(leaves)
    kept = {i for n in graph.live_nodes() if n.curved for i in n.sources.values()} | {graph.output}
    for n in graph.live_nodes():
        T[n.index] = push_node(n, local[n.index], {key: T[i] for key, i in n.sources.items()})
        for i in set(n.sources.values()):
            if graph.last_live_use[i] == n.index and i not in kept:
                T.pop(i, None)
    return T


def _first(graph: Graph, T: Mapping[int, Stack], sums: Sums) -> None:
    """D1 is the tangent of the output: no weight gradient is formed."""
    if graph.output in T:
        sums.add1(T[graph.output].groups, T[graph.output].data)
