"""Which unit goes out when, and what becomes of units that fail, kill their worker, or are lost.

Dask gives what a lost worker had in hand to another one. A unit that was in hand when more workers died than the
scheduler allows (``distributed.scheduler.allowed-failures``) is given up by Dask; it may have been beside the culprit
only. Such suspects go out again one at a time when all others are done: what kills then is named, the rest completes.
"""

from __future__ import annotations

import secrets
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from distributed import Client, Future, KilledWorker, wait
from distributed.client import FuturesCancelledError

from hoanalysis.cluster import worker
from hoanalysis.cluster.clients import count_lost, gone, threads_of
from hoanalysis.cluster.jobs import SMALL, Curvatures, Job, Kind, Units, failing, submit
from hoanalysis.cluster.parcels import Order, Source, absolute
from hoanalysis.errors import ClusterError
from hoanalysis.summaries import refuse_replaced

if TYPE_CHECKING:
    import xarray as xr

    from hoanalysis.checkpoints import Run
    from hoanalysis.cluster.worker import Answer
    from hoanalysis.store import Store
    from hoanalysis.summaries import Item, Made, Work

PATIENCE = 120.0  # seconds without any worker before the call gives up; a worker that is started again takes about five
POLL = 2.0  # seconds between two looks at the workers while nothing lands
RETRIES = 2  # of a task that raises what no user causes: a file system that hiccups
AHEAD = 2  # units out for each worker: one in work, one that it can begin while the first is written


class ClusterWarning(UserWarning):
    """Workers were lost, or are not all alike; no number is wrong."""


class Workers:
    """The workers of a Dask client and the problem that they compute units of."""

    def __init__(self, client: Client, source: Source) -> None:
        self.client, self.source = client, source
        self._sent: Future | None = None

    def units(self, work: Work, items: Iterable[Item], run: Run, store: Store | None) -> Iterator[tuple[Item, Made]]:
        """Each item with its unit, or with what went wrong with it, in the order in which they are done.

        Directions are published in ``store`` with the first unit that needs them, or, where the data are cut into
        shards, before any; of units the caller does so.

        Raises
        ------
        ClusterError
            Where no worker is left, or the scheduler is gone.
        """
        yield from self._flown(list(items), run, work.settings, lambda flight: Units(flight, work, store))

    def curvatures(self, items: Iterable[Item], run: Run, options: Mapping[str, Any]) -> Iterator[tuple[Item, Made]]:
        """The same for the curvature of checkpoints."""
        yield from self._flown(list(items), run, None, lambda flight: Curvatures(flight, options))

    def _flown(
        self, items: list[Item], run: Run, settings: Any, kind: Callable[[Flight], Kind]
    ) -> Iterator[tuple[Item, Made]]:
        if not items:
            return
        order = Order(settings, absolute(run), torch.get_num_threads(), worker.versions())
        flight = Flight(self.client, self._on_cluster(), order)
        began = time.time()
        try:
            yield from flight.landed(kind(flight).jobs(items))
        finally:
            flight.abandon()
            if lost := count_lost(self.client, flight.token, began):
                warnings.warn(
                    f"{lost} workers were lost while they computed; what they had in hand was given to others",
                    ClusterWarning,
                    stacklevel=2,
                )

    def _on_cluster(self) -> Future | Source:
        """The source as it goes with every unit; a large one as a result that workers fetch from one another.

        Dask makes such a result again where the workers that hold it are lost, but whoever was about to fetch it waits
        for a dead one's answer (``distributed.comm.timeouts.connect``, 30 s).
        """
        if len(self.source.content) < SMALL:
            return self.source
        if self._sent is None or self._sent.status in ("error", "cancelled"):
            key = f"source-{self.source.digest[:12]}-{secrets.token_hex(4)}"
            self._sent = submit(self.client, worker.itself, self.source, key=key)
        return self._sent


