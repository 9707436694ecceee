"""One row per group: learning rates, regularizers, and the pairs and eigenvalues of a single checkpoint."""

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes

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
    ax = style.axes(ax, 7.5, 1.5 + 0.27 * max(len(groups), 3))
    series = list(frame[by].unique())
    values = frame["value"].to_numpy(float)
    style.signed_axis(ax, "x", values)
    for k, name in enumerate(series):
        part = frame[frame[by] == name].set_index("group").loc[groups]
        y = np.arange(len(groups)) + (k - (len(series) - 1) / 2) * 0.28
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
