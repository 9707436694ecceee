"""One pass over the data: derivatives of every batch, added up with their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from hoanalysis import schema
from hoanalysis.culprits import refuse_nonfinite
from hoanalysis.derivatives import heap
from hoanalysis.derivatives.common import BatchDerivatives
from hoanalysis.derivatives.engines import Engine, check_finite
from hoanalysis.derivatives.measured import NOTHING, Measure, measured
from hoanalysis.errors import NumericsError
from hoanalysis.problem import count_rows, naming_batch, tensors_of
from hoanalysis.shards import WHOLE, Shard
from hoanalysis.units import Accumulator

MIN_BATCHES = 8  # below this a standard error is itself too uncertain to stop by


def accumulate(
    engine: Engine,
    shard: Shard = WHOLE,
    *,
    tolerance: float | None = None,
    keep_batches: int = 0,
    measure: Measure = NOTHING,
    progress: Callable[[Iterator[Any]], Iterator[Any]] = iter,
) -> Accumulator:
    """The sums over the batches of the engine's problem, or of a shard of them.

    Raises
    ------
    NumericsError
        Where a loss or a derivative is not finite, naming the batch.
    DataError
        Where an input is not finite.
    """
    with heap.reused():
        return _accumulate(engine, shard, tolerance, Accumulator(keep_batches, shard.block), measure, progress)


def _accumulate(
    engine: Engine,
    shard: Shard,
    tolerance: float | None,
    sums: Accumulator,
    measure: Measure,
    progress: Callable[[Iterator[Any]], Iterator[Any]],
) -> Accumulator:
    task = engine.task
    problem = task.problem
    for index, raw in enumerate(progress(problem.batches(shard.stop, shard.first)), shard.first):
        batch = problem.cast(raw, task.state.dtype)
        weight = problem.size(raw)
        with naming_batch(index):
            result = engine.batch(batch)
        try:
            check_finite(result, f"batch {index}")
        except NumericsError:
            refuse_nonfinite(tensors_of(batch), index)
            raise
        values = _values(result) | measured(engine, measure, batch)
        sums.add(_means(values, weight if problem.reduction == "sum" else 1.0), weight, count_rows(raw))
        if tolerance is not None and sums.n_batches >= MIN_BATCHES and settled(sums, tolerance):
            break
    return sums


def relative_errors(sums: Accumulator) -> dict[str, float]:
    """Of each derivative, the largest relative standard error among the entries that matter."""
    derivatives = [k for k in sums.sums if k != schema.LOSS and k not in schema.MEASURED_DIMS]
    return {k: sums.relative_error(k) for k in derivatives}


def settled(sums: Accumulator, tolerance: float) -> bool:
    """Whether all entries that matter are known to ``tolerance``."""
    return all(error <= tolerance for error in relative_errors(sums).values())


def stopping(sums: Accumulator, tolerance: float) -> str:
    """Where a pass with a tolerance ended, in words."""
    worst, error = max(relative_errors(sums).items(), key=lambda item: item[1])
    if settled(sums, tolerance) and sums.n_batches >= MIN_BATCHES:
        return f"stopped after {sums.n_batches} batches: the entries that matter are known to {tolerance:.2g}"
    return f"all {sums.n_batches} batches were used, and entries of {worst} that matter are known to {error:.2g} only"


def _values(result: BatchDerivatives) -> dict[str, np.ndarray]:
    values = {schema.LOSS: np.asarray(result.loss)}
    values |= {schema.derivative(d): t.numpy() for d, t in result.tensors.items()}
    values |= {schema.diagonal(d): t.numpy() for d, t in result.diagonals.items() if d not in result.tensors}
    return values


def _means(values: dict[str, np.ndarray], divisor: float) -> dict[str, np.ndarray]:
    return {k: v / divisor for k, v in values.items()} if divisor != 1 else values
