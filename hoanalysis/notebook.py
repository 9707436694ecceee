"""What notebook cells show besides figures: sentences and tables, escaped, and the checkpoints at both ends."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from IPython.display import HTML

from hoanalysis import schema

LONGEST_CELL, LONGEST_LINE = 300, 1000  # characters


def readable(text: str, width: int | None = None) -> str:
    """Text that is what it looks like: characters that hide, turn or break it as escapes, the middle left out if long.

    >>> print(readable("fc1\\u202e.weight"))
    fc1\\u202e.weight
    >>> print(readable("abcdefghij", width=7))
    abc…hij
    """
    seen = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if width is None or len(seen) <= width:
        return seen
    return seen[: width // 2] + "…" + seen[len(seen) - (width - 1) // 2 :]


def bullets(lines: Sequence[str]) -> HTML:
    """Sentences as a list."""
    return HTML("<ul>" + "".join(f"<li>{_line(readable(line))}</li>" for line in lines) + "</ul>")


def _line(text: str) -> str:
    """A sentence whole, in a box of its own where names in it are endless."""
    escaped = html.escape(text)
    return escaped if len(text) <= LONGEST_LINE else f'<div class="long">{escaped}</div>'


def table(frame: pd.DataFrame) -> HTML:
    """A table with every cell and label escaped, and numbers to four digits."""
    told = frame.map(_cell).rename(index=_cell, columns=_cell)
    with pd.option_context("display.max_colwidth", None):
        return HTML(told.to_html(escape=True, border=0, float_format=lambda v: f"{v:.4g}"))


def _cell(value: Any) -> Any:
    return readable(value, LONGEST_CELL) if isinstance(value, str) else value


def banner(ds: xr.Dataset) -> HTML | None:
    """Where units are missing, how many; None where all are there."""
    coverage = float(ds.attrs.get("coverage", 1.0))
    if coverage >= 1:
        return None
    wanted = int(ds.attrs.get("units", np.size(ds["n_batches"])))
    text = (
        f"This report is incomplete: {round(coverage * wanted)} of {wanted} units are in the store. "
        "What is missing is left blank in figures and tables; the same call computes it."
    )
    return HTML(f'<p class="banner"><strong>{html.escape(text)}</strong></p>')


def ends(ds: xr.Dataset) -> list[xr.Dataset]:
    """The first and the last checkpoint that are computed; one where there is but one."""
    if schema.STEP not in ds.dims:
        return [ds]
    done = [i for i, n in enumerate(ds["n_batches"].values) if n > 0] or [0]
    return [ds.isel(step=i) for i in dict.fromkeys((done[0], done[-1]))]
