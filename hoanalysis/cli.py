"""The command line: ``hoanalysis report``, ``summarize``, ``show``."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from hoanalysis._version import __version__
from hoanalysis.errors import HoError, ReportError

app = typer.Typer(
    help="Post-mortems of training runs through exact summaries of higher-order derivatives.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Studies = Annotated[list[Path], typer.Argument(help="study.toml files, or the folders that hold them")]


def _command(fn: Callable[..., None]) -> Callable[..., None]:
    """An error that a user can cause is a sentence on stderr and exit code 1; Ctrl-C is 130."""

    @functools.wraps(fn)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            fn(*args, **kwargs)
        except HoError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            typer.echo("interrupted; what was finished is kept, call again to go on", err=True)
            raise typer.Exit(130) from None

    return run


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
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no progress bars")] = False,
) -> None:
    """Compute what is missing and render the reports of one or more studies."""
    from hoanalysis.reports import report as render

    index = render(studies, out, notebook, dict(map(_parameter, parameter or [])), progress=not quiet, say=typer.echo)
    typer.echo(f"report: {index}")


@app.command("summarize")
@_command
def summarize(
    study: Annotated[Path, typer.Argument(help="a study.toml, or the folder that holds it")],
    out: Annotated[Path, typer.Option(help="the folder for netCDF and store")] = Path("reports"),
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no progress bars")] = False,
) -> None:
    """Compute what is missing of one study, without a report."""
    from hoanalysis.reports import Outcome, compute
    from hoanalysis.study import StudySpec

    spec = StudySpec.read(study)
    for path in compute(spec, Outcome(spec.name, out), progress=not quiet, say=typer.echo):
        typer.echo(f"summaries: {path}")


@app.command("show")
@_command
def show(path: Annotated[Path, typer.Argument(help="a netCDF file or a store")]) -> None:
    """What a stored Dataset holds and what it says, in sentences."""
    from hoanalysis.analysis.findings import findings
    from hoanalysis.store import open_dataset

    ds = open_dataset(path)
    typer.echo(str(ds))
    for line in findings(ds):
        typer.echo(f"- {line}")


def _parameter(text: str) -> tuple[str, Any]:
    """``name=value``; the value is read as TOML where it is one (numbers, true, lists), else as text."""
    import tomllib

    name, equals, value = text.partition("=")
    if not equals:
        raise ReportError(f"a parameter is given as name=value, not {text!r}")
    try:
        return name, tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError:
        return name, value


if __name__ == "__main__":
    sys.exit(app())
