"""What notebook cells show besides figures: headings, sentences and tables, escaped; the checkpoints at both ends."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from IPython.display import HTML

from hoanalysis import schema
from hoanalysis.analysis.autopsy import Autopsy, autopsy
from hoanalysis.analysis.prediction import NEXT, single_steps

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


def heading(title: str, *paragraphs: str) -> HTML:
    """The heading of a section that is there only where there is something to show, and what it shows."""
    text = "".join(f"<p>{html.escape(readable(p))}</p>" for p in paragraphs)
    return HTML(f"<h2>{html.escape(readable(title))}</h2>{text}")


def series(ds: xr.Dataset, others: Mapping[str, str]) -> dict[str, xr.Dataset]:
    """Direction -> Dataset: ``ds`` under its own, and the files of ``others`` that are there."""
    from hoanalysis.store import open_dataset

    found = {direction: open_dataset(file) for direction, file in others.items() if Path(file).exists()}
    return {**found, str(ds.attrs["direction"]): ds}


def autopsy_of(along: Mapping[str, xr.Dataset], log: pd.DataFrame | None) -> Autopsy | None:
    """The autopsy of the run where it broke, or of its worst step; None where no step along ``to:next`` is computed."""
    ds = along.get(NEXT)
    if ds is None or schema.STEP not in ds.dims or not {"D1", "D2"} <= set(ds.data_vars) or not single_steps(ds):
        return None
    return autopsy(ds, gradient=along.get("gradient"), weights=along.get("weights"), log=log)


def rule_table(rule: xr.Dataset) -> pd.DataFrame:
    """`update_rule` in words: a column for each chain of single steps, each number with its standard error."""
    columns = {}
    for c in range(rule.sizes["chain"]):
        one = rule.isel(chain=c)
        rows = {
            "momentum": "momentum",
            "weight decay x learning rate": "decay",
            "learning rate of all": "learning_rate",
        }
        told = {title: _with_error(one[n].item(), one[f"{n}_se"].item()) for title, n in rows.items()}
        for group in rule[schema.GROUP].values:
            rate = one.sel(group=group)
            told[str(group)] = _with_error(rate["learning_rates"].item(), rate["learning_rates_se"].item())
        columns[f"steps {one['first'].item()} to {one['last'].item()}"] = told
    return pd.DataFrame(columns)


def _with_error(value: float, error: float) -> str:
    return f"{value:.2g} ± {error:.1g}" if np.isfinite(value) else "not told"


def checkpoints(ds: xr.Dataset) -> pd.DataFrame:
    """A row for each checkpoint of a series: its digest (12 digits), the engine, the self-check, the batches."""
    names = [n for n in ("sha256", "engine", "engine_detail", "self_check", "n_batches") if n in ds.coords or n in ds]
    frame = pd.DataFrame({n: np.atleast_1d(ds[n].values) for n in names}, index=np.atleast_1d(ds[schema.STEP].values))
    frame.index.name = schema.STEP
    return frame.assign(
        sha256=frame["sha256"].astype(str).str[:12],
        self_check=[f"{v:.1e}" if np.isfinite(v) else "" for v in frame["self_check"].astype(float)],
        **{n: frame[n].astype(str) for n in names if n not in ("sha256", "self_check")},
    )


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
