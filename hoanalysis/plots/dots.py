"""One row per group or entry: learning rates, regularizers, signs that are not settled, what changed between two."""

from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes

from hoanalysis.analysis.taylor_step import taylor_step as step_of
from hoanalysis.errors import HoError
from hoanalysis.plots import frames, style

ROWS = 60  # more rows than this are not readable; the largest are kept, and the figure says so


def learning_rates(
    ds: xr.Dataset,
    ax: Axes | None = None,
    *,
    regularization: frames.Step = None,
    epsilon: float = 1.0,
    used: frames.Used = None,
) -> Axes:
    """The learning rate of each group at the first and last checkpoint, with 2 standard errors, beside the rate used.

    ``regularization`` is that of the verb, or ``"taylor"`` for `analysis.taylor_step`. ``used`` is the rate used: a
    number, or the training log with columns ``step`` and ``learning_rate``.
    """
    frame = frames.rates(ds, regularization, epsilon)
    ax = rows(frame, ax)
    _used_lines(ax, frame, used)
    ax.axvline(0, color="0.7", lw=0.8, zorder=0)
    ax.set_xlabel("learning rate [no unit], bars: 2 standard errors")
    how = {None: "no regularization", "taylor": "Taylor step"}.get(regularization, f"{regularization} regularization")
    ax.set_title(f"Learning rates, {how}")
    return legend(ax)


def taylor_step(ds: xr.Dataset, ax: Axes | None = None, *, used: frames.Used = None) -> Axes:
    """The rates of the Taylor step at the first and last checkpoint, and by how much it is to change the loss.

    The step minimizes the Taylor polynomial where its last term vouches for it (`analysis.taylor_step`). ``used`` as
    for `learning_rates`.
    """
    if "D3" not in ds:
        return style.nothing(style.axes(ax, 5.0, 3.0), "no Taylor step: it needs the full D3, summarize with order=3")
    ax = learning_rates(ds, ax, regularization="taylor", used=used)
    told = [_gain(one) for one in frames.first_and_last(ds)]
    ax.set_title("The Taylor step" + "".join(f"\n{line}" for line in told if line), fontsize="medium")
    return ax


def _gain(one: xr.Dataset) -> str:
    found = step_of(one)
    value, error = found["predicted"].item(), found["predicted_se"].item()
    if not np.isfinite(value):
        return ""
    when = frames.step_of(one)
    place = "" if when is None else f"step {when}: "
    ending = str(found["status"].item()).partition(":")[0]
    doubt = f" ± {error:.1g}" if np.isfinite(error) else ""
    return f"{place}predicted change of the loss {value:.3g}{doubt} ({ending})"


def unsettled(ds: xr.Dataset, ax: Axes | None = None, *, step: Any = None, top: int = 20) -> Axes:
    """How many times as many batches would settle the signs of D1, D2 and the learning rates, the nearest first.

    k = (2 se / x)^2 at one checkpoint (`analysis.unsettled`); along the gradient the words below say of which errors.
    """
    try:
        frame = frames.open_signs(ds, step, top)
    except HoError as reason:
        return style.nothing(style.axes(ax, 5.0, 3.0), f"nothing to settle signs by: {reason.what}")
    if frame.empty:
        return style.nothing(
            style.axes(ax, 5.0, 3.0), "every sign is settled: no entry is within 2 standard errors of 0"
        )
    ax = bars(frame.assign(value=frame["times"]), ax)
    high = float(frame["times"].max())
    if high > 20:
        ax.set_xscale("log")
    ax.set_xlim(1, high * (1.5 if high > 20 else 1.08))
    note = frames.errors_told(ds)
    ax.set_xlabel("times as many batches to settle the sign [no unit]" + (f"\n({note})" if note else ""))
    when = frames.step_of(frames.at_step(ds, step))
    ax.set_title("Signs that are not settled" + ("" if when is None else f", step {when}"), fontsize="medium")
    return legend(ax)


def differences(
    ds: xr.Dataset, ax: Axes | None = None, *, other: xr.Dataset | None = None, step: Any = None, top: int = 20
) -> Axes:
    """The most significant differences from this Dataset to ``other``, in standard errors of each, b - a as `compare`.

    Without ``other``, from the first to the last checkpoint of a series; ``step`` chooses others, as in `compare`.
    """
    found = frames.compared(ds, other, step)
    if found is None:
        return style.nothing(style.axes(ax, 5.0, 3.0), frames.ALONE)
    frame = frames.differences(found, top)
    if frame.empty:
        return style.nothing(style.axes(ax, 5.0, 3.0), "no standard errors to judge differences by")
    ax = bars(frame, ax)
    for at in (-style.BAND, style.BAND):
        ax.axvline(at, color="0.4", lw=0.8, ls=":")
    ax.axvline(0, color="0.7", lw=0.8, zorder=0)
    note = frames.errors_told(ds)
    ax.set_xlabel("difference in standard errors; within the dots, not told from 0" + (f"\n({note})" if note else ""))
    ax.set_title(
        f"What changed most surely, from {frames.place(found, 'a')} to {frames.place(found, 'b')}", fontsize="medium"
    )
    return legend(ax)