class Flight:
    """Jobs on their way."""

    def __init__(self, client: Client, source: Future | Source, order: Order) -> None:
        self.client, self.source, self.order = client, source, order
        self.token = secrets.token_hex(4)  # keys are never those of another call: Dask remembers what failed
        self.out: dict[Future, Job] = {}
        self.number = 0
        self.lonely_since: float | None = None

    def landed(self, jobs: Iterable[Job]) -> Iterator[tuple[Item, Made]]:
        suspects: list[Job] = []
        yield from self._round(deque(jobs), suspects, alone=False)
        yield from self._round(deque(suspects), [], alone=True)

    def _round(self, waiting: deque[Job], suspects: list[Job], alone: bool) -> Iterator[tuple[Item, Made]]:
        while waiting or self.out:
            room = 1 if alone else AHEAD * max(1, len(self._threads()))
            while waiting and sum(job.tasks for job in self.out.values()) < room:
                job = waiting.popleft()
                self.out[job.send()] = job
            for future in self._done():
                job = self.out.pop(future)
                if future.status == "cancelled":  # with the scheduler, or by somebody else
                    self._threads()
                    waiting.append(job)
                elif not isinstance(killed := _error(future), KilledWorker):
                    done, ready = job.landed(future)
                    waiting.extendleft(reversed(ready))
                    yield from done
                elif alone:
                    yield from ((item, failing(_poison(self.order.run, item, killed))) for item in job.items)
                else:
                    suspects.append(job)

    def submit(self, fn: Callable, item: Item, *args: Any) -> Future:
        """A task about an item."""
        position, key = item
        name = f"{fn.__name__}-{self.order.run.steps[position]}-{self.token}-{self.number}"
        self.number += 1
        return submit(self.client, fn, self.source, self.order, position, key, *args, key=name, retries=RETRIES)

    def _done(self) -> list[Future]:
        """What has come back, at least one; what is lost with its worker is computed again."""
        while not (done := [f for f in self.out if f.status not in ("pending", "lost")]):
            try:
                with self.client.as_current():
                    wait(list(self.out), timeout=POLL, return_when="FIRST_COMPLETED")
            except TimeoutError:
                self._refuse_abandoned()
            except FuturesCancelledError:
                pass
        return done

    def read(self, item: Item, answer: Answer) -> xr.Dataset:
        """The unit in an answer; raises the error in its place."""
        position, key = item
        for category, text in answer.remarks:
            warnings.warn(text, category, stacklevel=4)
        if isinstance(answer.error, ClusterError):  # what differs there may have changed here
            refuse_replaced(self.order.run, position, key)
        if answer.error is not None:
            raise answer.error
        assert answer.unit is not None
        return answer.unit

    def _threads(self) -> dict[str, int]:
        return threads_of(self.client)

    def _refuse_abandoned(self) -> None:
        now = time.monotonic()
        self.lonely_since = None if self._threads() else self.lonely_since or now
        if self.lonely_since is not None and now - self.lonely_since > PATIENCE:
            raise ClusterError(
                f"no worker is left, and none has come for {PATIENCE:.0f} s",
                where=gone(self.client),
                do="start workers (dask worker ADDRESS --nthreads 1 --nworkers N), then run the same call again",
                kept="finished units",
            )

    def abandon(self) -> None:
        """Take back what is out: nobody waits for it any more."""
        if self.out and self.client.status == "running":
            self.client.cancel(list(self.out))
        self.out.clear()


def _error(future: Future) -> BaseException | None:
    return future.exception() if future.status == "error" else None


def _poison(run: Run, item: Item, killed: KilledWorker) -> ClusterError:
    position, _ = item
    last = getattr(killed.last_worker, "host", "") or "unknown"
    return ClusterError(
        "this unit kills the workers that compute it, also where nothing else is computed",
        where=f"{run.paths[position]}, worker on {last}",
        why="most often memory: a worker that exceeds its limit is ended, by Dask or by the system "
        f"({killed.allowed_failures + 1} workers died at it each time)",
        do="give workers more memory (fewer on a machine), lower memory=, or compute this checkpoint without a cluster "
        "to see where it ends",
        kept="the units of the other checkpoints",
    )
