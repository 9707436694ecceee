"""The command line: ``hoanalysis init``, ``doctor``, ``estimate``, ``report``, ``summarize``,
``show``, ``diff``, ``notebooks``, ``unlock``.
"""

from __future__ import annotations

import _thread
import errno
import functools
import os
import shlex
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from hoanalysis import _early
from hoanalysis._version import __version__
from hoanalysis.errors import ArgumentError, HoError, ReportError, StoreError

app = typer.Typer(
    help="Post-mortems of training runs through exact summaries of higher-order derivatives.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

#: An environment variable: errors that were not foreseen are raised with all their frames.
TRACEBACK = "HOANALYSIS_TRACEBACK"

Scheduler = Annotated[
    str | None, typer.Option(help="the address of a Dask scheduler, tcp://host:8786, whose workers compute")
]
Workers = Annotated[int | None, typer.Option(min=1, help="compute with so many processes on this machine (Dask)")]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="torch threads of each process [with --workers: the cores shared out; else torch's own]"),
]
Studies = Annotated[list[Path], typer.Argument(help="study.toml files, or the folders that hold them")]


class _Terminated(KeyboardInterrupt):
    """SIGTERM, as from a batch system: the same orderly end as Ctrl-C."""


def _terminate(signum: int, frame: object) -> None:
    raise _Terminated


