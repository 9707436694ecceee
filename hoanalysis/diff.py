"""``hoanalysis diff``: what changes from one stored Dataset to another, on the terminal and into a file."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import xarray as xr

from hoanalysis import schema
from hoanalysis.analysis.compare import compare, differences
from hoanalysis.errors import ArgumentError
from hoanalysis.store import export, files, is_store, open_dataset, open_store

Say = Callable[[str], Any]


def diff(
    a: Path,
    b: Path,
    step: str | None = None,
    *,
    name: str | None = None,
    top: int = 5,
    out: Path | None = None,
    say: Say,
) -> None:
    """Tell the differences b - a; see `analysis.compare.compare`.

    Parameters
    ----------
    a, b
        netCDF files, Zarr exports or stores.
    step
        A step of both, ``"first"``, ``"last"``, or a pair ``"A:B"``; None is every step that both have.
    name
        The study, where a store holds several.
    top
        Rows of each quantity that are told, the most significant first.
    out
        A file for all of them: ``.nc``, labelled as `compare` returns it, or ``.csv``, the rows of `differences`. It
        is checked before anything is computed and appears whole or not at all.
    """
    if name is not None and not (is_store(a) or is_store(b)):
        raise ArgumentError(
            f"--name {name} chooses among the studies of a store, and neither is a store",
            where=f"{files.shown(a)}, {files.shown(b)}",
            do="leave it out",
        )
    _check(out, (a, b))
    first, second = (open_store(path, name) if name and is_store(path) else open_dataset(path) for path in (a, b))
    found = compare(first, second, steps(step))
    say(f"a: {files.shown(a)}\nb: {files.shown(b)}\ndifferences are b - a; errors: {found.attrs['errors']}")
    for line in _advice(found):
        say(f"- {_printable(line)}")
    frame = differences(found)
    for quantity in found.data_vars if top else ():
        rows = frame[frame["quantity"] == quantity].head(top)
        if len(rows):
            say(_table(rows))
    if out is not None:
        say(f"wrote {files.shown(export(found, out) if out.suffix == '.nc' else _write_csv(frame, out))}")


def _check(out: Path | None, inputs: tuple[Path, Path]) -> None:
    """Refuse a file that cannot be written, or that is one of the inputs, before anything is computed."""
    if out is None:
        return
    where = files.shown(out)
    if out.suffix not in (".nc", ".csv"):
        raise ArgumentError(f"the suffix {out.suffix!r} says no format", where=where, do="end --out in .nc or .csv")
    if not out.parent.is_dir():
        raise ArgumentError("the folder of --out is not there", where=where, do="make it, or choose another --out")
    if out.is_dir():
        raise ArgumentError("--out is a folder", where=where, do="choose the name of a file")
    if out.exists() and any(path.exists() and out.samefile(path) for path in inputs):
        raise ArgumentError(
            "--out is one of the two that are compared", where=where, do="choose another", kept="nothing was written"
        )


def steps(text: str | None) -> Any:
    """None, one step of both, or a pair; `ArgumentError` for anything else.

    >>> [steps(text) for text in (None, "40", "first:last")]
    [None, 40, ('first', 'last')]
    """
    if text is None:
        return None
    parts = [part if part in ("first", "last") else _whole(part, text) for part in text.split(":")]
    if len(parts) > 2:
        raise ArgumentError(f"--step {text!r} names {len(parts)} steps", do="give one of both, or a pair such as 0:480")
    return (parts[0], parts[1]) if len(parts) == 2 else parts[0]


def _whole(part: str, text: str) -> int:
    try:
        return int(part)
    except ValueError:
        raise ArgumentError(
            f"--step {text!r}: {part!r} is no step", do="give a whole number, first or last, or a pair such as 0:480"
        ) from None


def _advice(found: xr.Dataset) -> list[str]:
    """Each line of the status once, behind the steps that it is about unless it is about all."""
    words = found["status"].values.reshape(-1)
    if schema.STEP not in found.dims:
        return words[0].split("\n")
    lines: dict[str, list[str]] = {}
    for step, text in zip(found[schema.STEP].values, words, strict=True):
        for line in text.split("\n"):
            lines.setdefault(line, []).append(str(step))
    return [line if len(at) == len(words) else f"step {', '.join(at)}: {line}" for line, at in lines.items()]


def _table(rows: pd.DataFrame) -> str:
    used = [c for c in rows if not str(c).startswith(schema.GROUP) or rows[c].any()]
    shown = rows[used].map(lambda value: _printable(value) if isinstance(value, str) else value)
    return "\n" + shown.to_string(index=False, float_format="%.4g", na_rep="", max_colwidth=60)


def _printable(text: str) -> str:
    """Labels are data: what a terminal would obey or turn around is shown as a box."""
    return "".join(c if c.isprintable() else "\N{WHITE SQUARE}" for c in text)


def _write_csv(frame: pd.DataFrame, path: Path) -> Path:
    with files.explained("write the differences", path):
        temporary = path.parent / (files.HALF_MADE + files.token())
        try:
            files.write_durably(temporary, frame.to_csv(index=False).encode())
            os.rename(temporary, path)
        finally:
            files.remove_quietly(temporary)
    return path
