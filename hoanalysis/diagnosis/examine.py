"""The order of the checks. Whatever goes wrong in one is a finding, and the others are looked at all the same."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from hoanalysis.diagnosis import batches, derivatives, files, loader, model
from hoanalysis.diagnosis.findings import Diagnosis, Finding
from hoanalysis.diagnosis.subject import Subject, without_dropout
from hoanalysis.errors import ArgumentError, HoError
from hoanalysis.problem import Problem, full_precision
from hoanalysis.summaries import Settings

if TYPE_CHECKING:
    from hoanalysis.study import StudySpec

T = TypeVar("T")


def doctor(
    what: Problem | str | Path, order: int = 3, *, checkpoint: Any = None, seconds: float = 20.0, **options: Any
) -> Diagnosis:
    """What would make summaries wrong, or other than meant, on one small batch and before they are paid for.

    Looked at: modes (dropout, BatchNorm), dtypes, frozen and tied parameters; whether every pass over the data gives
    the same batches; whether each checkpoint fits; where values first stop being finite; kinks; which op got which
    rule; all orders against nested differentiation; D1 against the loss measured by forward passes; parameters that
    are not used and groups without effect; batches whose loss or D1 is far from the others', with their samples.

    Parameters
    ----------
    what
        A `Problem`, or a study: the path of a ``study.toml``, whose settings and checkpoints are then looked at.
    order, options
        For a Problem: the order and options of `hoanalysis.summarize` that are meant.
    checkpoint
        For a Problem: the weights, as for `hoanalysis.summarize`. None: the model's own.
    seconds
        For the pass over the batches: with too little, only the first of them are compared.

    Returns
    -------
    Diagnosis
        A sequence of `Finding`; ``.wrong`` where numbers would be wrong. Nothing is written, and the model comes back
        untouched.

    Examples
    --------
    >>> import torch, hoanalysis as ho
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Dropout(0.5), torch.nn.Linear(3, 2)).eval()
    >>> batches = [(torch.randn(8, 4), torch.randint(0, 2, (8,))) for _ in range(3)]
    >>> problem = ho.Problem(model, batches, torch.nn.functional.cross_entropy)
    >>> ho.doctor(problem).wrong
    False
    >>> _ = model.train()
    >>> ho.doctor(problem)["error"][0].what
    "dropout is active in '1'"
    """
    report = _Report()
    if isinstance(what, Problem):
        settings = report.attempt("settings", lambda: Settings(order, **_known(options)))
        name = type(what.model).__name__
        subject = Subject(name, what.model, what.data, what.direction_data, given=what)
        subject.settings = [settings] if settings is not None else []
        subject.checkpoint = report.attempt("checkpoints", lambda: _loaded(checkpoint))
    else:
        if options or checkpoint is not None:
            raise ArgumentError("a study has its own options and checkpoints", do="change the study file")
        subject = _of_study(Path(what), report)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", UserWarning)
        _examined(subject, report, seconds)
    for told in dict.fromkeys(str(w.message) for w in heard):
        report.add(Finding("note", "warnings", told))
    return Diagnosis(subject.name, report.findings)


@dataclass
class _Report:
    findings: list[Finding] = field(default_factory=list)

    def add(self, finding: Finding) -> None:
        if finding not in self.findings:
            self.findings.append(finding)

    @property
    def wrong(self) -> bool:
        return any(f.severity == "error" for f in self.findings)

    def attempt(self, topic: str, fn: Callable[[], T]) -> T | None:
        """The value; None, and a finding, where it is refused or fails."""
        try:
            return fn()
        except HoError as error:
            self.add(Finding.of(topic, error))
        except Exception as error:
            self.add(_unforeseen(topic, error))
        return None

    def collect(self, topic: str, findings: Callable[[], Iterable[Finding]]) -> None:
        """All findings up to where it fails, if it does."""

        def each() -> None:
            for finding in findings():
                self.add(finding)

        self.attempt(topic, each)


def _unforeseen(topic: str, error: Exception) -> Finding:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = (str(error).strip().splitlines() or ["without a message"])[0][:300]
    return Finding(
        "error", topic, f"{type(error).__name__}: {text}", f"{frame.filename}, line {frame.lineno}, in {frame.name}",
        "this was not foreseen; it is a mistake in the study's own code, or here",
    )  # fmt: skip


def _known(options: dict[str, Any]) -> dict[str, Any]:
    if unknown := [k for k in options if k not in Settings.__dataclass_fields__]:
        raise ArgumentError(f"unknown options: {', '.join(unknown)}", do="use those of ho.summarize")
    return options


def _loaded(checkpoint: Any) -> Any:
    from hoanalysis.checkpoints import load_checkpoint

    return load_checkpoint(checkpoint) if isinstance(checkpoint, (str, Path)) else checkpoint


# ---- a study ----------------------------------------------------------------------------------------------------


def _of_study(path: Path, report: _Report) -> Subject:
    """The parts of a study, each built by itself."""
    from hoanalysis.study import StudySpec

    subject = Subject(str(path))
    spec = report.attempt("study", lambda: StudySpec.read(path))
    if spec is None:
        return subject
    subject.name = f"{spec.name}: {path}"
    report.add(Finding("ok", "study", _told(spec)))
    subject.settings = [Settings(**s) for s in report.attempt("study", spec.settings) or []]
    subject.model = report.attempt("model", spec.network)
    subject.data, subject.direction_data = report.attempt("data", spec.batches) or (None, None)
    subject.loss = report.attempt("loss", spec.loss_function)
    subject.run = report.attempt("checkpoints", spec.run)
    subject.log = report.attempt("checkpoints", spec.log)
    report.collect("environment", lambda: _kernel(spec))
    return subject


def _told(spec: StudySpec) -> str:
    s = spec.summaries
    above = f" and the diagonal of D{s.diagonal}" if s.diagonal is not None and s.diagonal > s.order else ""
    return f"order {s.order}{above}; directions {', '.join(s.directions)}; partitions {', '.join(s.partitions)}"


def _kernel(spec: StudySpec) -> Iterator[Finding]:
    """Whether the notebook of the report can be run: its kernel is installed, its parameters are known."""
    from hoanalysis.reports.execute import builtin_notebook, prepare

    named = spec.folder / spec.report.notebook if spec.report.notebook else builtin_notebook()
    prepared = prepare(named, spec.report.parameters, {})
    yield Finding("ok", "environment", f"the report runs {named.name} in the kernel {prepared.kernel}")


def _environment() -> Iterator[Finding]:
    threads = torch.get_num_threads()
    yield Finding(
        "ok",
        "environment",
        f"Python {sys.version.split()[0]}, PyTorch {torch.__version__}, {threads} thread{'s' * (threads > 1)}",
    )
    if torch.is_autocast_enabled("cpu"):
        yield Finding("note", "environment", "autocast is on, and is switched off while derivatives are computed")


# ---- the checks -------------------------------------------------------------------------------------------------


@full_precision()
def _examined(subject: Subject, report: _Report, seconds: float) -> None:
    report.collect("environment", _environment)
    kept = loader.Kept()
    if subject.model is not None:
        report.collect("model", lambda: model.examine(subject))
    if subject.data is not None:
        kept = _passes(subject.data, "data", report)
    if subject.direction_data is not None:
        _passes(subject.direction_data, "direction", report)
    if subject.model is None or not kept.batches or (subject.loss is None and subject.given is None):
        return
    with without_dropout(subject.model):
        problem = report.attempt("loss", lambda: subject.problem(kept.batches))
        if problem is None:
            return
        for note in problem.notes:
            report.add(Finding("note", "loss", note))
        if subject.run is not None:
            report.collect("checkpoints", lambda: files.examine(subject, problem))
            if subject.checkpoint is None:
                note = "no checkpoint can be used: what follows is at the weights that the model is built with"
                report.add(Finding("note", "checkpoints", note))
        elif (given := subject.checkpoint) is not None:
            fits = report.attempt("checkpoints", lambda: problem.fitted(given))
            subject.checkpoint = given if fits is not None else None
        if not subject.settings:
            return
        report.collect("forward", lambda: derivatives.forward(subject, problem))
        failed = any(f.topic == "forward" and f.severity == "error" for f in report.findings)
        if not failed:
            report.collect("derivatives", lambda: derivatives.orders(subject, problem))
            report.collect("slopes", lambda: derivatives.slopes(subject, problem))
        report.collect("batches", lambda: batches.examine(subject, problem, kept, seconds, failed))


def _passes(data: Any, topic: str, report: _Report) -> loader.Kept:
    result = report.attempt(topic, lambda: loader.examine(data, topic))
    kept, found = result if result is not None else (loader.Kept(), [])
    for finding in found:
        report.add(finding)
    return kept
