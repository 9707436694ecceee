"""What travels to a worker: the study or the live problem, without weights, and what is to be done with it.

Weights never travel: a worker loads a checkpoint by its path and compares the digest. A study is rebuilt there from the
factories that it names. A `Problem` of live objects goes as cloudpickle takes it, which is what Dask sends tasks with;
each tensor that every checkpoint replaces is left out and is NaN there, so that one that is used by mistake shows.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hoanalysis.checkpoints import Run
from hoanalysis.errors import ClusterError
from hoanalysis.problem import Problem

if TYPE_CHECKING:
    from hoanalysis.study import StudySpec


@dataclass(frozen=True)
class Source:
    """Where a worker's `Problem` comes from: pickled bytes of a `StudySpec` or of a problem, and their digest."""

    content: bytes
    digest: str

    @classmethod
    def of_study(cls, spec: StudySpec) -> Source:
        """The study's text and path. Its factories are imported by the worker."""
        return cls._of(pickle.dumps(spec))

    @classmethod
    def of_problem(cls, problem: Problem) -> Source:
        """Model, data and loss as they are, without the weights.

        Raises
        ------
        ClusterError
            Naming the part that cannot be sent.
        """
        try:
            return cls._of(_pickled(problem.packed(), _replaced_tensors(problem.model)))
        except Exception as error:
            raise _unsendable(problem, error) from error

    @classmethod
    def _of(cls, content: bytes) -> Source:
        return cls(content, hashlib.sha256(content).hexdigest())

    def problem(self) -> Problem:
        """The problem, on the worker."""
        found = pickle.loads(self.content)
        return Problem.unpacked(found) if isinstance(found, dict) else found.problem()


@dataclass(frozen=True)
class Order:
    """What is asked for of a source: one setting over one run, with the driver's torch threads and versions."""

    settings: Any  # `hoanalysis.summaries.Settings`; None for what needs none
    run: Run
    threads: int
    versions: dict[str, str]

    @functools.cached_property
    def digest(self) -> str:
        """Tells two settings apart."""
        return hashlib.sha256(pickle.dumps(self.settings)).hexdigest()


def absolute(run: Run) -> Run:
    """The same files whatever the working directory."""
    return Run([Path(os.path.abspath(p)) for p in run.paths], run.steps, run.key)


# ---- live problems ----------------------------------------------------------------------------------------------


def _replaced_tensors(model: nn.Module) -> set[int]:
    """The ids of what a checkpoint must hold to fit the model; buffers that are not saved go along."""
    return {id(t) for t in model.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}


def _pickled(value: Any, blank: set[int]) -> bytes:
    import cloudpickle

    class WithoutWeights(cloudpickle.Pickler):
        def reducer_override(self, obj: Any) -> Any:
            if id(obj) in blank and isinstance(obj, Tensor):
                return _blank, (type(obj) is nn.Parameter, tuple(obj.shape), obj.dtype, obj.device, obj.requires_grad)
            reduced = super().reducer_override(obj)
            if isinstance(obj, type) and isinstance(reduced, tuple) and len(reduced) == 6:
                # a class that is sent by value: cloudpickle drops where it was defined, and keys hold that
                reduced[2][0].setdefault("__qualname__", obj.__qualname__)
            return reduced

    buffer = io.BytesIO()
    WithoutWeights(buffer, protocol=5).dump(value)
    return buffer.getvalue()


def _blank(is_parameter: bool, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, grad: bool) -> Tensor:
    fill = float("nan") if dtype.is_floating_point or dtype.is_complex else 0
    tensor = torch.full(shape, fill, dtype=dtype, device=device)
    return nn.Parameter(tensor, grad) if is_parameter else tensor.requires_grad_(grad)


def _unsendable(problem: Problem, error: Exception) -> ClusterError:
    """The error for a problem that cannot be pickled, which names the first part that cannot."""
    culprit, why = "the problem", error
    for name, part in problem.packed().items():
        try:
            _pickled(part, _replaced_tensors(problem.model))
        except Exception as own:
            culprit, why = f"its {name.strip('_').replace('_', ' ')} ({_kind(part)})", own
            break
    return ClusterError(
        "the problem cannot be sent to workers",
        where=culprit,
        why=f"{type(why).__name__}: {why}",
        do="open files, generators and locks where they are used, or write a study.toml, which is built on each worker",
    )


def _kind(part: Any) -> str:
    named: Callable | Any = part if hasattr(part, "__qualname__") else type(part)
    return f"{named.__module__}.{named.__qualname__}"
