"""What is examined: model, data and loss as they were given, with the settings they are to be summarized by.

A `Problem` refuses what would make numbers wrong, one thing at a time. Here model, data and loss are held apart, so
that everything is looked at; `Subject.problem` is a Problem on batches that were kept, with dropout switched off.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
from torch import nn

from hoanalysis.checkpoints import Checkpoint, Run
from hoanalysis.problem import Batch, Problem, active_dropout
from hoanalysis.summaries import Settings


@dataclass
class Subject:
    """Parts that could not be built are None. ``given`` is the user's own Problem, where it is not a study."""

    name: str
    model: nn.Module | None = None
    data: Any = None
    direction_data: Any = None
    loss: Any = None
    given: Problem | None = None
    settings: list[Settings] = field(default_factory=list)
    run: Run | None = None
    log: pd.DataFrame | None = None
    position: int | None = None  # in the run, of the checkpoint that the derivatives are looked at
    checkpoint: Checkpoint | Mapping[str, Any] | None = None

    def problem(self, batches: Sequence[Batch]) -> Problem:
        """The problem on these batches alone; refused as `Problem` refuses it, but for what concerns the loader."""
        if self.given is None:
            assert self.model is not None
            return Problem(self.model, list(batches), self.loss)
        twin = copy.copy(self.given)
        twin.data, twin.direction_data, twin.cache, twin.notes = list(batches), None, {}, []
        return twin

    @property
    def include_frozen(self) -> bool:
        return any(s.include_frozen for s in self.settings)


def quick(settings: Settings) -> Settings:
    """Settings for one small batch: all orders, and nothing that takes several batches or measures."""
    return replace(
        settings, keep_batches=0, measure=(), taus=None, tolerance=None, errors="conditional", max_batches=None,
        self_check=True,
    )  # fmt: skip


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Within it these modules are in eval mode, so that the rest can be looked at."""
    active = [m for _, m in active_dropout(model)]
    try:
        for m in active:
            m.training = False
        yield
    finally:
        for m in active:
            m.training = True
