"""What a worker does: a unit, with its direction or along one that was sent, what a shard adds to a gradient, the
curvature of a checkpoint; it never sees the store.

Problems are built once a process, so that captured graphs, fingerprints and self-checks serve all its units. Before
anything is computed the worker makes sure that it is about to compute what the driver asks for: the versions, the
digest of the checkpoint, and the unit's whole key, hence also data, model and loss.
"""

from __future__ import annotations

import contextlib
import json
import platform
import socket
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xarray as xr

from hoanalysis import curvatures
from hoanalysis._version import __version__
from hoanalysis.checkpoints import Checkpoint
from hoanalysis.cluster.parcels import Order, Source
from hoanalysis.directions import Part
from hoanalysis.errors import ClusterError, HoError, listed
from hoanalysis.problem import Problem
from hoanalysis.store.container import canonical
from hoanalysis.summaries import Work

_SHORT = 12  # letters of a digest in an error


@dataclass
class Answer:
    """What a worker gives back: a unit, or the error that a user can cause; and what else came of it."""

    unit: xr.Dataset | None = None
    error: HoError | None = None
    direction: dict[str, np.ndarray] | None = None  # one that was computed, for the store
    part: Part | None = None  # what a shard of the data adds to a gradient
    remarks: list[tuple[type[Warning], str]] = field(default_factory=list)


