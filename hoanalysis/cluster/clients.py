"""Dask itself: connecting, a cluster of this machine, what is checked before anything is sent, what was lost."""

from __future__ import annotations

import contextlib
import html
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hoanalysis.errors import ArgumentError, ClusterError, listed

if TYPE_CHECKING:
    from distributed import Client

CONNECT = 30.0  # seconds until a scheduler has to answer
FIRST_WORKER = 60.0  # seconds until a first worker has to be there
SHORTEST_SILENCE = 60.0  # seconds of worker-ttl under which a long product of matrices may pass for a dead worker

#: Of a cluster that is started here. Three kills make a suspect; workers are spawned, since torch does not survive a
#: fork; they may have children, so that loaders with num_workers work in them. The last is how long after a death Dask
#: gives up a worker's place, if it is empty at that very moment: with one unit that kills again and again it often is.
_LOCAL = {
    "distributed.scheduler.allowed-failures": 2,
    "distributed.worker.multiprocessing-method": "spawn",
    "distributed.worker.daemon": False,
    "distributed.deploy.lost-worker-timeout": "1000 days",
}


@contextlib.contextmanager
def opened(
    scheduler: str | None = None,
    workers: int | None = None,
    threads: int | None = None,
    say: Callable[[str], None] = print,
) -> Iterator[Client | None]:
    """A client of the scheduler, or of as many workers on this machine; None where neither is asked for.

    Parameters
    ----------
    scheduler
        Its address, ``tcp://host:8786``.
    workers
        Processes to start here, each with one Dask thread.
    threads
        Torch threads of this process, and so of each worker. None: with ``workers``, the cores of this machine shared
        out; else as it is.

    Raises
    ------
    ClusterError, ArgumentError
        Where Dask is not installed, nobody answers, or workers cannot do what they will be asked for.
    """
    if scheduler is not None and workers is not None:
        raise ArgumentError("--scheduler and --workers exclude each other", do="use the one or the other")
    with _torch_threads(threads if threads or not workers else max(1, _cores() // workers)):
        if scheduler is None and workers is None:
            yield None
            return
        with contextlib.ExitStack() as stack:
            client = stack.enter_context(_connected(scheduler) if scheduler else _started(workers or 1))
            checked(client)
            if link := dashboard(client):
                say(f"dashboard: {link}")
            yield client


@contextlib.contextmanager
def _torch_threads(threads: int | None) -> Iterator[None]:
    if threads is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _connected(address: str) -> Iterator[Client]:
    distributed = _distributed()
    try:
        client = distributed.Client(address, timeout=CONNECT, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:  # a time-out is an OSError
        raise ClusterError(
            "the scheduler does not answer",
            where=address[:200],
            why=f"{type(error).__name__}: {str(error)[:300]}",
            do="start it with `dask scheduler`, which prints the address that others reach it by (tcp://host:8786)",
            kept="nothing was computed",
        ) from error
    with client:
        yield client


@contextlib.contextmanager
def _started(workers: int) -> Iterator[Client]:
    distributed = _distributed()
    import logging

    import dask

    with (
        dask.config.set(_LOCAL),
        distributed.LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,  # what is lost is told by `hoanalysis.cluster.driver`
        ) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        yield client


def _distributed() -> Any:
    try:
        import distributed
    except ImportError as error:
        raise ClusterError(
            "workers need Dask distributed, which is not installed",
            why=str(error),
            do="pip install 'hoanalysis[dask]' (with -c constraints.txt), here and where the workers run",
        ) from error
    return distributed


# ---- before anything is sent ------------------------------------------------------------------------------------


def checked(client: Any) -> Client:
    """The client, where it is one whose workers can compute what this process would compute.

    Raises
    ------
    ArgumentError
        For what is no client.
    ClusterError
        Where there is no worker, one has several threads, or other versions than this process.
    """
    distributed = _distributed()
    if not isinstance(client, distributed.Client) or client.asynchronous:
        kind = "an asynchronous client" if isinstance(client, distributed.Client) else f"a {type(client).__name__}"
        raise ArgumentError(f"client= is {kind}", do="pass distributed.Client(address), or Client(LocalCluster(..))")
    threads = _first_threads(client)
    if several := {address: n for address, n in threads.items() if n != 1}:
        raise ClusterError(
            f"workers have several Dask threads: {listed(f'{a} has {n}' for a, n in several.items())}",
            why="units of one process share a model and torch's threads",
            do="start them with `dask worker ADDRESS --nthreads 1 --nworkers N`, or LocalCluster(threads_per_worker=1)",
        )
    _refuse_different(client)
    _warn_of_short_silence(client)
    return client


def _first_threads(client: Client) -> dict[str, int]:
    try:
        client.wait_for_workers(1, timeout=FIRST_WORKER)
    except TimeoutError:
        raise ClusterError(
            "the scheduler has no workers",
            where=gone(client),
            do="start some: dask worker ADDRESS --nthreads 1 --nworkers N",
            kept="nothing was computed",
        ) from None
    return threads_of(client)


def _refuse_different(client: Client) -> None:
    from hoanalysis.cluster import worker

    here = worker.versions()
    answers = client.run(worker.versions, on_error="return")
    wrong: dict[str, Mapping[str, str]] = {}
    for address, there in answers.items():
        if isinstance(there, Exception):
            wrong[address] = {"": f"hoanalysis cannot be imported there ({type(there).__name__}: {there})"}
        elif found := worker.different(there, here):
            wrong[address] = found
        elif there["cpu"] != here["cpu"]:
            warnings.warn(
                f"{address} computes with {there['cpu']} and this process with {here['cpu']}: "
                "the last bits of units may depend on where they are computed",
                stacklevel=3,
            )
    if wrong:
        raise worker.versions_differ(wrong)


def _warn_of_short_silence(client: Client) -> None:
    """A worker whose Python is held by one long call sends no sign of life; its unit would be taken from it."""
    try:
        ttl = client.run_on_scheduler(_worker_ttl)
    except Exception:  # a scheduler without this package: it needs none
        return
    if ttl is not None and ttl < SHORTEST_SILENCE:
        warnings.warn(
            f"the scheduler takes workers for dead that are silent for {ttl:g} s (distributed.scheduler.worker-ttl): "
            "units that are at work may be taken from them",
            stacklevel=3,
        )


def _worker_ttl(dask_scheduler: Any = None) -> float | None:
    return dask_scheduler.worker_ttl


# ---- on the way -------------------------------------------------------------------------------------------------


def threads_of(client: Client) -> dict[str, int]:
    """Dask threads by worker; a `ClusterError` where the scheduler is gone."""
    try:
        return client.nthreads()
    except Exception as error:
        raise ClusterError(
            "the scheduler is gone",
            where=gone(client),
            why=f"{type(error).__name__}: {str(error)[:300]}",
            do="start scheduler and workers again, then run the same call: it continues with what is missing",
            kept="finished units, where there is a store",
        ) from error


def gone(client: Client) -> str:
    """The address of a scheduler, whether it lives or not."""
    scheduler = client.scheduler
    return str(getattr(scheduler, "address", None) or "unknown")


def count_lost(client: Client, token: str, since: float) -> int:
    """How many workers died with tasks in hand whose keys hold ``token``; 0 where nobody can say any more."""
    with contextlib.suppress(Exception):
        events = [event for when, event in client.get_events("all") if when >= since and isinstance(event, dict)]
        died = [e for e in events if e.get("action") == "remove-worker" and not e.get("expected")]
        return sum(any(token in str(key) for key in e.get("processing-tasks", ())) for e in died)
    return 0


def dashboard(client: Client) -> str:
    """The page on which Dask shows what its workers do; empty where there is none."""
    with contextlib.suppress(Exception):
        return client.dashboard_link or ""
    return ""


def show_dashboard(client: Client) -> None:
    """A link in a notebook, nothing elsewhere."""
    link = dashboard(client)
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if link and hasattr(shell, "kernel"):
        from IPython.display import HTML, display

        address = html.escape(link, quote=True)
        display(HTML(f'Dask: <a href="{address}" target="_blank" rel="noopener">{address}</a>'))
