"""The chunks of samples that a batch is computed in where something else than an engine goes through it."""

from __future__ import annotations

from collections.abc import Iterator

from hoanalysis.derivatives.engines import Engine, even
from hoanalysis.problem import Batch, count_rows


def chunks(engine: Engine, batch: Batch) -> Iterator[tuple[Batch, float]]:
    """What the engine would take at once of a batch (already cast), each with its share of the batch's loss.

    A batch whose loss couples its samples is one chunk.
    """
    problem, rows = engine.task.problem, count_rows(batch)
    step = even(rows, min(engine.rows or rows, engine.affordable(batch)))
    if step == rows:
        yield batch, 1.0
        return
    parts = [problem.take_rows(batch, i, min(i + step, rows)) for i in range(0, rows, step)]
    yield from ((part, share) for part, share in zip(parts, problem.shares(parts, batch), strict=True) if share)