def _interrupt(number: signal.Signals) -> None:
    """The signal, to the main thread, from another one."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, number)
    else:
        _thread.interrupt_main(number)


class _Finalizers:
    """What is raised in ``__del__`` and in callbacks of weak references, which Python prints and drops.

    An interrupt that falls there is sent again; and of what an interrupt left half made nothing is told, for the
    command has said that it was interrupted. Everything else goes to ``before``.
    """

    def __init__(self, before: Callable[[sys.UnraisableHookArgs], Any]) -> None:
        self.before, self.interrupted = before, False

    def __call__(self, dropped: sys.UnraisableHookArgs) -> None:
        if isinstance(dropped.exc_value, KeyboardInterrupt):
            number = signal.SIGTERM if isinstance(dropped.exc_value, _Terminated) else signal.SIGINT
            again = threading.Timer(0.01, _interrupt, (number,))  # at once it would fall into this call
            again.daemon = True
            again.start()
        elif not self.interrupted:
            self.before(dropped)


def _command(fn: Callable[..., None]) -> Callable[..., None]:
    """An error that a user can cause is a sentence on stderr and exit code 1; Ctrl-C is 130, SIGTERM 143."""

    @functools.wraps(fn)
    def run(*args: Any, **kwargs: Any) -> None:
        warnings.showwarning = _as_sentence
        _early.release()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _terminate)
        before = sys.unraisablehook
        finalizers = sys.unraisablehook = _Finalizers(before)
        try:
            fn(*args, **kwargs)
        except HoError as error:
            typer.echo(f"error: {error}", err=True)
            if isinstance(error, StoreError) and fn.__name__ in ("report", "summarize"):
                typer.echo(f"what was finished is kept; to go on: {_this_call()}", err=True)
            raise typer.Exit(1) from None
        except OSError as error:
            if error.errno == errno.EPIPE:  # `hoanalysis show .. | head`: nobody listens any more
                raise
            from hoanalysis.store.files import shown

            where = (
                f"\n  where: {shown(os.fsdecode(error.filename))}" if isinstance(error.filename, str | bytes) else ""
            )
            typer.echo(f"error: {error.strerror or error}{where}", err=True)
            raise typer.Exit(1) from None
        except RecursionError:
            typer.echo(f"error: something is nested too deeply to be read\n  where: {_this_call()}", err=True)
            raise typer.Exit(1) from None
        except Exception as error:  # of the study's own code, or a mistake here: told, and shown whole on demand
            if os.environ.get(TRACEBACK):
                raise
            typer.echo(f"error: {_unexpected(error)}", err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt as stop:
            finalizers.interrupted = True
            typer.echo(f"interrupted; what was finished is kept; to go on: {_this_call()}", err=True)
            raise typer.Exit(143 if isinstance(stop, _Terminated) else 130) from None
        finally:
            if not finalizers.interrupted:
                sys.unraisablehook = before

    return run


def _unexpected(error: Exception) -> HoError:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = str(error).strip().splitlines()
    return HoError(
        f"{type(error).__name__}: {text[0][:500] if text else 'without a message'}",
        where=f"{frame.filename}, line {frame.lineno}, in {frame.name}",
        why="this was not foreseen; it is a mistake in the study's own code, or here",
        do=f"{TRACEBACK}=1 before the command shows where it came from",
        kept="finished units",
    )


def _as_sentence(message: Warning | str, *_: Any, **__: Any) -> None:
    typer.echo(f"warning: {message}", err=True)


def _this_call() -> str:
    """The command that is running, for a shell."""
    return shlex.join(["hoanalysis", *sys.argv[1:]])


def _version(show: bool) -> None:
    if show:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="show the version")
    ] = False,
) -> None:
    pass


@app.command("init")
@_command
def init(
    path: Annotated[Path, typer.Argument(help="a folder of checkpoints, or one checkpoint")],
    to: Annotated[Path | None, typer.Option(help="another study file than study.toml beside them")] = None,
    force: Annotated[bool, typer.Option("--force", help="overwrite the study file")] = False,
) -> None:
    """Write a commented study.toml for a folder of checkpoints, to be filled in."""
    from hoanalysis.new_study import write_study

    written = write_study(path, to, force=force)
    typer.echo(f"wrote {written.path}: {written.found}")
    typer.echo(f"to fill in: {', '.join(written.missing)}")
    typer.echo(f"then: hoanalysis report {written.path} --out reports/{written.name}")


@app.command("report")
@_command
def report(
    studies: Studies,
    out: Annotated[Path, typer.Option(help="the folder for page, notebook, netCDF and store")] = Path("reports"),
    notebook: Annotated[
        Path | None, typer.Option(help="a notebook with a parameters cell, instead of the built-in")
    ] = None,
    parameter: Annotated[
        list[str] | None, typer.Option("--parameter", "-p", help="name=value for the notebook; repeatable")
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, help="seconds that one cell of the notebook may take")] = 600,
    scheduler: Scheduler = None,
    workers: Workers = None,
    threads: Threads = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no progress bars")] = False,
) -> None:
    """Compute what is missing and render the reports of one or more studies.

    Exit code 0: all reports are there. 1: something failed, and what it was. 130: Ctrl-C. 143: SIGTERM. A second call
    goes on.
    """
    from hoanalysis.cluster.clients import opened
    from hoanalysis.reports import report as render

    given = _parameters(parameter or [])
    with opened(scheduler, workers, threads, typer.echo) as client:
        index = render(
            studies, out, notebook, given, timeout=timeout, progress=not quiet, say=typer.echo, client=client
        )
    typer.echo(f"report: {index}")


@app.command("estimate")
@_command
def estimate(
    study: Annotated[Path, typer.Argument(help="a study.toml, or the folder that holds it")],
    out: Annotated[Path, typer.Option(help="the folder of reports, whose store may hold units already")] = Path(
        "reports"
    ),
    time: Annotated[str | None, typer.Option(help="a budget: 90s, 10min, 2h")] = None,
    memory: Annotated[str | None, typer.Option(help="a budget for the whole process: 4GiB")] = None,
) -> None:
    """What a study will cost: seconds, memory and disk, after timing one batch, and what would fit a budget."""
    from hoanalysis.budget import estimate as predict
    from hoanalysis.study import StudySpec

    spec = StudySpec.read(study)
    stores = [out / "store", out / spec.name / "store"]  # of one study, and of several in one call
    store = next((path for path in stores if path.exists()), None)
    typer.echo(str(predict(spec, store=store, time=time, memory=memory)))


@app.command("summarize")
@_command
def summarize(
    study: Annotated[Path, typer.Argument(help="a study.toml, or the folder that holds it")],
    out: Annotated[Path, typer.Option(help="the folder for netCDF and store")] = Path("reports"),
    scheduler: Scheduler = None,
    workers: Workers = None,
    threads: Threads = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no progress bars")] = False,
) -> None:
    """Compute what is missing of one study, without a report."""
    from hoanalysis.cluster.clients import opened
    from hoanalysis.reports import Outcome, compute
    from hoanalysis.study import StudySpec

    spec = StudySpec.read(study)
    outcome = Outcome(spec.name, out)
    with opened(scheduler, workers, threads, typer.echo) as client:
        for path in compute(spec, outcome, progress=not quiet, say=typer.echo, client=client):
            typer.echo(f"summaries: {path}")
    if outcome.error is not None:
        raise outcome.error


@app.command("doctor")
@_command
def doctor(
    study: Annotated[Path, typer.Argument(help="a study.toml, or the folder that holds it")],
    seconds: Annotated[float, typer.Option(min=0, help="for the comparison of the batches with each other")] = 20,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="what is well in full: the rule of each op")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the findings as JSON")] = False,
) -> None:
    """Before paying for summaries: would the numbers of this study be right? Nothing is written.

    Exit code 1 where they would be wrong or could not be had, 0 otherwise.
    """
    from hoanalysis.diagnosis import doctor as examine

    diagnosis = examine(study, seconds=seconds)
    typer.echo(diagnosis.to_json() if as_json else diagnosis.text(verbose))
    if diagnosis.wrong:
        raise typer.Exit(1)


@app.command("show")
@_command
def show(
    path: Annotated[Path, typer.Argument(help="a netCDF file or a store")],
    name: Annotated[str | None, typer.Option(help="the study of a store that holds several; else all")] = None,
) -> None:
    """What a stored Dataset holds and what it says, in sentences."""
    from hoanalysis.analysis.findings import findings
    from hoanalysis.store import Store, is_store, open_dataset, open_store

    names = Store.open(path, mode="r").plan_names() if is_store(path) and name is None else []
    if name is not None and not is_store(path):
        raise ArgumentError(f"--name {name} chooses among the studies of a store", where=str(path), do="leave it out")
    for study in names if len(names) > 1 else [name]:
        ds = open_dataset(path) if study is None else open_store(path, study)
        if study is not None:
            typer.echo(f"{study}:")
        typer.echo(str(ds))
        for line in findings(ds):
            typer.echo(f"- {line}")


@app.command("diff")
@_command
def diff(
    a: Annotated[Path, typer.Argument(help="a netCDF file or a store")],
    b: Annotated[Path, typer.Argument(help="another one, or the same with --step A:B")],
    step: Annotated[
        str | None, typer.Option(help="a step of both, 'first' or 'last', or A:B; else every step that both have")
    ] = None,
    name: Annotated[str | None, typer.Option(help="the study, where a store holds several")] = None,
    top: Annotated[int, typer.Option(min=0, help="rows of each quantity on the terminal")] = 5,
    out: Annotated[Path | None, typer.Option(help="write all differences: .nc (labelled) or .csv (rows)")] = None,
) -> None:
    """What changes from A to B: groups matched by label, differences with their standard errors."""
    from hoanalysis.diff import diff as write_differences

    write_differences(a, b, step, name=name, top=top, out=out, say=typer.echo)


@app.command("notebooks")
@_command
def notebooks(
    to: Annotated[Path, typer.Argument(help="a folder, made where there is none")],
    force: Annotated[bool, typer.Option("--force", help="overwrite the notebooks and runs that are there")] = False,
) -> None:
    """Copy the notebooks, and the runs that they open, to where they can be run and edited."""
    from hoanalysis.examples import copy_examples

    for path in copy_examples(to, force=force):
        typer.echo(f"wrote {path}")
    typer.echo(f"then: jupyter lab {shlex.quote(str(to / 'notebooks'))}")


@app.command("unlock")
@_command
def unlock(store: Annotated[Path, typer.Argument(help="the folder of a store")]) -> None:
    """Clear the lock that a dead writer on another host left behind. Make sure that it is dead."""
    from hoanalysis.store import unlock as clear

    typer.echo(clear(store))


def _parameters(texts: list[str]) -> dict[str, Any]:
    """``name=value`` each."""
    given: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ReportError(f"a parameter is given as name=value, not {text!r}")
        if name in given:
            raise ReportError(f"the parameter {name!r} is given twice")
        given[name] = _value(value)
    return given


def _value(text: str) -> Any:
    """Read as TOML where all of it is one number, boolean, quoted text, list or table, else the text itself.

    TOML has no word for nothing: ``None`` is Python's, and ``'None'`` the text.

    >>> [_value(v) for v in ("0.5", "true", "[1, 2]", "fc1.weight", "1, 2", "5 # five", "2024-05-01", "None")]
    [0.5, True, [1, 2], 'fc1.weight', '1, 2', '5 # five', '2024-05-01', None]
    """
    import tomllib

    if text == "None":
        return None
    try:
        table = tomllib.loads(f"value = [{text}]")  # in brackets, so that a comment cannot hide what follows
    except (tomllib.TOMLDecodeError, RecursionError, ValueError):  # too many digits are a ValueError of Python's
        return text
    plain = set(table) == {"value"} and len(table["value"]) == 1
    return table["value"][0] if plain and isinstance(table["value"][0], (bool, int, float, str, list, dict)) else text


def main() -> None:
    """The command ``hoanalysis``."""
    try:
        app()
    except KeyboardInterrupt:  # between two commands' own handlers
        typer.echo("interrupted; nothing was begun", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
