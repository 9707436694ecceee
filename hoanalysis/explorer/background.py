"""Fill a store in a thread of the kernel, so that the notebook goes on: partial results are read from the store.

A thread, not a process: models and losses that were defined in a notebook need not be picklable. It works on a copy of
the model, because weights are swapped while derivatives are computed, and stops between two batches; what is finished
by then is in the store.
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import xarray as xr

from hoanalysis import units
from hoanalysis.errors import ArgumentError, HoError, ModelError
from hoanalysis.problem import Problem
from hoanalysis.store import open_store
from hoanalysis.store.core import Store
from hoanalysis.summaries import Settings, Work, summarize_run


class Stopped(BaseException):
    """Raised within the pass over the data; no handler of errors takes it for one."""


class _Stoppable:
    """The user's data, which ends with `Stopped` between two batches once the event is set."""

    def __init__(self, data: Iterable, event: threading.Event) -> None:
        self._data, self._event = data, event

    def __iter__(self) -> Iterator:
        for batch in self._data:
            if self._event.is_set():
                raise Stopped
            yield batch


class Filling:
    """The computation of what a store lacks of a run.

    Attributes
    ----------
    problem
        What the thread works on: the user's problem with a copy of its model.
    error
        Why it ended early; None otherwise.
    """

    def __init__(
        self, problem: Any, run: Any, order: int | None, store: str | os.PathLike[str], options: Mapping[str, Any]
    ) -> None:
        if not isinstance(problem, Problem):
            raise ArgumentError(f"a run is computed from a ho.Problem, not from a {type(problem).__name__}")
        self.order = Settings.order if order is None else order
        self.options = {k: v for k, v in options.items() if k not in ("progress", "client")}
        if unknown := [k for k in self.options if k not in Settings.__dataclass_fields__]:
            raise ArgumentError(f"unknown options: {unknown}", do="use those of ho.summarize_run")
        self._event = threading.Event()
        self.problem = _copied(problem, self._event)
        self.run, self.store = run, Path(store)
        work = Work(self.problem, Settings(self.order, **self.options))
        self.name = work.name
        self._plan = work.plan(work.steps(run), series=True)
        self._thread: threading.Thread | None = None
        self._seen = -1
        self.error: BaseException | None = None

    def start(self) -> None:
        """Begin, or go on after a stop. Does nothing while it runs."""
        if self.running:
            return
        self._event.clear()
        self.error = None
        threads = torch.get_num_threads()  # a new thread would take all cores, and leave other last bits
        self._thread = threading.Thread(target=self._work, args=(threads,), name="hoanalysis filling", daemon=True)
        self._thread.start()

    def stop(self, wait: float | None = None) -> None:
        """End after the batch that is under way; ``wait`` at most so many seconds for that."""
        self._event.set()
        if wait is not None and self._thread is not None:
            self._thread.join(wait)

    def finish(self) -> None:
        """Wait for the end, and raise what ended it early."""
        if self._thread is not None:
            self._thread.join()
        if self.error is not None:
            raise self.error

    @property
    def running(self) -> bool:
        """Whether the thread is at work."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def stopping(self) -> bool:
        """Whether `stop` was asked for and the batch under way is not finished."""
        return self._event.is_set() and self.running

    def dataset(self) -> xr.Dataset:
        """What the store holds of this study; NaN everywhere before it holds anything."""
        try:
            return open_store(self.store, self.name)
        except HoError:
            return units.assemble(self._plan, lambda key: None)

    def grown(self) -> xr.Dataset | None:
        """The Dataset, where units were added since the last call; None otherwise."""
        try:
            count = len(Store.open(self.store, mode="r").keys())
        except HoError:
            return None
        if count == self._seen:
            return None
        self._seen = count
        return self.dataset()

    def _work(self, threads: int) -> None:
        torch.set_num_threads(threads)
        try:
            summarize_run(self.run, self.problem, self.order, store=self.store, progress=False, **self.options)
        except Stopped:
            pass
        except BaseException as error:
            self.error = error


def _copied(problem: Problem, event: threading.Event) -> Problem:
    """The problem with a model of its own, data that can be stopped, and what was cached."""
    other = copy.copy(problem)
    try:
        other.model = copy.deepcopy(problem.model)
    except Exception as error:
        raise ModelError(
            "this model cannot be copied, so that it cannot be computed with in the background",
            why=f"{type(error).__name__}: {error}",
            do="call ho.summarize_run(run, problem, store=folder), then ho.explore(ho.open_store(folder))",
        ) from error
    other.data = _Stoppable(problem.data, event)
    if problem.direction_data is not None:
        other.direction_data = _Stoppable(problem.direction_data, event)
    other.notes, other.cache = list(problem.notes), {}
    return other
