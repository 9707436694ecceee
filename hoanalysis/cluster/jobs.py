"""What goes out to workers and what comes back: units, gradients that several units share, curvatures.

Where the data of a checkpoint are cut into shards, its units need one direction. A gradient is computed by shards too:
their parts, then the sum of these in order on whichever worker, go out as one job, and the units when it is done.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import dask
from distributed import Client, Future

from hoanalysis.cluster import worker
from hoanalysis.errors import NoDirection
from hoanalysis.units import gap_of_error

if TYPE_CHECKING:
    import numpy as np
    import xarray as xr

    from hoanalysis.cluster.driver import Flight
    from hoanalysis.cluster.worker import Answer
    from hoanalysis.store import Store
    from hoanalysis.summaries import Item, Made, Work

SMALL = 2**20  # bytes of a source or a direction that are not worth a task of their own


class Job(Protocol):
    """What goes out at once, and what may come of it."""

    items: list[Item]
    tasks: int

    def send(self) -> Future: ...

    def landed(self, future: Future) -> tuple[list[tuple[Item, Made]], list[Job]]:
        """What is done, and what can go out now; the future is one that did not kill."""
        ...


class Kind(Protocol):
    def jobs(self, items: list[Item]) -> list[Job]: ...


# ---- curvature --------------------------------------------------------------------------------------------------


class Curvatures:
    """Jobs of one checkpoint each."""

    def __init__(self, flight: Flight, options: Mapping[str, Any]) -> None:
        self.flight, self.options = flight, options

    def jobs(self, items: list[Item]) -> list[Job]:
        return [Curvature(self, item) for item in items]


class Curvature:
    tasks = 1

    def __init__(self, all_of_them: Curvatures, item: Item) -> None:
        self.of, self.items = all_of_them, [item]

    def send(self) -> Future:
        return self.of.flight.submit(worker.curvature, self.items[0], self.of.options)

    def landed(self, future: Future) -> tuple[list[tuple[Item, Made]], list[Job]]:
        (item,) = self.items

        def made() -> xr.Dataset:
            return self.of.flight.read(item, _received(future))

        return [(item, made)], []


# ---- units ------------------------------------------------------------------------------------------------------


class Units:
    """Jobs of units: each computes its own direction, unless that is stored, or a gradient that several units share."""

    def __init__(self, flight: Flight, work: Work, store: Store | None) -> None:
        self.flight, self.work, self.store = flight, work, store
        self.sharded = work.settings.shards > 1 and work.direction_name == "gradient"
        self.along: dict[str, Future] = {}  # digest of a checkpoint -> its direction, while units need it

    def jobs(self, items: list[Item]) -> list[Job]:
        """A unit each; where they share a gradient that is not there yet, it goes first."""
        if not self.sharded:
            return [Unit(self, item) for item in items]
        by_checkpoint: dict[str, list[Item]] = {}
        for item in items:
            by_checkpoint.setdefault(item[1]["checkpoint"], []).append(item)
        self.left = {sha256: len(group) for sha256, group in by_checkpoint.items()}
        jobs: list[Job] = []
        for group in by_checkpoint.values():
            known = self.stored(group[0]) is not None
            jobs += [Unit(self, item) for item in group] if known else [Gradient(self, group)]
        return jobs

    def stored(self, item: Item) -> dict[str, np.ndarray] | None:
        if self.store is None:
            return None
        return self.store.read_arrays(self.work.direction_key(item[1]["checkpoint"]))

    def publish(self, item: Item, direction: Mapping[str, np.ndarray] | None) -> None:
        if self.store is not None and direction is not None:
            self.store.publish_arrays(self.work.direction_key(item[1]["checkpoint"]), direction)

    def direction(self, item: Item) -> Future | dict[str, np.ndarray] | None:
        """What is sent along with a unit; None where its worker has to find the direction itself."""
        sha256 = item[1]["checkpoint"]
        if (sent := self.along.get(sha256)) is not None and sent.status not in ("error", "cancelled"):
            return sent
        stored = self.stored(item)
        if stored is None or not self.sharded or sum(a.nbytes for a in stored.values()) < SMALL:
            return stored
        key = f"direction-{self.flight.token}-{secrets.token_hex(4)}"
        self.along[sha256] = submit(self.flight.client, worker.itself, stored, key=key)
        return self.along[sha256]

    def finished(self, items: Iterable[Item]) -> None:
        """Directions that no unit waits for any more are let go."""
        for _, key in items if self.sharded else ():
            self.left[key["checkpoint"]] -= 1
            if not self.left[key["checkpoint"]]:
                self.along.pop(key["checkpoint"], None)


class Unit:
    tasks = 1

    def __init__(self, all_of_them: Units, item: Item) -> None:
        self.of, self.items = all_of_them, [item]

    def send(self) -> Future:
        return self.of.flight.submit(worker.unit, self.items[0], self.of.direction(self.items[0]))

    def landed(self, future: Future) -> tuple[list[tuple[Item, Made]], list[Job]]:
        (item,) = self.items
        self.of.finished(self.items)

        def made() -> xr.Dataset:
            answer = _received(future)
            self.of.publish(item, answer.direction)
            return self.of.flight.read(item, answer)

        return [(item, made)], []


class Gradient:
    """The direction of a checkpoint: the parts of its shards, and their sum, which the units of ``items`` wait for."""

    def __init__(self, all_of_them: Units, items: list[Item]) -> None:
        self.of, self.items = all_of_them, items
        self.tasks = len(all_of_them.work.gradient_shards())

    def send(self) -> Future:
        flight, item = self.of.flight, self.items[0]
        parts = [flight.submit(worker.part, item, shard) for shard in range(self.tasks)]
        return flight.submit(worker.joined, item, parts)

    def landed(self, future: Future) -> tuple[list[tuple[Item, Made]], list[Job]]:
        try:
            answer = future.result()
        except Exception as error:
            self.of.finished(self.items)
            return [(item, failing(error)) for item in self.items], []
        if answer.error is not None:
            self.of.finished(self.items)
            return [(item, self._failed(item, answer)) for item in self.items], []
        self.of.publish(self.items[0], answer.direction)
        self.of.along[self.items[0][1]["checkpoint"]] = future
        return [], [Unit(self.of, item) for item in self.items]

    def _failed(self, item: Item, answer: Answer) -> Made:
        def made() -> xr.Dataset:
            if isinstance(answer.error, NoDirection):
                return gap_of_error(answer.error)
            return self.of.flight.read(item, answer)

        return made


def _received(future: Future) -> Answer:
    answer = future.result()
    future.release()  # else Dask would compute it again, should the worker that holds it die
    return answer


def submit(client: Client, fn: Callable, *args: Any, **options: Any) -> Future:
    with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1TB"}):  # data and directions are large
        return client.submit(fn, *args, pure=False, **options)


def failing(error: Exception) -> Made:
    def made() -> xr.Dataset:
        raise error

    return made
