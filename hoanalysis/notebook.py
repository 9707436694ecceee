"""What notebook cells show besides figures: headings, sentences and tables, escaped; the checkpoints at both ends."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from IPython.display import HTML, display

from hoanalysis import schema
from hoanalysis.analysis.autopsy import Autopsy, autopsy
from hoanalysis.analysis.coarsen import fewest, suggest_partition
from hoanalysis.analysis.compare import CLEAR
from hoanalysis.analysis.contributions import TIMES
from hoanalysis.analysis.findings import pm
from hoanalysis.analysis.prediction import NEXT, prediction, single_steps
from hoanalysis.analysis.update_rule import update_rule
from hoanalysis.analysis.verdict import Break, break_of
from hoanalysis.explorer import explore
from hoanalysis.explorer.frontend import live

LONGEST_CELL, LONGEST_LINE, SENTENCE = 300, 1000, 60  # characters
RANKED = (
    "The lines are over the run, the table at one checkpoint, ranked by the scale-free entry; one within 2 standard "
    "errors of 0 is not told from 0."
)


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


def bullets(lines: Sequence[str], strong: Sequence[str] = ()) -> HTML:
    """Sentences as a list, those that are in ``strong`` as well in bold type."""
    items = [(_line(readable(line)), line in strong) for line in lines]
    return HTML(
        "<ul>" + "".join(f"<li>{f'<strong>{text}</strong>' if bold else text}</li>" for text, bold in items) + "</ul>"
    )


def advice(statuses: Iterable[xr.DataArray]) -> HTML:
    """The ``status`` of a verb at checkpoints, a line for each of its sentences, with the step in front."""
    lines = []
    for status in statuses:
        where = f"Step {status[schema.STEP].item()}: " if schema.STEP in status.coords else ""
        lines += [where + line for line in str(status.item()).split("\n")]
    return bullets(lines)


def _line(text: str) -> str:
    """A sentence whole, in a box of its own where names in it are endless."""
    escaped = html.escape(text)
    return escaped if len(text) <= LONGEST_LINE else f'<div class="long">{escaped}</div>'


def heading(title: str, *paragraphs: str) -> HTML:
    """The heading of a section that is there only where there is something to show, and what it shows."""
    text = "".join(f"<p>{html.escape(readable(p))}</p>" for p in paragraphs)
    return HTML(f"<h2>{html.escape(readable(title))}</h2>{text}")


def view(ds: xr.Dataset, state: Mapping[str, Any], still: Callable[[], object], seen: xr.Dataset | None = None) -> None:
    """A section with two lives: `hoanalysis.explore` from ``state`` on, where somebody can move a slider.

    Where nobody can, as under papermill, ``still`` draws the figures instead, and no widget is made. They are of
    ``seen``, the checkpoints `until` a break: the explorer has all of ``ds``, and opens at the last of these.
    """
    if live():
        display(explore(ds, state={**opening(ds, seen), **state}))
    else:
        still()


def opening(ds: xr.Dataset, seen: xr.Dataset | None) -> dict[str, Any]:
    """The step at which an explorer of ``ds`` opens where sections show ``seen``: none, where that is its last."""
    if seen is None or schema.STEP not in ds.dims:
        return {}
    before, last = (ends(one)[-1][schema.STEP].item() for one in (seen, ds))
    return {} if before == last else {"step": before}


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


def rule_of(along: Mapping[str, xr.Dataset], log: pd.DataFrame | None) -> xr.Dataset | None:
    """`update_rule` of the run; None without the directions ``to:next`` and ``gradient``, or single steps."""
    steps, gradient = along.get(NEXT), along.get("gradient")
    if autopsy_of(along, None) is None or steps is None or gradient is None:
        return None
    return update_rule(steps, gradient, along.get("weights"), log)


def momentum_of(rule: xr.Dataset | None, log: pd.DataFrame | None) -> tuple[float | pd.DataFrame | None, float]:
    """The momentum for the edge of stability and its error: the log where it has the column, which has none, else that
    of the best known chain."""
    if log is not None and "momentum" in log:
        return log, 0.0
    if rule is None or not np.isfinite(rule["momentum"]).any():
        return None, 0.0
    best = int(np.nanargmin(np.where(np.isfinite(rule["momentum"]), rule["momentum_se"], np.nan)))
    return float(np.clip(rule["momentum"].values[best], 0.0, 1.0)), float(rule["momentum_se"].values[best])


def within_table(steps: xr.Dataset, broke: Break | None) -> pd.DataFrame:
    """How many steps each order predicts within 10 % of the measured change, before and after the break apart.

    Steps of training, or all moves between checkpoints where no two are one step apart; median |unexplained| beside.
    """
    told = prediction(steps).isel({schema.STEP: single_steps(steps)})
    told = told.isel({schema.STEP: np.flatnonzero(np.isfinite(told["measured"].values))})
    at = np.asarray(told[schema.STEP].values, float)
    parts = {"all steps": at == at}
    if broke is not None:
        parts = {f"before step {broke.step:g}": at < broke.step, f"from step {broke.step:g} on": at >= broke.step}
    columns = {}
    for name, part in parts.items():
        some = told.isel({schema.STEP: np.flatnonzero(part)})
        if not some.sizes[schema.STEP]:
            continue
        within, left = (some[n].transpose("order", schema.STEP).values for n in ("within", "unexplained"))
        n = within.shape[1]
        columns[f"{name}: within 10 %"] = [f"{int(row.sum())} of {n}" for row in within]
        columns[f"{name}: median |unexplained|"] = np.median(np.abs(left), axis=1)
    return pd.DataFrame(columns, index=pd.Index([f"order {d}" for d in told["order"].values]))


def suggested(ds: xr.Dataset) -> pd.DataFrame:
    """`suggest_partition` with as many groups as there are layers: a row for each, and what it keeps above them."""
    layers = len(set(ds["layer"].values.tolist())) if "layer" in ds.coords else 0
    wanted = min(max(layers, 2, fewest(ds)), ds.sizes[schema.GROUP])
    found = suggest_partition(ds, wanted)
    kept = pm(found.kept, found.kept_se, percent=True)
    rows = {name: ", ".join(members) for name, members in found.items()}
    return pd.Series(rows, name=f"{len(found)} groups keep {kept} of the gain of a step").to_frame()


def together(frame: pd.DataFrame) -> pd.DataFrame:
    """The columns ``group``, ``group2``, .. as one, named as in figures; layers left out."""
    groups = [c for c in frame.columns if str(c).startswith(schema.GROUP)]
    names = [TIMES.join(g for g in map(str, row) if g) for row in frame[groups].to_numpy(object)]
    rest = frame.drop(columns=[c for c in frame.columns if str(c).startswith("layer")] + groups)
    rest.insert(0, "groups", names)
    return rest


def with_errors(frame: pd.DataFrame) -> pd.DataFrame:
    """Columns ``x`` and ``x_se`` as one, in words."""
    told = frame.copy()
    for name in [c for c in frame.columns if f"{c}_se" in frame.columns]:
        told[name] = [pm(v, se) for v, se in frame[[name, f"{name}_se"]].to_numpy(float)]
        told = told.drop(columns=f"{name}_se")
    return told


def ranked(frame: pd.DataFrame) -> pd.DataFrame:
    """Pairs or triples as a table is to show them; entries that are not told from 0 say so."""
    told = with_errors(together(frame))
    words = [
        "" if np.isnan(x) else f"{x:.1f}" + ("" if x >= CLEAR else ", not told from 0") for x in told["significance"]
    ]
    return told.assign(significance=words).rename(columns={"significance": "|scale_free| / its standard error"})


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
    if not np.isfinite(value):
        return "not told"
    open_sign = error > 0 and abs(value) < CLEAR * error
    return f"{value:.2g} ± {error:.1g}" + (", not told from 0" if open_sign else "")


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
        words = len(told.columns) > 1 and told.iloc[:, -1].map(lambda v: len(str(v)) > SENTENCE).any()
        look = "words" if words else None  # a column of sentences is set like text, see the style of pages
        return HTML(told.to_html(escape=True, border=0, classes=look, float_format=lambda v: f"{v:.4g}"))


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
    counts = np.broadcast_to(ds["n_batches"].values, ds.sizes[schema.STEP])  # one for all, or one for each
    done = [i for i, n in enumerate(counts) if n > 0] or [0]
    return [ds.isel(step=i) for i in dict.fromkeys((done[0], done[-1]))]


def break_in(ds: xr.Dataset, found: Autopsy | None) -> Break | None:
    """Where the run broke: by its steps where they are summarized, else by the losses of ``ds`` alone."""
    if found is not None:
        return found.broke
    return break_of(ds) if schema.STEP in ds.dims and "D1" in ds else None


def until(ds: xr.Dataset | None, broke: Break | None) -> xr.Dataset | None:
    """The checkpoints up to the last before the loss climbed, all where it did not: what is asked of the last
    checkpoint of a broken run is asked there, and not of what is left of the model behind."""
    if ds is None or broke is None or schema.STEP not in ds.dims:
        return ds
    kept = np.flatnonzero(np.asarray(ds[schema.STEP].values, float) <= float(broke.step))
    return ds.isel({schema.STEP: kept}) if len(kept) else ds


def shown(ds: xr.Dataset, broke: Break | None) -> list[str]:
    """What `until` does to the sections of a report, as a sentence; none where it does nothing."""
    seen = until(ds, broke)
    before, last = (ends(one)[-1] for one in (ds if seen is None else seen, ds))
    if schema.STEP not in ds.dims or before[schema.STEP].item() == last[schema.STEP].item():
        return []
    return [
        f"Sections below that show one or two checkpoints show step {before[schema.STEP].item()}, the last before the "
        f"loss climbed, in place of the last of the run, step {last[schema.STEP].item()}."
    ]
