"""Studies one after the other: compute what is missing, export, execute the notebook, convert it to a page."""

from __future__ import annotations

import contextlib
import os
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import xarray as xr

from hoanalysis.analysis.findings import findings
from hoanalysis.curvatures import curvatures
from hoanalysis.errors import ArgumentError, CheckpointError, HoError, ReportError, StoreError, listed
from hoanalysis.reports.execute import (
    CELL_TIMEOUT,
    NOTEBOOK,
    NotebookFailed,
    Prepared,
    builtin_notebook,
    failed_copy,
    prepare,
)
from hoanalysis.reports.output import make_folder, refuse_unusable, write_whole
from hoanalysis.reports.pages import PAGE, index_page, page
from hoanalysis.store import Store, export
from hoanalysis.store.files import HALF_MADE, shown
from hoanalysis.study import StudySpec

FAILED, STORE, DATASET = "report.failed.ipynb", "store", "summaries.nc"

Say = Callable[[str], None]


@dataclass
class Outcome:
    """What became of one study."""

    name: str
    folder: Path
    computed: int = 0
    present: int = 0
    units: int = 0
    dataset: Path | None = None
    rendered: bool = False
    failed: Path | None = None
    error: HoError | None = None
    findings: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def page(self) -> Path:
        return self.folder / PAGE

    @property
    def done(self) -> bool:
        return self.rendered and self.error is None


def report(
    studies: str | Path | Sequence[str | Path],
    out: str | Path,
    notebook: str | Path | None = None,
    parameters: Mapping[str, Any] | None = None,
    *,
    timeout: float = CELL_TIMEOUT,
    progress: bool = True,
    say: Say = print,
    client: Any = None,
) -> Path:
    """Analyse studies and render their reports under ``out``; the path of the page to open.

    Parameters
    ----------
    studies
        One ``study.toml`` (or its folder), whose page is ``out/index.html``; or several, each in a folder of its
        name with an index in ``out``, which is written anew after each study.
    notebook
        A notebook with a cell tagged ``parameters``, instead of the one that the study names or the built-in. It runs
        in the folder of the report, with the kernel that it names.
    parameters
        Values for that cell, over those of the study: numbers, text, lists and tables of them. Of ``dataset`` (the
        netCDF), ``others`` (direction -> netCDF of the study's further directions), ``log``, ``title`` and ``study``
        the notebook is given what its cell declares.
    timeout
        Seconds that one cell may take.
    client
        A `distributed.Client` whose workers compute what is missing, as for `hoanalysis.summarize_run`.

    Raises
    ------
    StudyError, ReportError
        Before anything is computed: a study, a notebook or a parameter that cannot be used, an ``out`` that cannot be
        written.
    HoError
        For a single study, what went wrong. Of several, the others go on and the index shows the failure; at the end
        one `ReportError` names those that failed. Finished units are kept in any case, and shown where there are some;
        a notebook that failed is left as ``report.failed.ipynb``, with the reason on top.
    KeyboardInterrupt
        On Ctrl-C, when the failed notebook and the index are written.
    """
    given = [studies] if isinstance(studies, (str, Path)) else list(studies)
    if not given:
        raise ReportError("there is no study to report on", do="name at least one study.toml")
    specs = [StudySpec.read(p) for p in given]
    outcomes = _outcomes(specs, Path(out))
    works = [
        (spec, _prepared(spec, o.folder, notebook, parameters or {})) for spec, o in zip(specs, outcomes, strict=True)
    ]
    for folder in dict.fromkeys((Path(out), *(o.folder for o in outcomes))):
        refuse_unusable(folder, PAGE)
    several, unwritten = len(outcomes) > 1, None
    for (spec, prepared), outcome in zip(works, outcomes, strict=True):
        try:
            _one(spec, prepared, outcome, timeout, progress, say, client)
        except KeyboardInterrupt:
            outcome.error = outcome.error or ReportError("interrupted", do="call again: finished units are kept")
            raise
        finally:
            unwritten = _write_index(Path(out), outcomes) if several else None
    if unwritten is not None:
        raise unwritten
    if failed := [o for o in outcomes if o.error is not None]:
        raise _summed_up(outcomes, failed, Path(out) / PAGE)
    return Path(out) / PAGE


def _write_index(out: Path, outcomes: Sequence[Outcome]) -> ReportError | None:
    """The error where it cannot be written: that stops no study, the last one counts."""
    try:
        make_folder(out)
        write_whole(out / PAGE, index_page(outcomes))
    except ReportError as error:
        return error
    return None


def _outcomes(specs: Sequence[StudySpec], out: Path) -> list[Outcome]:
    if len(specs) == 1:
        return [Outcome(specs[0].name, out)]
    names = [s.name for s in specs]
    if repeated := sorted({n for n in names if names.count(n) > 1}):
        raise ReportError(f"several studies are called {listed(repeated)}", do="put them in folders of different names")
    for name, spec in zip(names, specs, strict=True):
        if name in ("", ".", "..", PAGE) or name.startswith(HALF_MADE):
            raise ReportError(
                f"a report cannot be put into a folder called {name!r}",
                where=shown(spec.path),
                why="the report of a study is put into a folder of its name",
                do="rename the study's folder or file",
            )
    return [Outcome(name, out / name) for name in names]