def bars(frame: pd.DataFrame, ax: Axes | None) -> Axes:
    """A bar per row with its ``label`` and ``value``, one colour per ``quantity``."""
    ax = style.axes(ax, 8.5, 1.4 + 0.25 * max(len(frame), 3))
    place = np.arange(len(frame))
    for k, (name, part) in enumerate(frame.groupby("quantity", sort=False)):
        at = place[(frame["quantity"] == name).to_numpy()]
        colour = style.PALETTE[k % len(style.PALETTE)]
        ax.barh(at, part["value"], color=colour, height=0.7, label=style.text(str(name).replace("_", " ")))
    ax.set_yticks(place, labels=style.texts(frame["label"], 56), fontsize="small")
    ax.set_ylim(len(frame) - 0.5, -0.5)
    ax.grid(axis="x", color="0.92")
    ax.set_axisbelow(True)
    return ax


def _used_lines(ax: Axes, frame: pd.DataFrame, used: frames.Used) -> None:
    steps = list(frame["step"].unique())
    rates = {step: frames.used_at(used, step) for step in steps}
    if len(set(rates.values())) == 1:
        steps = steps[:1]
    for k, step in enumerate(steps):
        rate = rates[step]
        if rate is not None:
            colour, when = (style.PALETTE[k], f" at step {step}") if len(steps) > 1 else (style.USED, "")
            ax.axvline(rate, color=colour, ls="--", lw=1, label=f"used{when}")


def regularizer(ds: xr.Dataset, ax: Axes | None = None) -> Axes:
    """r = |D3[s,s,s]|^(2/3) of each group at the first and last checkpoint, with 2 standard errors."""
    ax = rows(frames.regularizers(ds), ax)
    ax.set_xlabel(r"r = |D3[s,s,s]|$^{2/3}$ [loss$^{2/3}$], bars: 2 standard errors")
    ax.set_title("Regularizer")
    return legend(ax)


def rows(frame: pd.DataFrame, ax: Axes | None, by: str = "step") -> Axes:
    """Dots with error bars, one row per group, one colour per step or per value of another column."""
    groups, note = _shown(frame)
    series = list(frame[by].unique())
    apart = min(0.28, 0.84 / len(series))  # the series of a group stay within its row
    ax = style.axes(ax, 7.5, 1.5 + 0.27 * max(len(groups), 3) * max(1.0, 0.4 * len(series)))
    values = frame["value"].to_numpy(float)
    style.signed_axis(ax, "x", values)
    for k, name in enumerate(series):
        part = frame[frame[by] == name].set_index("group").loc[groups]
        y = np.arange(len(groups)) + (k - (len(series) - 1) / 2) * apart
        label = f"step {name}" if by == "step" else str(name)
        bars = (style.BAND * part["se"].fillna(0)).to_numpy(float)
        finite = np.isfinite(part["value"].to_numpy(float))
        ax.errorbar(part["value"], y, xerr=bars, fmt="o", ms=4.5, lw=1.2, color=style.PALETTE[k], label=label)
        for at in y[~finite]:
            ax.annotate(
                "no effect or not computed",
                (0.01, at),
                xycoords=("axes fraction", "data"),
                fontsize="x-small",
                color="0.45",
                va="center",
            )
    ax.set_yticks(np.arange(len(groups)), labels=style.texts(groups), fontsize="small")
    ax.set_ylim(len(groups) - 0.5, -0.5)
    ax.grid(axis="x", color="0.92")
    ax.set_axisbelow(True)
    if note:
        ax.set_ylabel(note)
    return ax


def _shown(frame: pd.DataFrame) -> tuple[list[str], str]:
    groups = list(dict.fromkeys(frame["group"]))
    if len(groups) <= ROWS:
        return groups, ""
    largest = frame.groupby("group")["value"].agg(lambda x: x.abs().max()).nlargest(ROWS).index
    return [g for g in groups if g in set(largest)], f"the {ROWS} largest of {len(groups)} groups"


def legend(ax: Axes) -> Axes:
    """To the right of the axes."""
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize="small", frameon=False)
    return ax
