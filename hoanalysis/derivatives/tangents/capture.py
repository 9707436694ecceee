"""Capture: from ``problem.batch_value`` to a graph whose live nodes all have a rule.

`make_fx` traces the call with the batch's real tensors before autograd decomposes it, so that ``no_grad`` and
``detach`` are seen, and fused ops (linear, layer_norm, attention) arrive whole. Each op is then kept, where it has a
rule or is not live; taken apart by `decompositions`; taken apart by torch, where it is a composite; or given the
generic local rule.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from hoanalysis.derivatives.primitives import without_mkldnn
from hoanalysis.derivatives.tangents import pairs
from hoanalysis.derivatives.tangents.aliases import Aliases
from hoanalysis.derivatives.tangents.decompositions import DECOMPOSITIONS
from hoanalysis.derivatives.tangents.graph import (
    READ,
    Graph,
    Node,
    Ref,
    TangentsUnsupported,
    flatten_inputs,
    guard_of,
    is_float,
    reads,
    substitute,
)
from hoanalysis.derivatives.tangents.rules import rule, rule_for
from hoanalysis.derivatives.tangents.rules.generic import Generic

aten = torch.ops.aten

#: Ops whose derivative is zero almost everywhere, or that cut the graph on purpose.
STOPS = {
    "detach", "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty",
    "sign", "sgn", "floor", "ceil", "round", "trunc", "one_hot", "bucketize", "heaviside",
}  # fmt: skip


#: Ops of several views, taken apart always.
VIEWS = {
    aten.unbind.int, aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default,
}  # fmt: skip

#: Ops that make their argument another view of itself, and leave its other views alone.
RENAMING = {"detach_", "unsqueeze_", "squeeze_", "transpose_", "t_", "swapaxes_", "swapdims_"}


class Builder:
    """Lowers traced graphs into one list of nodes, evaluating as it goes so that shapes and views are known."""

    def __init__(self, inputs: list[Tensor], parameters: list[str]) -> None:
        self.nodes: list[Node] = []
        self.values: list[Any] = []
        self.constants: dict[int, Any] = {}
        self.grad = True
        self.aliases = Aliases(self)
        self._static: list[bool] = []  # depends on no input: evaluated once
        for i, value in enumerate(inputs):
            name = parameters[i] if i < len(parameters) else None
            self._append(Node(i, None, live=name is not None, parameter=name), value.detach(), static=False)
        self.n_inputs = len(inputs)

    # ---- what decompositions use --------------------------------------------------------------------------------

    def __call__(self, op: Callable, *args: Any, **kwargs: Any) -> Any:
        """Emit one op on references and plain arguments; a reference, or a tuple of them, comes back."""
        name = op._schema.name if isinstance(op, torch._ops.OpOverload) else op.__name__
        if pairs.concerned(args, kwargs):
            return pairs.emit(self, op, args, kwargs)
        if (pair := pairs.begins(self, op, args)) is not None:
            return pair
        if isinstance(op, torch._ops.OpOverload) and _written(op):
            return self._in_place(op, args, kwargs)
        inputs = flatten_inputs(args, kwargs)
        live = self.grad and any(self.nodes[i].live for i in inputs.values())
        if op in VIEWS:  # each view a node of its own, so that a write to it finds its way back
            return DECOMPOSITIONS[op](self, *args, **kwargs)
        if not live or name.removeprefix("aten::") in STOPS or reads(op):
            return self._emit(op, args, kwargs, inputs, live=False)
        if op in DECOMPOSITIONS or rule_for(op) is None:
            taken_apart = self._decompose(op, args, kwargs)
            if taken_apart is not None:
                return taken_apart
        return self._emit(op, args, kwargs, inputs, live=True)

    def value(self, x: Any) -> Any:
        """The example value behind a reference."""
        return self.values[x.index] if isinstance(x, Ref) else x

    def is_live(self, x: Any) -> bool:
        return isinstance(x, Ref) and self.nodes[x.index].live

    def constant(self, value: Any) -> Ref:
        ref = self._append(Node(len(self.nodes), None), value, static=True)
        self.constants[ref.index] = value
        return ref

    def fixed(self, op: Callable, *args: Any) -> tuple[Any, ...]:
        """Emit an op of several outputs whose derivative does not count; one reference for each output."""
        whole = self._emit(op, args, {}, flatten_inputs(args, {}), live=False)
        each = range(len(self.value(whole)))
        return tuple(self._emit(operator.getitem, (whole, i), {}, {0: whole.index}, live=False) for i in each)

    def again(self, node: Node, args: tuple, kwargs: dict[str, Any]) -> Ref:
        """A node of another graph once more, on other operands."""
        assert node.op is not None
        ref = self._emit(node.op, args, kwargs, flatten_inputs(args, kwargs), live=node.live)
        self.nodes[ref.index].guard = node.guard
        return ref

    # ---- lowering -----------------------------------------------------------------------------------------------

    def lower(self, module: fx.GraphModule, inputs: list[Any]) -> Any:
        """Inline a traced graph; returns the operands of its output."""
        env: dict[fx.Node, Any] = {}
        given = iter(inputs)
        position = {n: i for i, n in enumerate(module.graph.nodes)}

        def operands(x: Any) -> Any:
            return fx.node.map_arg(x, lambda n: env[n])

        for n in module.graph.nodes:
            if n.op == "placeholder":
                env[n] = next(given)
            elif n.op == "get_attr":
                value = operator.attrgetter(n.target)(module)
                env[n] = self.constant(value.detach() if isinstance(value, Tensor) else value)
            elif n.op == "output":
                return operands(n.args[0])
            elif n.target is torch._C._set_grad_enabled:
                self.grad = bool(n.args[0])
            elif getattr(n.target, "__name__", "") == "_enter_autocast":
                if n.args[2]:
                    raise TangentsUnsupported("the model switches autocast on")
                env[n] = None
            elif getattr(n.target, "__name__", "") == "_exit_autocast":
                continue
            elif n.target is operator.getitem:
                whole, i = operands(n.args[0]), n.args[1]
                env[n] = whole[i] if isinstance(whole, (tuple, list)) else self(operator.getitem, whole, i)
            elif not isinstance(n.target, torch._ops.OpOverload):
                raise TangentsUnsupported(f"the traced call contains {n.target}, which is not an op")
            else:
                env[n] = self(n.target, *operands(tuple(n.args)), **operands(dict(n.kwargs)))
                if n.target in READ and n.users and isinstance(env[n], Ref):
                    self.nodes[env[n].index].guard = None
                if _written(n.target):
                    later = {m: v for m, v in env.items() if any(position[u] > position[n] for u in m.users)}
                    env.update(self.aliases.updated(later))
        raise TangentsUnsupported("the traced call has no output")

    def _emit(self, op: Callable, args: tuple, kwargs: dict, inputs: dict, live: bool) -> Ref:
        static = not any(not self._static[i] for i in inputs.values()) and not _random(op)
        if _random(op):
            raise TangentsUnsupported(f"the loss draws random numbers: {op}")
        given_op, op = op, aten.reshape.default if op is aten.view.default else op  # strides may differ from the call's
        local, known = None, rule_for(op) if live else None
        with torch.no_grad():
            given, named = substitute(args, self.values), substitute(kwargs, self.values)
            if known is None:
                value = op(*given, **named)
            else:
                keys = tuple(k for k, i in inputs.items() if self.nodes[i].live)
                local = known(op, given, named, keys, 1)
                value = local.value
        if live and any(isinstance(v, Tensor) and v.is_complex() for v in pytree.tree_leaves(value)):
            raise TangentsUnsupported(f"{op} gives complex numbers")
        if live and not is_float(value):
            if isinstance(value, (tuple, list)) and any(is_float(v) for v in value):
                raise TangentsUnsupported(f"{op} gives several outputs and has no rule")
            live = False
        if live and rule_for(op) is None:
            if not isinstance(op, torch._ops.OpOverload):
                raise TangentsUnsupported(f"{op} has no rule")
            rule(op)(Generic)
        node = Node(len(self.nodes), op, args, kwargs, live, inputs=inputs, work=getattr(local, "work", 0.0))
        if not static:
            node.guard = guard_of(op, value)
        ref = self._append(node, value, static)
        self.aliases.note(ref, given_op, args, kwargs)
        if static and not live:
            self.constants[ref.index] = value
            node.op = None
        return ref

    def _append(self, node: Node, value: Any, static: bool) -> Ref:
        if isinstance(value, Tensor):
            node.shape, node.dtype = tuple(value.shape), value.dtype
        self.nodes.append(node)
        self.values.append(value)
        self._static.append(static)
        return Ref(node.index)

    def _in_place(self, op: torch._ops.OpOverload, args: tuple, kwargs: dict) -> Any:
        """An op that writes its first argument: the functional one, seen by every alias through `aliases`."""
        packet = op._schema.name.removeprefix("aten::")
        into = [a.name for a in op._schema.arguments if a.is_out]
        target = kwargs.get(into[0]) if len(into) == 1 else args[0]
        if not isinstance(target, Ref) or not (into or packet.endswith("_")):
            raise TangentsUnsupported(f"{op} writes to an argument")
        if self.is_live(target) and not self.grad:
            raise TangentsUnsupported(f"{op} writes under no_grad to what has a gradient")
        if into:
            others = {k: v for k, v in kwargs.items() if k not in into}
            return self.aliases.write(target, self(_without_out(op), *args, **others))
        value = self._written_value(op, packet, args, kwargs)
        if packet in RENAMING:
            return self.aliases.rename(target, value)
        return self.aliases.write(target, value)

    def _written_value(self, op: torch._ops.OpOverload, packet: str, args: tuple, kwargs: dict) -> Any:
        """What an op that writes its first argument leaves there."""
        like = self.value(args[0])
        if packet in ("copy_", "fill_") and isinstance(args[1], Ref):
            source = self(aten._to_copy.default, args[1], dtype=like.dtype)
            return self(aten.expand.default, source, list(like.shape))
        if packet in ("zero_", "fill_"):
            return self(aten.full_like.default, args[0], 0 if packet == "zero_" else args[1])
        family = getattr(aten, packet[:-1], None)
        functional = getattr(family, op._overloadname, None) or getattr(family, "int", None)  # transpose_ and the like
        if functional is None:
            raise TangentsUnsupported(f"{op} has no functional form")
        value = self(functional, *args, **kwargs)
        return value if self.value(value).dtype == like.dtype else self(aten._to_copy.default, value, dtype=like.dtype)

    def _decompose(self, op: Callable, args: tuple, kwargs: dict) -> Any:
        """The op taken apart by our table or by torch; None where neither can."""
        if op in DECOMPOSITIONS:
            return DECOMPOSITIONS[op](self, *args, **kwargs)
        if not isinstance(op, torch._ops.OpOverload) or not _composite(op):
            return None
        leaves, spec = pytree.tree_flatten((args, kwargs))
        refs = [x for x in leaves if isinstance(x, Ref)]

        def call(*tensors: Tensor) -> Any:
            given = iter(tensors)
            a, k = pytree.tree_unflatten([next(given) if isinstance(x, Ref) else x for x in leaves], spec)
            return op(*a, **k)

        with torch.no_grad(), without_mkldnn():
            module = make_fx(call, tracing_mode="real")(*(self.values[r.index] for r in refs))
        if any(n.target is op for n in module.graph.nodes):
            return None
        return self.lower(module, refs)

    def finish(self, output: Ref) -> Graph:
        graph = Graph(self.nodes, self.n_inputs, self.constants, output.index)
        graph.finish()
        return graph


def trace(fn: Callable[..., Tensor], parameters: dict[str, Tensor], others: list[Tensor]) -> Graph:
    """The graph of ``fn(parameters, others)``, of the branches that it takes at these values.

    Raises
    ------
    TangentsUnsupported
        Where the call cannot be traced: it hides an op, or writes into views.
    """
    names = list(parameters)
    tensors = [*parameters.values(), *others]

    def flat(*given: Tensor) -> Tensor:
        return fn(dict(zip(names, given, strict=False)), list(given[len(names) :]))

    leaves = [t.detach().requires_grad_() if i < len(names) else t.detach() for i, t in enumerate(tensors)]
    try:
        # values that Python reads are burned in, and guarded: see `guard_of`
        with without_mkldnn():  # its recurrent layers are one op of several outputs
            module = make_fx(flat, tracing_mode="real", pre_dispatch=True, _error_on_data_dependent_ops=False)(*leaves)
    except Exception as error:
        raise TangentsUnsupported(f"the call cannot be traced: {_first_line(error)}") from error
    builder = Builder(tensors, names)
    try:
        output = builder.lower(module, [Ref(i) for i in range(len(tensors))])
    except TangentsUnsupported:
        raise
    except Exception as error:  # the nested engine takes what no rule was made for, and says why
        raise TangentsUnsupported(f"the traced call cannot be built: {_first_line(error)}") from error
    if not isinstance(output, Ref):
        raise TangentsUnsupported("the traced call returns no tensor")
    return builder.finish(output)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def _written(op: torch._ops.OpOverload) -> bool:
    return any(a.alias_info is not None and a.alias_info.is_write for a in op._schema.arguments)


def _without_out(op: torch._ops.OpOverload) -> torch._ops.OpOverload:
    """The form of an op that gives its value instead of writing it."""

    def taken(o: torch._ops.OpOverload) -> list[tuple[str, str]]:
        return [(a.name, str(a.type)) for a in o._schema.arguments if not a.is_out]

    for name in op._overloadpacket.overloads():
        other = getattr(op._overloadpacket, name)
        if taken(other) == taken(op) and len(other._schema.arguments) < len(op._schema.arguments):
            return other
    raise TangentsUnsupported(f"{op} has no functional form")


def _random(op: Callable) -> bool:
    return isinstance(op, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in op.tags


def _composite(op: torch._ops.OpOverload) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")