def _summed_up(outcomes: Sequence[Outcome], failed: Sequence[Outcome], index: Path) -> HoError:
    """The error of a single study, or the one that names those that failed."""
    if len(outcomes) == 1:
        assert outcomes[0].error is not None
        return outcomes[0].error
    return ReportError(
        f"{len(failed)} of {len(outcomes)} reports failed: {listed(o.name for o in failed)}",
        why="; ".join(f"{o.name}: {o.error.what}" for o in failed if o.error is not None),
        do=f"see the red cards of {shown(index)}",
        kept="the other reports, and all finished units",
    )


def _prepared(spec: StudySpec, folder: Path, notebook: str | Path | None, parameters: Mapping[str, Any]) -> Prepared:
    named = spec.folder / spec.report.notebook if spec.report.notebook else builtin_notebook()
    automatic: dict[str, Any] = {"dataset": DATASET, "title": spec.name, "study": spec.name}
    if others := _others(spec):
        automatic["others"] = others
    if spec.checkpoints.log is not None:
        log = spec.folder / spec.checkpoints.folder / spec.checkpoints.log
        automatic["log"] = os.path.relpath(os.path.realpath(log), os.path.realpath(folder))
    path = Path(notebook) if notebook is not None else named
    return prepare(path, {**spec.report.parameters, **parameters}, automatic)


def _others(spec: StudySpec) -> dict[str, str]:
    """Direction -> netCDF of the study's further directions, in its first partition; named as `compute` names them."""
    (_, *directions), partition = spec.summaries.directions, spec.summaries.partitions[0]
    return {d: f"summaries-{re.sub(r'[^A-Za-z0-9_.]+', '-', f'{d}-{partition}')}.nc" for d in directions}


_NOTHING = "the direction 'to:next' needs a checkpoint that follows"


def _one(
    spec: StudySpec, prepared: Prepared, outcome: Outcome, timeout: float, progress: bool, say: Say, client: Any
) -> None:
    """One study, from its checkpoints to its page. What goes wrong is noted in ``outcome``; Ctrl-C is passed on."""
    try:
        datasets = compute(spec, outcome, progress, say, client)
        if outcome.folder / DATASET not in datasets or not outcome.present:
            raise outcome.error or ReportError("the study asks for no summary", where=shown(spec.path), why=_NOTHING)
        outcome.dataset = outcome.folder / DATASET
        ds = datasets[outcome.dataset]
        outcome.findings = findings(ds, spec.log(), _of_other_directions(ds, datasets))
        outcome.losses = np.atleast_1d(ds["loss"].values).tolist()
        say(f"{outcome.name}: executing {prepared.path.name}")
        _render(prepared, outcome, timeout)
    except HoError as error:
        outcome.error = outcome.error or error
    except Exception as error:
        outcome.error = outcome.error or _unexpected(error)


def _of_other_directions(ds: xr.Dataset, datasets: Mapping[Path, xr.Dataset]) -> dict[str, xr.Dataset]:
    """The Datasets of the same partition along other directions."""
    same = [other for other in datasets.values() if other.attrs["partition"] == ds.attrs["partition"]]
    return {other.attrs["direction"]: other for other in same if other is not ds}


def _render(prepared: Prepared, outcome: Outcome, timeout: float) -> None:
    try:
        executed = prepared.execute(outcome.folder, timeout)
    except KeyboardInterrupt as stop:
        if isinstance(stop.__cause__, NotebookFailed):
            outcome.error = _failure(prepared, outcome, stop.__cause__)
        raise
    except NotebookFailed as failure:
        raise _failure(prepared, outcome, failure) from None
    write_whole(outcome.folder / NOTEBOOK, nbformat.writes(executed))
    write_whole(outcome.page, page(executed, outcome.name))
    outcome.rendered = True
    with contextlib.suppress(OSError):
        (outcome.folder / FAILED).unlink()


def _failure(prepared: Prepared, outcome: Outcome, failure: NotebookFailed) -> ReportError:
    """Keep the notebook as far as it came; the last good notebook and page stay as they were."""
    target, do = outcome.folder / FAILED, ""
    try:
        write_whole(target, nbformat.writes(failed_copy(failure)))
        outcome.failed, do = target, f"open {shown(target)}"
    except ReportError as error:  # the disk is full, say: the reason for the failure matters more
        do = f"the failed notebook could not be kept: {error.what}"
    return ReportError(
        f"the notebook failed: {failure.reason}",
        where=shown(prepared.path),
        do=do,
        kept=f"every summary, in {shown(outcome.folder / STORE)}",
    )


