"""Faults of workers: plugins that a worker keeps when it is started again, and which the driver takes back."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed import Client, WorkerPlugin


@dataclass
class Kill(WorkerPlugin):
    """SIGKILL to the worker itself at a unit of a checkpoint: at its second batch, or when it is done; or in a part of
    its gradient.

    Each death leaves a file in ``folder``; there are at most ``times`` of them.
    """

    sha256: str
    folder: Path
    times: int = 1
    when: str = "at work"
    name: str = "kill"

    def setup(self, worker: Any) -> None:
        from hoanalysis.derivatives import engines
        from hoanalysis.summaries import Work

        self.whole = whole = Work.of_checkpoint, engines.Engine.batch, Work.part_of_gradient
        state = {"key": None, "batches": 0}

        def of_checkpoint(work, checkpoint, run, position, key, store):
            state.update(key=key["checkpoint"], batches=0)
            unit = whole[0](work, checkpoint, run, position, key, store)
            if self.when == "done" and key["checkpoint"] == self.sha256:
                self.die()
            state["key"] = None
            return unit

        def batch(engine, given):
            state["batches"] += 1
            if self.when == "at work" and state["key"] == self.sha256 and state["batches"] == 2:
                self.die()
            return whole[1](engine, given)

        def part(work, checkpoint, shard):
            if self.when == "in a part" and checkpoint.sha256 == self.sha256 and shard == 1:
                self.die()
            return whole[2](work, checkpoint, shard)

        Work.of_checkpoint, engines.Engine.batch, Work.part_of_gradient = of_checkpoint, batch, part

    def teardown(self, worker: Any) -> None:
        from hoanalysis.derivatives import engines
        from hoanalysis.summaries import Work

        Work.of_checkpoint, engines.Engine.batch, Work.part_of_gradient = self.whole

    def die(self) -> None:
        if deaths(self.folder) < self.times:
            (self.folder / f"{os.getpid()}.death").touch()
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class Together(WorkerPlugin):
    """A unit, or a part of a gradient, goes on when another process has begun one of its kind; else after a minute."""

    folder: Path
    name: str = "together"

    def setup(self, worker: Any) -> None:
        from hoanalysis.summaries import Work

        self.whole = whole = Work.of_checkpoint, Work.part_of_gradient

        def of_checkpoint(work, *args):
            self.meet(f"unit-{work.settings.order}")
            return whole[0](work, *args)

        def part(work, *args):
            self.meet(f"part-{work.settings.order}")
            return whole[1](work, *args)

        Work.of_checkpoint, Work.part_of_gradient = of_checkpoint, part

    def meet(self, what: str) -> None:
        own = self.folder / f"{what}-{os.getpid()}.met"
        own.touch()
        end = time.monotonic() + 60
        while {own} == set(self.folder.glob(f"{what}-*.met")):
            if time.monotonic() > end:
                own.with_suffix(".alone").touch()
                return
            time.sleep(0.01)

    def teardown(self, worker: Any) -> None:
        from hoanalysis.summaries import Work

        Work.of_checkpoint, Work.part_of_gradient = self.whole


@dataclass
class Curved(WorkerPlugin):
    """A file for each curvature that a worker computes."""

    folder: Path
    name: str = "curved"

    def setup(self, worker: Any) -> None:
        from hoanalysis import curvatures

        self.whole = whole = curvatures.computed

        def computed(problem, checkpoint, options):
            (self.folder / f"{checkpoint.sha256}.curvature").touch()
            return whole(problem, checkpoint, options)

        curvatures.computed = computed

    def teardown(self, worker: Any) -> None:
        from hoanalysis import curvatures

        curvatures.computed = self.whole


@dataclass
class Slow(WorkerPlugin):
    """Each unit takes so many seconds more."""

    seconds: float
    name: str = "slow"

    def setup(self, worker: Any) -> None:
        from hoanalysis.summaries import Work

        self.whole = whole = Work.of_checkpoint

        def of_checkpoint(work, *args):
            time.sleep(self.seconds)
            return whole(work, *args)

        Work.of_checkpoint = of_checkpoint

    def teardown(self, worker: Any) -> None:
        from hoanalysis.summaries import Work

        Work.of_checkpoint = self.whole


def deaths(folder: Path) -> int:
    return len(list(folder.glob("*.death")))


@contextlib.contextmanager
def plugged(client: Client, plugin: WorkerPlugin) -> Iterator[None]:
    client.register_plugin(plugin)
    try:
        yield
    finally:
        client.wait_for_workers(2, timeout=60)
        client.unregister_worker_plugin(plugin.name)


def as_version(version: str) -> str:
    """Make a worker say that it has another torch; what it has."""
    import torch

    kept, torch.__version__ = torch.__version__, version
    return str(kept)


def with_ttl(ttl: float, dask_scheduler: Any = None) -> float:
    """Set after how much silence a scheduler takes a worker for dead; what it was."""
    kept, dask_scheduler.worker_ttl = dask_scheduler.worker_ttl, ttl
    return kept
