"""What a step knows of the loss: g-bar, H-bar and the diagonal of D3 at the current weights, along the current u.

They are measured on batches of their own, the next ones of the problem's data in an endless cycle, and may be moving
averages:

    x_t = (beta x_(t-1) + (1 - beta) m_t) / (normalization),   m_t the mean over the latest batches

with Adam's correction of the start, so that the first x is the first m.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hoanalysis import schema
from hoanalysis.derivatives import engines, heap
from hoanalysis.derivatives.common import BatchDerivatives, Request, displaced
from hoanalysis.derivatives.tangents import NotFinite, TangentsUnsupported
from hoanalysis.directions import group_norms
from hoanalysis.errors import ArgumentError, DataError, NumericsError, listed
from hoanalysis.partitions import Partition
from hoanalysis.problem import Batch, Problem, State, count_rows, full_precision, keep_random_state

Array = np.ndarray
IDENTITY = "training"  # weights that change all the time: a captured program is compared with eager PyTorch once


@dataclass(frozen=True)
class Known:
    """Tensors by the schema's names, with those that leaving out one batch would give, the norms of u, and D1 of the
    latest batches alone."""

    tensors: Mapping[str, Array]
    without_one: tuple[Mapping[str, Array], ...]
    norms: Array
    latest: Array


@dataclass
class Information:
    """Measures ``request`` over ``batches`` batches at a time, averaged with the coefficient ``average``."""

    problem: Problem
    partition: Partition
    request: Request
    average: float = 0.0
    batches: int = 1
    engine: str = "auto"
    memory: int = 2 * 2**30
    #: What was noted on the way, such as why the nested engine was taken.
    notes: list[str] = field(default_factory=list)
    #: How many batches were used since the start.
    used: int = 0
    _sums: dict[str, Array] = field(default_factory=dict)
    _weights: dict[str, Array] = field(default_factory=dict)  # of each entry: groups without a direction are left out
    _stream: Iterator[Batch] | None = None
    _latest: list[tuple[float, Batch, float]] = field(default_factory=list)  # weight, batch, its loss

    @full_precision()
    def measure(self, direction: Mapping[str, Tensor]) -> Known:
        """The information at the model's weights along u.

        Raises
        ------
        NumericsError
            Where a derivative is not finite.
        DataError
            Where the problem's data has no batches.
        ArgumentError
            Where a parameter requires a gradient now that had none when the partition was made.
        """
        dtype = self.problem.upcast()
        state = self.problem.state(dtype=dtype)
        if new := [n for n in state.parameters if n not in direction]:
            raise ArgumentError(f"unfrozen after the optimizer was made: {listed(new)}", do="make a new optimizer")
        u = {n: direction[n].to(p) for n, p in state.parameters.items()}
        weights, found, self._latest = [], [], []
        with heap.reused(), torch.enable_grad():
            for _ in range(self.batches):
                raw = self._next()
                batch = self.problem.cast(raw, state.dtype)
                result = self._derivatives(state, u, batch)
                engines.check_finite(result, f"batch {self.used - 1} of the information")
                weights.append(self.problem.size(raw))
                found.append(self._values(result, weights[-1]))
                self._latest.append((weights[-1], batch, result.loss))
        return self._averaged(np.array(weights), found, group_norms(u, self.partition))

    def change(self, u: Mapping[str, Tensor], eta: Array) -> float:
        """L(theta - sum_s eta_s U^s) - L(theta), the mean over the latest batches."""
        state = self.problem.state(dtype=self.problem.upcast())
        moved = displaced(state.parameters, u, self.partition, torch.as_tensor(-eta))
        total = 0.0
        for weight, batch, before in self._latest:
            with torch.no_grad():
                after = float(self.problem.batch_value(moved, state, batch))
            total += (after - before) * (1.0 if self.problem.reduction == "sum" else weight)
        return total / sum(weight for weight, _, _ in self._latest)

    def _values(self, result: BatchDerivatives, size: float) -> dict[str, Array]:
        """Means over the terms of a batch, whatever its reduction."""
        scale = 1 / size if self.problem.reduction == "sum" else 1.0
        named = {schema.derivative(d): t for d, t in result.tensors.items()}
        named |= {schema.diagonal(d): t for d, t in result.diagonals.items()}
        return {k: scale * t.numpy() for k, t in named.items()}

    def _averaged(self, weights: Array, found: list[dict[str, Array]], norms: Array) -> Known:
        """In units of |U^s|: u differs from time to time in length more than the loss does in shape."""
        unit = np.where(norms > 0, norms, 1.0)

        def mean(kept: list[int]) -> dict[str, Array]:
            total = weights[kept].sum()
            return {k: sum(weights[i] * found[i][k] for i in kept) / total / _size(k, unit) for k in found[0]}

        def joined(old: Mapping[str, Array], new: Mapping[str, Array | float]) -> dict[str, Array]:
            known = {k: _where(k, norms > 0) for k in found[0]}
            return {
                k: np.where(mask, self.average * old.get(k, 0.0) + (1 - self.average) * new[k], old.get(k, 0.0))
                for k, mask in known.items()
            }

        everything = list(range(len(found)))
        without = [mean([j for j in everything if j != i]) for i in everything] if len(found) > 1 else []
        left_out = [joined(self._sums, one) for one in without]
        latest = mean(everything)
        self._sums = joined(self._sums, latest)
        self._weights = joined(self._weights, dict.fromkeys(found[0], 1.0))
        left = tuple(self._scaled(one, unit) for one in left_out)
        return Known(self._scaled(self._sums, unit), left, norms, latest[schema.derivative(1)] * unit)

    def _scaled(self, sums: Mapping[str, Array], unit: Array) -> dict[str, Array]:
        weights = {k: np.where(w > 0, w, 1.0) for k, w in self._weights.items()}
        return {k: x * _size(k, unit) / weights[k] for k, x in sums.items()}

    def _derivatives(self, state: State, u: Mapping[str, Tensor], batch: Batch) -> BatchDerivatives:
        task = engines.Task(self.problem, state, u, self.partition, self.request, self.memory, IDENTITY)
        try:
            result = engines.choose(task, self.engine, check_all=False).batch(batch)
        except NotFinite as reason:  # nothing is wrong with the engine: the next batch is another
            if self.engine == "tangents":
                raise NumericsError(str(reason), do="scale the direction down, or train in float64") from None
            result = engines.fall_back(task, self.engine, reason).batch(batch)
        except TangentsUnsupported as reason:
            result = engines.fall_back(task, self.engine, reason).batch(batch)
            self.engine = "nested"
        self.notes += [note for note in task.notes if note not in self.notes]
        return result

    def _next(self) -> Batch:
        with keep_random_state():  # a loader draws a seed for each pass: training must not depend on how often
            if self._stream is None:
                self._stream = self._cycle()
            try:
                batch = next(self._stream)
            except BaseException:  # a generator that has raised is at its end: the next call begins another pass
                self._stream = None
                raise
            self.used += 1
            return batch

    def _cycle(self) -> Iterator[Batch]:
        data, passes = self.problem.data, 0
        if getattr(data, "persistent_workers", False):  # its only iterator would be reset under the training's hands
            data = copy.copy(data)
            data._iterator = None  # type: ignore[attr-defined]
        while True:
            empty = True
            for batch in data:
                if count_rows(batch):
                    empty = False
                    yield batch
            if empty and passes:
                raise DataError(
                    "the problem's data is empty when it is gone through again", do="pass a list, or a DataLoader"
                )
            if empty:
                raise DataError("the problem's data has no batches", do="check the path, the subset and the loader")
            passes += 1

    @property
    def terms(self) -> float:
        """Of the loss of one batch, where that is their sum: the mean over the latest batches."""
        return float(np.mean([weight for weight, _, _ in self._latest])) if self.problem.reduction == "sum" else 1.0

    # ---- saving -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        sums = {k: torch.tensor(x) for k, x in self._sums.items()}  # tensors pass `torch.load` with weights_only
        weights = {k: torch.tensor(x) for k, x in self._weights.items()}
        return {"used": self.used, "weights": weights, "sums": sums}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on where a run was saved: with its averages, and after as many batches."""
        self._sums = {k: x.numpy().copy() for k, x in saved["sums"].items()}
        if "weight" in saved:  # of an earlier version: one for all entries
            self._weights = {k: np.full_like(x, saved["weight"]) for k, x in self._sums.items()}
        else:
            self._weights = {k: x.numpy().copy() for k, x in saved["weights"].items()}
        self._stream, self.used = None, 0
        for _ in range(saved["used"]):
            self._next()


def _where(name: str, groups: Array) -> Array:
    """The entries of a tensor whose groups are all among ``groups``."""
    return np.logical_and.outer(groups, groups) if name == schema.derivative(2) else groups


def _size(name: str, norms: Array) -> Array:
    """prod_i |U^(s_i)| for each entry of a tensor, |U^s|^d for a diagonal of order d."""
    if name == schema.diagonal(3):
        return norms**3
    return norms if name == schema.derivative(1) else np.multiply.outer(norms, norms)
