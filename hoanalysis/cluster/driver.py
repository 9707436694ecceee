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
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import dask
import torch
from distributed import Client, Future, KilledWorker, wait
from distributed.client import FuturesCancelledError

from hoanalysis.cluster import worker
from hoanalysis.cluster.clients import count_lost, gone, threads_of
from hoanalysis.cluster.parcels import Order, Source, absolute
from hoanalysis.errors import ClusterError
from hoanalysis.summaries import refuse_replaced

if TYPE_CHECKING:
    import xarray as xr

    from hoanalysis.checkpoints import Run
    from hoanalysis.store import Store
    from hoanalysis.summaries import Item, Made, Work

PATIENCE = 120.0  # seconds without any worker before the call gives up; a worker that is started again takes about five
POLL = 2.0  # seconds between two looks at the workers while nothing lands
RETRIES = 2  # of a task that raises what no user causes: a file system that hiccups
AHEAD = 2  # units out for each worker: one in work, one that it can begin while the first is written


SMALL = 2**20  # bytes of a source that is not worth a task of its own


class ClusterWarning(UserWarning):
    """Workers were lost, or are not all alike; no number is wrong."""


class Workers:
    """The workers of a Dask client and the problem that they compute units of."""

    def __init__(self, client: Client, source: Source) -> None:
        self.client, self.source = client, source
        self._sent: Future | None = None

    def units(self, work: Work, items: Iterable[Item], run: Run, store: Store | None) -> Iterator[tuple[Item, Made]]:
        """Each item with its unit, or with what went wrong with it, in the order in which they are done.

        Directions are published in ``store`` with the first unit that needs them; of units the caller does so.

        Raises
        ------
        ClusterError
            Where no worker is left, or the scheduler is gone.
        """
        waiting = list(items)
        if not waiting:
            return
        order = Order(work.settings, absolute(run), torch.get_num_threads(), worker.versions())
        flight = _Flight(self.client, self._on_cluster(), order, work, store)
        began = time.time()
        try:
            yield from flight.landed(waiting)
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
            self._sent = _submit(self.client, worker.itself, self.source, key=key)
        return self._sent


class _Flight:
    """Units on their way."""

    def __init__(self, client: Client, source: Future | Source, order: Order, work: Work, store: Store | None) -> None:
        self.client, self.source, self.order, self.work, self.store = client, source, order, work, store
        self.token = secrets.token_hex(4)  # keys are never those of another call: Dask remembers what failed
        self.units: dict[Future, Item] = {}
        self.number = 0
        self.lonely_since: float | None = None

    def landed(self, items: Iterable[Item]) -> Iterator[tuple[Item, Made]]:
        suspects: list[Item] = []
        yield from self._round(deque(items), suspects, alone=False)
        yield from self._round(deque(suspects), [], alone=True)

    def _round(self, waiting: deque[Item], suspects: list[Item], alone: bool) -> Iterator[tuple[Item, Made]]:
        while waiting or self.units:
            room = 1 if alone else AHEAD * max(1, len(self._threads()))
            while waiting and len(self.units) < room:
                self._launch(waiting.popleft())
            for future in self._done():
                item = self.units.pop(future)
                if future.status == "cancelled":  # with the scheduler, or by somebody else
                    self._threads()
                    waiting.append(item)
                elif not isinstance(killed := _error(future), KilledWorker):
                    yield item, self._made(item, future)
                elif alone:
                    yield item, _raising(_poison(self.order.run, item, killed))
                else:
                    suspects.append(item)

    def _launch(self, item: Item) -> None:
        position, key = item
        name = f"unit-{self.order.run.steps[position]}-{self.token}-{self.number}"
        self.number += 1
        stored = None
        if self.store is not None:
            stored = self.store.read_arrays(self.work.direction_key(key["checkpoint"]))
        future = _submit(
            self.client, worker.unit, self.source, self.order, position, key, stored, key=name, retries=RETRIES
        )
        self.units[future] = item

    def _done(self) -> list[Future]:
        """What has come back, at least one; what is lost with its worker is computed again."""
        while not (done := [f for f in self.units if f.status not in ("pending", "lost")]):
            try:
                with self.client.as_current():
                    wait(list(self.units), timeout=POLL, return_when="FIRST_COMPLETED")
            except TimeoutError:
                self._refuse_abandoned()
            except FuturesCancelledError:
                pass
        return done

    def _made(self, item: Item, future: Future) -> Made:
        def made() -> xr.Dataset:
            answer = future.result()
            future.release()  # else Dask would compute it again, should the worker that holds it die
            position, key = item
            for category, text in answer.remarks:
                warnings.warn(text, category, stacklevel=4)
            if answer.direction is not None and self.store is not None:
                self.store.publish_arrays(self.work.direction_key(key["checkpoint"]), answer.direction)
            if isinstance(answer.error, ClusterError):  # what differs there may have changed here
                refuse_replaced(self.order.run, position, key)
            if answer.error is not None:
                raise answer.error
            return answer.unit

        return made

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
        if self.units and self.client.status == "running":
            self.client.cancel(list(self.units))
        self.units.clear()


def _submit(client: Client, fn: Callable, *args: Any, **options: Any) -> Future:
    with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1TB"}):  # data and directions are large
        return client.submit(fn, *args, pure=False, **options)


def _error(future: Future) -> BaseException | None:
    return future.exception() if future.status == "error" else None


def _raising(error: Exception) -> Made:
    def made() -> xr.Dataset:
        raise error

    return made


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
