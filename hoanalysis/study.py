"""StudySpec: what to analyse, read from a ``study.toml``, and the objects it names.

    [model]        factory = "package.module:name", args, mode ("eval" or "train")
    [data]         factory, args, batch_size, max_samples, direction_samples
    [loss]         factory, args             a function loss(model(x), y), or a class of such
    [checkpoints]  folder, pattern, log      relative to the file's own folder; log has step, loss, learning_rate
    [summaries]    order, diagonal, directions, partitions, dtype, memory, measure, taus, ...; curvature, a table
    [report]       notebook, parameters

Factories are taken from this file alone, never from a checkpoint. Reading a study imports no torch; building it does.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hoanalysis.errors import HoError, StudyError, listed, nearest
from hoanalysis.schema import DIRECTIONS

if TYPE_CHECKING:
    from torch import nn

    from hoanalysis.checkpoints import Run
    from hoanalysis.problem import Problem


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelTable(_Table):
    factory: str
    args: dict[str, Any] = {}
    mode: Literal["eval", "train"] = "eval"


class DataTable(_Table):
    factory: str
    args: dict[str, Any] = {}
    batch_size: int | None = Field(None, ge=1)
    max_samples: int | None = Field(None, ge=1)
    direction_samples: int | None = Field(None, ge=1)  # for the direction "gradient", where they are others


class LossTable(_Table):
    factory: str = "torch.nn.functional:cross_entropy"
    args: dict[str, Any] = {}


class CheckpointsTable(_Table):
    folder: str = "."
    pattern: str = "*.safetensors"
    log: str | None = None


class CurvatureTable(_Table):
    """Options of `hoanalysis.curvature`: the full Hessian at each checkpoint, where a study asks for it."""

    probes: int = Field(12, ge=3)
    tolerance: float = Field(1e-2, gt=0)
    max_products: int = Field(1000, ge=1)
    max_batches: int | None = Field(None, ge=1)


class SummariesTable(_Table):
    order: int = Field(2, ge=1)
    diagonal: int | None = Field(None, ge=1)
    directions: list[str] = Field(["gradient"], min_length=1)
    partitions: list[str] = Field(["canonical"], min_length=1)
    dtype: Literal["float32", "float64"] | None = None
    memory: str = "2GiB"
    engine: Literal["auto", "tangents", "nested"] = "auto"
    keep_batches: int = Field(20, ge=0)
    tolerance: float | None = Field(None, gt=0)
    include_frozen: bool = False
    self_check: bool = True
    seed: int = 0
    measure: list[Literal["along", "removed", "pairs", "path"]] = []
    taus: list[float] | None = Field(None, min_length=1)
    errors: Literal["conditional", "unconditional"] = "conditional"
    shards: int = Field(1, ge=1)
    curvature: CurvatureTable | None = None


class ReportTable(_Table):
    notebook: str | None = None
    parameters: dict[str, Any] = {}


class StudySpec(_Table):
    """A study file. `StudySpec.read` checks it; `problem`, `run` and `log` build what it names."""

    model: ModelTable
    data: DataTable
    loss: LossTable = LossTable()
    checkpoints: CheckpointsTable = CheckpointsTable()
    summaries: SummariesTable = SummariesTable()
    report: ReportTable = ReportTable()
    path: Path = Field(exclude=True)

    @classmethod
    def read(cls, path: str | Path) -> StudySpec:
        """The study at ``path`` (a folder means the ``study.toml`` in it).

        Raises
        ------
        StudyError
            Naming the line of a syntax error, the unknown key, or the value of the wrong kind.
        """
        path = Path(path)
        try:
            path = path / "study.toml" if path.is_dir() else path
            _refuse_special(path)
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise StudyError("there is no such study file", where=str(path), do=_neighbours(path)) from None
        except OSError as e:
            raise StudyError(f"the study file cannot be read: {e.strerror}", where=str(path)) from None
        except UnicodeDecodeError as e:
            raise StudyError(
                f"the study file is not UTF-8 text: {e.reason} at byte {e.start}",
                where=str(path),
                do="give a study.toml, not a checkpoint; `hoanalysis init FOLDER` writes one",
            ) from None
        except (ValueError, RecursionError) as e:  # also a number of more digits than Python reads
            raise StudyError(f"the study file is not valid TOML: {str(e)[:300]}", where=str(path)) from None
        if "path" in table:
            raise StudyError("unknown key 'path'", where=str(path), do=nearest("path", _keys(cls)))
        try:
            spec = cls(**table, path=path.resolve())
        except ValidationError as e:
            raise StudyError(_sentence(e), where=str(path)) from None
        if empty := [t for t in ("model", "data", "loss") if not getattr(spec, t).factory]:
            raise StudyError(
                f"the factory of {listed(f'[{t}]' for t in empty)} is not filled in",
                where=str(path),
                do='write factory = "package.module:name"; a module beside the study file can be named',
            )
        return spec

    @property
    def folder(self) -> Path:
        return self.path.parent

    @property
    def name(self) -> str:
        """The folder's name, or the file's where it is not called study.toml."""
        return self.folder.name if self.path.name == "study.toml" else self.path.stem

    def problem(self) -> Problem:
        """Model, data and loss as a `Problem`."""
        from hoanalysis.problem import Problem

        model, (data, of_direction) = self.network(), self.batches()
        return Problem(model, data, self.loss_function(), direction_data=of_direction)

    def network(self) -> nn.Module:
        """The model, in the mode that the study asks for."""
        with _importable(self.folder):
            model = self._call("model", self.model.factory, self.model.args)
        if not hasattr(model, "named_parameters"):
            raise StudyError(
                f"[model] factory {self.model.factory!r} gave a {type(model).__name__}, not a torch.nn.Module",
                where=str(self.path),
            )
        return model.train(self.model.mode == "train")

    def batches(self) -> tuple[Any, Any]:
        """The data, and those of the direction ``"gradient"`` where they are others (else None)."""
        sizes = (("batch_size", self.data.batch_size), ("max_samples", self.data.max_samples))
        args = {**self.data.args, **{k: v for k, v in sizes if v is not None}}
        with _importable(self.folder):
            data = self._call("data", self.data.factory, args)
            if self.data.direction_samples is None:
                return data, None
            return data, self._call("data", self.data.factory, {**args, "max_samples": self.data.direction_samples})

    def loss_function(self) -> Any:
        """The loss: the function that is named, with its arguments, or what the class that is named makes."""
        with _importable(self.folder):
            target = self._import("loss", self.loss.factory)
            if inspect.isclass(target):
                return self._call("loss", self.loss.factory, self.loss.args)
            return functools.partial(target, **self.loss.args) if self.loss.args else target

    def run(self) -> Run:
        """The checkpoints, in order."""
        from hoanalysis.checkpoints import open_run

        return open_run(self.folder / self.checkpoints.folder, self.checkpoints.pattern)

    def log(self) -> pd.DataFrame | None:
        """The training log, or None where the study names none."""
        if self.checkpoints.log is None:
            return None
        path = self.folder / self.checkpoints.folder / self.checkpoints.log
        try:
            _refuse_special(path)
            log = pd.read_csv(path)
        except FileNotFoundError:
            raise StudyError("there is no such training log", where=str(path), do=_neighbours(path)) from None
        except (OSError, ValueError, OverflowError) as e:
            raise StudyError(f"the training log is not a CSV table: {e}", where=str(path)) from None
        if missing := [c for c in ("step", "loss") if c not in log.columns]:
            raise StudyError(
                f"the training log lacks the columns {listed(missing)}",
                where=str(path),
                why=f"it has {listed(log.columns)}",
            )
        return log

    def settings(self) -> list[dict[str, Any]]:
        """The options of `hoanalysis.summarize` for each direction and partition, the first of each in front.

        Raises
        ------
        StudyError
            Where a direction or a partition stands twice, or there is no such direction.
        """
        s = self.summaries
        for key, values in (("directions", s.directions), ("partitions", s.partitions)):
            if repeated := [v for v in dict.fromkeys(values) if values.count(v) > 1]:
                raise StudyError(
                    f"{key} of [summaries] names {listed(repeated)} more than once",
                    where=str(self.path),
                    do="name each once: each is computed and reported on its own",
                )
        if unknown := [d for d in s.directions if d not in DIRECTIONS and not d.startswith("to:")]:
            raise StudyError(
                f"there is no direction named {listed(unknown)}",
                where=f"{self.path}, directions of [summaries]",
                do=nearest(unknown[0], [*DIRECTIONS, "to:<file>"]),
            )
        common = s.model_dump(exclude={"directions", "partitions", "curvature"})
        return [{**common, "direction": d, "partition": p} for d in s.directions for p in s.partitions]

    def curvature(self) -> dict[str, Any] | None:
        """The options of `hoanalysis.curvature`, or None where the study does not ask for the full Hessian."""
        s = self.summaries
        if s.curvature is None:
            return None
        return {**s.curvature.model_dump(), "include_frozen": s.include_frozen, "seed": s.seed, "dtype": s.dtype}

    def _call(self, table: str, factory: str, args: dict[str, Any]) -> Any:
        target = self._import(table, factory)
        try:
            return target(**args)
        except HoError:
            raise
        except (Exception, SystemExit) as e:
            hint = ""
            with suppress(TypeError, ValueError):  # not every class of C has a signature
                hint = f"it is called as {factory.partition(':')[2]}{inspect.signature(target)}"
            raise StudyError(
                f"[{table}] factory {factory!r} raised {type(e).__name__}: {e}",
                where=str(self.path),
                why=f"it was called with {args}",
                do=hint if isinstance(e, TypeError) else "",
            ) from e

    def _import(self, table: str, factory: str) -> Any:
        module_name, colon, name = factory.partition(":")
        if not colon or not name:
            raise StudyError(
                f"[{table}] factory {factory!r} is not of the form 'package.module:name'", where=str(self.path)
            )
        try:
            target = importlib.import_module(module_name)
        except (Exception, SystemExit) as e:
            raise StudyError(
                f"[{table}] factory {factory!r}: importing {module_name!r} raised {type(e).__name__}: {e}",
                where=str(self.path),
                do="install the package, or put the module beside the study file",
            ) from e
        for part in name.split("."):
            if not hasattr(target, part):
                raise StudyError(
                    f"[{table}] factory {factory!r}: {module_name!r} has no {name!r}",
                    where=str(self.path),
                    do=nearest(part, [n for n in dir(target) if not n.startswith("_")]),
                )
            target = getattr(target, part)
        if not callable(target):
            raise StudyError(
                f"[{table}] factory {factory!r} is a {type(target).__name__}, which cannot be called",
                where=str(self.path),
                do="name a class or a function",
            )
        return target


_FOLDERS: set[Path] = set()  # of the studies whose modules were imported in this process


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Modules beside the study file can be named as factories.

    Where another study's folder has a module of the same name, that one is forgotten, so that each study gets its own.
    """
    for name in {p.stem for p in folder.glob("*.py")} | {p.parent.name for p in folder.glob("*/__init__.py")}:
        file = Path(getattr(sys.modules.get(name), "__file__", None) or "")
        home = file.parent.parent if file.name == "__init__.py" else file.parent
        if home in _FOLDERS - {folder}:
            for known in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
                del sys.modules[known]
    _FOLDERS.add(folder)
    importlib.invalidate_caches()
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _refuse_special(path: Path) -> None:
    """A pipe or a device would be read for ever."""
    if "\0" in str(path):
        raise StudyError("a path holds a NUL character", where=repr(str(path)))
    if path.exists() and not path.is_file() and not path.is_dir():
        raise StudyError("this is a pipe, a socket or a device, not a file", where=str(path), do="copy it to a file")


def _sentence(error: ValidationError) -> str:
    """The first thing that pydantic found, as a sentence that names table, key and what would be right."""
    first = error.errors()[0]
    where = ".".join(str(p) for p in first["loc"])
    table, _, key = where.rpartition(".")
    place = f" in [{table}]" if table else ""
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}{place}: {nearest(key, _keys(StudySpec, table))}"
    if first["type"] == "missing":
        return f"missing key {key!r}{place}"
    return f"{key!r}{place} is {first['input']!r}: {first['msg'][:1].lower() + first['msg'][1:]}"


def _keys(spec: type[BaseModel], table: str = "") -> list[str]:
    if table in spec.model_fields:
        inner = spec.model_fields[table].annotation
        assert isinstance(inner, type)
        return list(inner.model_fields)  # type: ignore[attr-defined]
    return [k for k in spec.model_fields if k != "path"]


def _neighbours(path: Path) -> str:
    """What lies near a path that does not exist."""
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    found = sorted(p.name for p in parent.iterdir())
    return f"{parent} has {listed(found)}" if found else f"{parent} is empty"