@dataclass
class Given:
    """A direction in the place of the store, which a worker does not see: what the driver read, or what is made."""

    arrays: Mapping[str, np.ndarray] | None
    made: dict[str, np.ndarray] | None = None

    def read_arrays(self, key: Mapping[str, Any]) -> dict[str, np.ndarray] | None:
        if self.arrays is None:
            return None
        return {name: np.array(a) for name, a in self.arrays.items()}  # what was received may be read-only

    def publish_arrays(self, key: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        self.made = dict(arrays)


def versions() -> dict[str, str]:
    """What must be the same on driver and workers; of ``cpu`` the last bits depend alone."""
    return {
        "hoanalysis": __version__,
        "python": ".".join(platform.python_version_tuple()[:2]),  # what cloudpickle can take from one to another
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "xarray": xr.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def different(there: Mapping[str, str], here: Mapping[str, str]) -> dict[str, str]:
    """What of ``there`` cannot work with ``here``: name -> sentence."""
    return {k: f"{k} {there.get(k)} there, {v} here" for k, v in here.items() if k != "cpu" and there.get(k) != v}


# ---- the tasks --------------------------------------------------------------------------------------------------


def itself(value: Any) -> Any:
    """A source or a direction as the result of a task: where it is lost with its worker, Dask makes it again."""
    return value


def unit(
    source: Source,
    order: Order,
    position: int,
    key: Mapping[str, Any],
    along: Answer | Mapping[str, np.ndarray] | None,
) -> Answer:
    """The unit of ``key``, along the direction that was computed before, if any: arrays, or an answer with them."""
    given = Given(along.direction if isinstance(along, Answer) else along)
    with _answering() as answer:
        work, checkpoint = _begin(source, order, position, key)
        answer.unit = work.of_checkpoint(checkpoint, order.run, position, key, given)
    answer.direction = given.made
    return answer


def part(source: Source, order: Order, position: int, key: Mapping[str, Any], shard: int) -> Answer:
    """What a shard of the data adds to the direction ``"gradient"`` of the units of ``key``."""
    with _answering() as answer:
        work, checkpoint = _begin(source, order, position, key)
        answer.part = work.part_of_gradient(checkpoint, shard)
    return answer


def joined(source: Source, order: Order, position: int, key: Mapping[str, Any], parts: Sequence[Answer]) -> Answer:
    """The direction ``"gradient"`` from the parts of all shards, or the first error among them."""
    with _answering() as answer:
        for one in parts:
            if one.error is not None:
                raise one.error
        work, checkpoint = _begin(source, order, position, key)
        u = work.direction_of_parts(checkpoint, [one.part for one in parts if one.part is not None])
        answer.direction = {n: t.cpu().numpy() for n, t in u.tensors.items()}
    answer.remarks = list(dict.fromkeys([r for one in [*parts, answer] for r in one.remarks]))
    return answer


def curvature(
    source: Source, order: Order, position: int, key: Mapping[str, Any], options: Mapping[str, Any]
) -> Answer:
    """The curvature of the full Hessian at a checkpoint."""
    with _answering() as answer:
        problem = _ready(source, order)
        checkpoint = _checkpoint(order, position, key["checkpoint"])
        _refuse_other_key(curvatures.key(problem, checkpoint.sha256, options), key)
        answer.unit = curvatures.computed(problem, checkpoint, options)
    return answer


@contextlib.contextmanager
def _answering() -> Iterator[Answer]:
    """An answer, with the warnings of what is done within.

    An error that a user can cause is an answer too: Dask repeats tasks that raise, and it would come again.
    """
    answer = Answer()
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always")
        try:
            yield answer
        except HoError as error:
            answer.error = error
    told = [(w.category, str(w.message)) for w in remarks if issubclass(w.category, UserWarning)]
    answer.remarks = list(dict.fromkeys(told))


# ---- before anything is computed --------------------------------------------------------------------------------

#: Of this process: the digest of the source it works on and its problem, and that problem's settings.
_BUILT: dict[str, Problem] = {}
_WORKS: dict[str, Work] = {}


def _begin(source: Source, order: Order, position: int, key: Mapping[str, Any]) -> tuple[Work, Checkpoint]:
    """The work of an order and the checkpoint, of which the digest is that of the key, as is all else in it."""
    problem = _ready(source, order)
    if order.digest not in _WORKS:
        _WORKS[order.digest] = Work(problem, order.settings)
    work = _WORKS[order.digest]
    checkpoint = _checkpoint(order, position, key["checkpoint"])
    _refuse_other_key(work.key(checkpoint.sha256, key["relatives"], key["shard"][0]), key)
    return work, checkpoint


def _ready(source: Source, order: Order) -> Problem:
    """The problem of a source, with the torch threads that the driver asks for."""
    torch.set_num_threads(order.threads)  # in this thread: the last bits depend on how many there are
    if wrong := different(versions(), order.versions):
        raise versions_differ({socket.gethostname(): wrong})
    if source.digest not in _BUILT:
        problem = _built(source)
        _BUILT.clear()
        _WORKS.clear()
        _BUILT[source.digest] = problem
    return _BUILT[source.digest]


def _built(source: Source) -> Problem:
    try:
        return source.problem()
    except Exception as error:
        told = error.what if isinstance(error, HoError) else f"{type(error).__name__}: {error}"
        missing = isinstance(error, ModuleNotFoundError) or isinstance(error.__cause__, ModuleNotFoundError)
        raise ClusterError(
            "model, data or loss cannot be built on a worker, and could be built here",
            where=f"worker on {socket.gethostname()}",
            why=told,
            do="install the module there, send it with client.upload_file('module.py') before the call, or put it "
            "beside the study file on a file system that every worker sees"
            if missing
            else "make what the factories read (modules, data files, devices) available on every worker",
        ) from error


def _checkpoint(order: Order, position: int, sha256: str) -> Checkpoint:
    path, host = order.run.paths[position], socket.gethostname()
    if not path.exists():
        raise ClusterError(
            "a worker does not see the checkpoint",
            where=f"{path} on {host}",
            why="the driver sees it: the path is local to its machine, or mounted elsewhere there",
            do="put the checkpoints on a file system that every worker sees under the same path",
        )
    checkpoint = order.run[position]
    if checkpoint.sha256 != sha256:
        raise ClusterError(
            "the checkpoint on a worker is not the driver's",
            where=f"{path} on {host}",
            why=f"its SHA-256 is {checkpoint.sha256[:_SHORT]}.. there, {sha256[:_SHORT]}.. on the driver",
            do="put the checkpoints on a file system that every worker sees under the same path, or copy them again",
        )
    return checkpoint


_NOUNS = {
    "data": "the data",
    "direction_data": "the data of the direction",
    "model": "the class of the model",
    "model_repr": "the layers of the model",
    "loss": "the loss",
    "train_mode": "the modes of the model's modules",
}


def _refuse_other_key(found: Mapping[str, Any], key: Mapping[str, Any]) -> None:
    """A unit that was computed of other data, say, would be stored under the key of the driver's."""
    if canonical(found) == canonical(key):
        return
    other = [k for k in key if json.dumps(found.get(k)) != json.dumps(key[k])]
    raise ClusterError(
        f"{' and '.join(_NOUNS.get(k, repr(k)) for k in other)} on a worker differ from the driver's",
        where=f"worker on {socket.gethostname()}",
        why="; ".join(f"{k}: {str(found.get(k))[:60]} there, {str(key[k])[:60]} on the driver" for k in other),
        do="make the factories give the same on every machine: the same files, versions and seeds",
    )


def versions_differ(wrong: Mapping[str, Mapping[str, str]]) -> ClusterError:
    return ClusterError(
        "workers have other versions than the driver: results would differ, or not be understood",
        where=listed(wrong),
        why="; ".join(f"{host}: {', '.join(w.values())}" for host, w in wrong.items()),
        do="install the same versions everywhere (pip install -c constraints.txt), and restart the workers",
        kept="finished units",
    )