def _unexpected(error: Exception) -> ReportError:
    """An error of the study's own code, say: what Python knows of it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    notes = "; ".join(getattr(error, "__notes__", ()))
    told = ReportError(
        f"{type(error).__name__}: {error}" + (f" ({notes})" if notes else ""),
        where=f"{shown(frame.filename)}, line {frame.lineno}, in {frame.name}",
        kept="finished units",
    )
    told.__cause__ = error
    return told


@contextmanager
def _of_study(spec: StudySpec) -> Iterator[None]:
    """An option that makes no sense is one of the study file."""
    try:
        yield
    except ArgumentError as error:
        do = error.do or "correct it in [summaries]"
        raise type(error)(error.what, where=error.where or f"{spec.path}, [summaries]", why=error.why, do=do) from error


def compute(
    spec: StudySpec, outcome: Outcome, progress: bool = True, say: Say = print, client: Any = None
) -> dict[Path, xr.Dataset]:
    """Fill the store of a study and export its Datasets, one for each direction and partition.

    The workers of a Dask ``client`` compute what is missing, where one is given; this process alone writes.

    Where a unit cannot be computed the error goes to ``outcome.error``, and the Datasets have gaps. What is wrong with
    the study as a whole is raised, before anything is written.
    """
    from hoanalysis.summaries import Settings, Work

    run, problem, _ = spec.run(), spec.problem(), spec.log()  # a log that cannot be read is named now, not at the end
    with _of_study(spec):
        works = [Work(problem, Settings(**options)) for options in spec.settings()]
    _refuse_unfitting(run, works[0])
    workers = None if client is None else _workers_of(client, spec)
    refuse_unusable(outcome.folder, DATASET)
    make_folder(outcome.folder)
    exported: dict[Path, xr.Dataset] = {}
    with Store.open(outcome.folder / STORE, mode="w") as store:
        beside = _hessians(spec, run, problem, store, outcome, progress, say, workers)
        for k, work in enumerate(works):
            plan = work.plan(work.steps(run), series=True)
            for line in store.register(work.name, plan):
                say(f"{outcome.name}: {line}")
            try:
                outcome.computed += work.fill(store, run, plan, progress, workers)
            except StoreError:
                raise
            except Exception as error:
                outcome.error = outcome.error or (error if isinstance(error, HoError) else _unexpected(error))
            there = outcome.present
            ds = _assembled(plan, store, outcome).assign(beside)
            path = outcome.folder / (DATASET if k == 0 else f"summaries-{work.name}.nc")
            if outcome.present > there or outcome.error is None:  # else the last good file stays
                export(ds, path)
                exported[path] = ds
    say(f"{outcome.name}: {_computed(outcome)}")
    return exported


def _workers_of(client: Any, spec: StudySpec) -> Any:
    from hoanalysis.cluster.clients import checked
    from hoanalysis.cluster.driver import Workers
    from hoanalysis.cluster.parcels import Source

    return Workers(checked(client), Source.of_study(spec))


def _hessians(
    spec: StudySpec, run: Any, problem: Any, store: Store, outcome: Outcome, progress: bool, say: Say, workers: Any
) -> dict[str, xr.DataArray]:
    """The curvature of the full Hessian, for every Dataset of the study; nothing where it does not ask for it."""
    options = spec.curvature()
    if options is None:
        return {}
    found, computed, failed = curvatures(run, problem, store, options, progress, workers)
    outcome.error = outcome.error or failed
    if computed:
        say(f"{outcome.name}: computed the curvature of {computed} checkpoints")
    return {str(name): array for name, array in found.data_vars.items()}


def _refuse_unfitting(run: Any, work: Any) -> None:
    """Where no checkpoint can be read and fits the model, say so before anything is written.

    Where some do, the others are gaps, named when their turn comes: a file that was cut short costs its own step only.
    """
    first: HoError | None = None
    for position in range(len(run)):
        try:
            work.state(run[position])
            return
        except CheckpointError as error:
            first = first or error
    assert first is not None  # a run is never empty
    several = f"none of the {len(run)} checkpoints can be used; the first: " if len(run) > 1 else ""
    raise type(first)(several + first.what, where=first.where, why=first.why, do=first.do, kept="nothing was written")


def _assembled(plan: Mapping[str, Any], store: Store, outcome: Outcome) -> xr.Dataset:
    """The Dataset of a plan; how many units it asks for, and how many are there, is added to ``outcome``."""
    from hoanalysis.units import assemble, gap_of

    def read(key: Mapping[str, Any]) -> xr.Dataset | None:
        unit = store.read(key)
        gap = gap_of(unit) is not None  # there is nothing to compute: it is not asked for
        outcome.present += unit is not None and not gap
        outcome.units -= gap
        return unit

    outcome.units += sum(len(step["units"]) for step in plan["steps"])
    return assemble(plan, read)


def _computed(o: Outcome) -> str:
    if o.error is not None:
        return f"{o.present} of {o.units} summaries are in {shown(o.folder / STORE)}; {o.error.what}"
    if o.computed:
        return f"computed {o.computed} of {o.units} summaries"
    return f"nothing to compute, all {o.units} summaries are in {shown(o.folder / STORE)}"
