"""A captured program: the graph of one batch's loss, and what it is valid for."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hoanalysis.derivatives.common import BatchDerivatives, Request
from hoanalysis.derivatives.tangents import sweeps
from hoanalysis.derivatives.tangents.capture import trace
from hoanalysis.derivatives.tangents.costs import Cost, predict
from hoanalysis.derivatives.tangents.directional import Higher, directional
from hoanalysis.derivatives.tangents.graph import Graph, TangentsUnsupported, lowest_dtype
from hoanalysis.derivatives.tangents.groups import Groups, Sums
from hoanalysis.derivatives.tangents.rules import Stack
from hoanalysis.partitions import Partition
from hoanalysis.problem import count_rows, map_tensors, tensors_of

if TYPE_CHECKING:
    from hoanalysis.problem import Batch, Problem, State


def capture(problem: Problem, state: State, batch: Batch) -> Program:
    """Trace the loss of one batch: a `Program` for all batches and checkpoints with the same `capture_key`.

    Parameters
    ----------
    problem, state
        What to differentiate, and where.
    batch
        A batch that has been through ``problem.cast``.

    Raises
    ------
    TangentsUnsupported
        With the reason, where the model or loss cannot be captured.
    """

    def call(parameters: dict[str, Tensor], others: list[Tensor]) -> Tensor:
        given = iter(others[len(state.fixed) :])
        fixed = dict(zip(state.fixed, others, strict=False))
        inner = type(state)(parameters, fixed, state.dtype)
        return problem.batch_value(parameters, inner, map_tensors(lambda _: next(given), batch))

    others = [*state.fixed.values(), *tensors_of(batch)]
    if not tensors_of(batch):
        raise TangentsUnsupported(f"no tensors are seen in a batch, a {type(batch).__name__}")
    graph = trace(call, state.parameters, others)
    key = capture_key(problem, state, batch)
    return Program(graph, key, list(state.parameters), list(state.fixed), count_rows(batch))


def capture_key(problem: Problem, state: State, batch: Batch, settings: Hashable = None) -> Hashable:
    """What a program is valid for: names, shapes and dtypes of all tensors, the batch's plain values, and what the
    modules keep as plain attributes (``settings``, where the caller knows them)."""

    def spec(t: Tensor) -> tuple:
        return tuple(t.shape), t.stride() if t.layout == torch.strided else None, t.dtype, t.device

    leaves = pytree.tree_leaves(batch)
    return (
        tuple((n, spec(t)) for n, t in state.parameters.items()),
        tuple((n, spec(t)) for n, t in state.fixed.items()),
        tuple(spec(t) if isinstance(t, (Tensor, np.ndarray)) and isinstance(t, Tensor) else repr(t) for t in leaves),
        problem.settings() if settings is None else settings,
        state.dtype,
    )


class Program:
    """The graph of one batch's loss. Made by `capture`.

    Attributes
    ----------
    key
        The `capture_key` that it is valid for. Where the call reads values (``item``, ``nonzero``), it is valid for
        those batches and weights that take the same branches, and raises `OtherBranch` for others.
    """

    def __init__(
        self,
        graph: Graph,
        key: Hashable,
        parameters: list[str],
        fixed: list[str],
        samples: int,
    ) -> None:
        self.graph, self.key, self.samples = graph, key, samples
        self._parameters, self._fixed = parameters, fixed
        self._plans: dict[str, Plan] = {}
        self._graphs = [graph]

    def derivatives(
        self,
        state: State,
        direction: Mapping[str, Tensor],
        partition: Partition,
        batch: Batch,
        request: Request,
    ) -> BatchDerivatives:
        """D^(1) .. D^(order) of one batch, and the diagonal of a higher order where ``request`` asks for one.

        Raises
        ------
        TangentsUnsupported
            For a batch or state that the program was not captured for.
        """
        inputs = self._inputs(state, batch)
        plan = self._plan(partition)
        leaves = plan.leaves(self.graph, state.parameters, direction)
        with torch.no_grad():
            result = self._to_third(inputs, plan, leaves, request)
            if request.highest > 3:
                higher = Higher(self._directional(inputs, request.highest - 3), len(partition), inputs, leaves)
                for d in range(4, request.order + 1):
                    result.tensors[d] = plan.in_order(higher.tensor(d))
                if (d := request.diagonal or 0) > max(request.order, 3):
                    result.diagonals[d] = plan.in_order(higher.diagonal(d))
        return result

    def _to_third(
        self, inputs: list[Tensor], plan: Plan, leaves: Mapping[int, Stack], request: Request
    ) -> BatchDerivatives:
        """What of a request is of order 3 or below."""
        order = min(request.order, 3)
        diagonal = request.diagonal == 3 and order < 3
        values, local = sweeps.forward(self.graph, inputs, min(request.highest, 3))
        loss = values[self.graph.output]
        del values
        sums = Sums(len(plan.order), order, diagonal)
        if self.graph.output in local:
            if order >= 3:
                sweeps.full(self.graph, local, loss, leaves, sums)
            else:
                second = order >= 2 or diagonal or request.diagonal == 2
                sweeps.stream(self.graph, local, loss, leaves, sums, second)
        return plan.result(float(loss), sums, request)

    def _directional(self, inputs: list[Tensor], times: int) -> list[Graph]:
        """The graphs of the first ``times`` directional derivatives, after that of the loss; made once."""
        while len(self._graphs) <= times:
            more = len(self._graphs) - 1
            parameters = [inputs[n.index] for n in self.graph.nodes[: self.graph.n_inputs] if n.parameter is not None]
            self._graphs.append(directional(self._graphs[-1], [*inputs, *parameters * more]))
        return self._graphs

    def check(
        self,
        problem: Problem,
        state: State,
        direction: Mapping[str, Tensor],
        partition: Partition,
        batch: Batch,
        result: BatchDerivatives | None = None,
    ) -> None:
        """Compare with eager PyTorch: the loss, and D1 with the eager gradient contracted with the direction.

        Costs one gradient, and one forward sweep where no ``result`` of this batch is given. Worth paying once per
        program and state; the loss alone can be compared on every batch by the caller.

        Raises
        ------
        TangentsUnsupported
            Where they differ by more than rounding in the lowest dtype of the graph.
        """
        if result is None:
            result = self.derivatives(state, direction, partition, batch, Request(1))
        parameters = {n: p.detach().requires_grad_() for n, p in state.parameters.items()}
        loss = problem.batch_value(parameters, state, batch)
        if not loss.requires_grad:
            raise TangentsUnsupported("the loss of a batch depends on no parameter")
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        grads = tuple(g.to_dense() if g is not None and g.layout != torch.strided else g for g in grads)
        eager, size = loss.item(), len(partition)
        expected, scale = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
        used = self.graph.used_parameters()
        for (name, p), g in zip(parameters.items(), grads, strict=True):
            if g is not None and name not in used and bool(g.any()):
                raise TangentsUnsupported(f"a use of parameter {name!r} is not in the captured graph")
            term = torch.zeros_like(p) if g is None else g.detach() * direction[name].to(p.dtype)
            index = torch.as_tensor(np.broadcast_to(partition.assignment[name], p.shape).copy().ravel())
            expected.index_add_(0, index, term.detach().double().ravel())
            scale.index_add_(0, index, term.detach().double().abs().ravel())
        eps = torch.finfo(lowest_dtype(self.graph)).eps
        if not abs(eager - result.loss) <= 1e3 * eps * max(1.0, abs(eager)):
            raise TangentsUnsupported(f"the captured loss is {result.loss!r}, the eager one {eager!r}")
        # cancellation inside a sum over n entries costs about sqrt(n) ulps of the terms' size, depth some more; where
        # the samples' gradients cancel, as at a minimum, what is left is rounding of terms as large as the loss
        tolerance = 1e3 * eps * (scale + 1e-3 * scale.max()) + 10 * eps * abs(eager)
        right = (expected - result.tensors[1]).abs() <= tolerance
        if not bool(right.all()):
            s = int(right.int().argmin())
            raise TangentsUnsupported(
                f"D1 of group {partition.labels[s]!r} is {result.tensors[1][s]:.6e}, the eager gradient gives "
                f"{expected[s]:.6e}: detach, no_grad or a custom backward was lost"
            )

    def description(self) -> dict[str, dict[str, int]]:
        """Kind of rule -> op -> number of live nodes. ``generic`` lists the ops without a rule of their own."""
        return self.graph.description()

    def costs(self, partition: Partition, request: Request) -> Cost:
        """The predicted cost of ``request`` on a batch of the captured shapes: operations, gradients and peak bytes."""
        plan = self._plan(partition)
        leaves = {
            n.index: plan.groups_of(n.parameter)
            for n in self.graph.nodes[: self.graph.n_inputs]
            if n.parameter is not None
        }
        return predict(self.graph, leaves, len(partition), request)

    def peak_bytes_per_sample(self, partition: Partition, request: Request) -> float:
        """Predicted peak memory of the sweeps divided by the samples of the captured batch.

        Nearly independent of the batch size, since all but the weights' own tangents grow with it.
        """
        return self.costs(partition, request).bytes / self.samples

    # ---- internals ----------------------------------------------------------------------------------------------

    def _inputs(self, state: State, batch: Batch) -> list[Tensor]:
        tensors = tensors_of(batch)
        inputs = [*(state.parameters[n] for n in self._parameters), *(state.fixed[n] for n in self._fixed), *tensors]
        if len(inputs) != self.graph.n_inputs:
            raise TangentsUnsupported(f"the program takes {self.graph.n_inputs} tensors and was given {len(inputs)}")
        for node, t in zip(self.graph.nodes, inputs, strict=False):
            if node.shape != tuple(t.shape) or node.dtype != t.dtype:
                raise TangentsUnsupported(
                    f"the program was captured for a tensor {node.shape} {node.dtype} and was given "
                    f"{tuple(t.shape)} {t.dtype}"
                )
        return [t.detach() for t in inputs]

    def _plan(self, partition: Partition) -> Plan:
        key = partition.fingerprint()
        if key not in self._plans:
            self._plans[key] = Plan(self.graph, partition)
        return self._plans[key]


class Plan:
    """How the groups of one partition meet the graph: their order of first use, and each parameter's own groups."""

    def __init__(self, graph: Graph, partition: Partition) -> None:
        order: dict[int, None] = {}
        for n in graph.live_nodes():
            for i in n.sources.values():
                if (name := graph.nodes[i].parameter) is not None:
                    order.update(dict.fromkeys(np.unique(partition.assignment[name]).tolist()))
        order.update(dict.fromkeys(range(len(partition))))
        self.order = list(order)
        self.position = {g: i for i, g in enumerate(self.order)}
        self.partition = partition

    def leaves(
        self, graph: Graph, parameters: Mapping[str, Tensor], direction: Mapping[str, Tensor]
    ) -> dict[int, Stack]:
        """The tangents of the parameters themselves: U^s, cut where a tensor has several groups."""
        out = {}
        for n in graph.nodes[: graph.n_inputs]:
            if n.parameter is None:
                continue
            p, assignment = parameters[n.parameter], self.partition.assignment[n.parameter]
            u = direction[n.parameter].detach().to(p)
            groups = self.groups_of(n.parameter)
            if len(groups) == 1:
                out[n.index] = Stack(groups, u[None])
                continue
            index = torch.as_tensor(assignment)
            out[n.index] = Stack(groups, torch.stack([u * (index == self.order[g]) for g in groups]))
        return out

    def groups_of(self, parameter: str) -> Groups:
        """The groups that a parameter's entries belong to, in the order of first use."""
        a = self.partition.assignment[parameter]
        groups = np.unique(a).tolist() if isinstance(a, np.ndarray) else [a]
        return tuple(sorted(self.position[g] for g in groups))

    def result(self, loss: float, sums: Sums, request: Request) -> BatchDerivatives:
        """Back to the partition's own order of groups."""
        tensors = {1: self.in_order(sums.D1)}
        if request.order >= 2:
            tensors[2] = self.in_order(sums.D2)
        if sums.D3 is not None:
            tensors[3] = self.in_order(sums.D3)
        diagonals = {}
        if sums.diagonal is not None:
            diagonals[3] = self.in_order(sums.diagonal)
        elif request.order < 2 and request.diagonal == 2:
            diagonals[2] = self.in_order(sums.D2.diagonal())
        return BatchDerivatives(loss, tensors, diagonals)

    def in_order(self, tensor: Tensor) -> Tensor:
        """A tensor over the groups in the order of first use, in the partition's own."""
        where = torch.tensor([self.position[g] for g in range(len(self.order))], dtype=torch.long)
        for axis in range(tensor.dim()):
            tensor = tensor.index_select(axis, where)
        return tensor
