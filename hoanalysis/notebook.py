"""What notebook cells show besides figures: sentences and tables, escaped, and the checkpoints at both ends."""

from __future__ import annotations

import html
from collections.abc import Sequence

import pandas as pd
import xarray as xr
from IPython.display import HTML

from hoanalysis import schema


def bullets(lines: Sequence[str]) -> HTML:
    """Sentences as a list."""
    return HTML("<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>")


def table(frame: pd.DataFrame) -> HTML:
    """A table with every cell escaped and numbers to four digits."""
    return HTML(frame.to_html(escape=True, border=0, float_format=lambda v: f"{v:.4g}"))


def ends(ds: xr.Dataset) -> list[xr.Dataset]:
    """The first and the last checkpoint that are computed; one where there is but one."""
    if schema.STEP not in ds.dims:
        return [ds]
    done = [i for i, n in enumerate(ds["n_batches"].values) if n > 0] or [0]
    return [ds.isel(step=i) for i in dict.fromkeys((done[0], done[-1]))]
