"""What made a step: the terms of an autopsy one on the other, and the predicted beside the measured change of steps."""

from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes

from hoanalysis.analysis.autopsy import Autopsy, autopsy
from hoanalysis.analysis.contributions import PATH
from hoanalysis.analysis.prediction import NEXT
from hoanalysis.analysis.prediction import prediction as predicted
from hoanalysis.analysis.verdict import break_of
from hoanalysis.errors import HoError
from hoanalysis.plots import style
from hoanalysis.plots.dots import legend, rows

UP, DOWN, WHOLE = "#b2182b", "#2166ac", "0.35"  # the ends of the paper's legend: red raises the loss, blue lowers it


def bars(found: Autopsy, top: int = 12) -> pd.DataFrame:
    """A row per bar: ``label, start, value, se, whole``. The ``top`` largest terms, each from where the one before
    ended, and all others together lead to ``predicted``; what is unexplained leads to ``measured``.
    """
    kept, rest = found.terms.head(top), found.terms.iloc[top:]
    rows = [(f"{row.term}  (order {row.order})", row.value, row.se, False) for row in kept.itertuples()]
    if len(rest):
        rows.append((f"{len(rest)} smaller terms", rest["value"].sum(), np.nan, False))
    rows.append(("predicted", found.predicted, found.predicted_se, True))
    rows.append(("unexplained", found.unexplained, found.unexplained_se, False))
    rows.append(("measured", found.measured, found.measured_se, True))
    frame = pd.DataFrame(rows, columns=["label", "value", "se", "whole"])
    ends = frame["value"].where(~frame["whole"], 0.0).cumsum()
    frame["start"] = np.where(frame["whole"], 0.0, ends - frame["value"])
    return frame[["label", "start", "value", "se", "whole"]]


def waterfall(ds: xr.Dataset, ax: Axes | None = None, *, step: Any = None, top: int = 12) -> Axes:
    """The terms that make the predicted change of the loss over one step of training, with 2 standard errors.

    ``ds`` is a series along ``to:next``; without ``step`` it is where the run broke, or else the worst single step.
    """
    try:
        found = autopsy(ds, step)
    except HoError as reason:
        if step is not None:
            raise
        return style.nothing(style.axes(ax, 8.5, 2.0), f"no autopsy: {reason.what}")
    frame = bars(found, top)
    ax = style.axes(ax, 8.5, 1.2 + 0.3 * len(frame))
    place = np.arange(len(frame))
    colours = np.where(frame["whole"], WHOLE, np.where(frame["value"] > 0, UP, DOWN))
    ax.barh(place, frame["value"].fillna(0), left=frame["start"].fillna(0), color=colours, height=0.7)
    ends, error = frame["start"] + frame["value"], style.BAND * frame["se"].fillna(0)
    ax.errorbar(ends, place, xerr=error, fmt="none", ecolor="black", elinewidth=1, capsize=2)
    ax.set_yticks(place, labels=style.texts(frame["label"], 60), fontsize="small")
    ax.set_ylim(len(frame) - 0.5, -0.5)
    ax.axvline(0, color="0.7", lw=0.8, zorder=0)
    ax.grid(axis="x", color="0.93")
    ax.set_axisbelow(True)
    ax.set_xlabel("change of the loss [loss], bars: 2 standard errors")
    ax.set_title(f"What the step from {found.step:g} to {found.to_step:g} did to the loss", fontsize="medium")
    return ax


def did(found: Autopsy) -> pd.DataFrame:
    """``group, quantity, value, se``: what each group did to the loss, those first that raised it most.

    By the path where the slopes along the step were measured, with the errors of sample and quadrature, and beside it
    by the polynomial, whose errors leave out what it leaves out.
    """
    shares = found.shares
    cut = f"Taylor polynomial of order {found.shares_order}"
    columns = {cut: (shares["polynomial"], shares["polynomial_se"])}
    if found.shares_by == PATH:
        error = pd.Series(np.hypot(shares["share_se"].fillna(0), shares["left_out"]), index=shares.index)
        columns = {"gradients along the step": (shares["share"], error), **columns}
    parts = [
        pd.DataFrame({"group": shares["group"], "quantity": name, "value": value, "se": se})
        for name, (value, se) in columns.items()
    ]
    return pd.concat(parts, ignore_index=True)


def contributions(ds: xr.Dataset, ax: Axes | None = None, *, step: Any = None) -> Axes:
    """What each group did to the loss over one step of training, with 2 standard errors.

    Where the gradients along the step were measured (``measure=("path",)``) their integral, which leaves nothing out
    and sums to the measured change; beside it the Taylor polynomial, whose bars do not hold what it leaves out. ``ds``
    and ``step`` as for `waterfall`.
    """
    try:
        found = autopsy(ds, step)
    except HoError as reason:
        if step is not None:
            raise
        return style.nothing(style.axes(ax, 8.5, 2.0), f"no autopsy: {reason.what}")
    ax = rows(did(found), ax, by="quantity")
    ax.axvline(0, color="0.7", lw=0.8, zorder=0)
    missing = "" if found.shares_by == PATH else "\nthe bars leave out what the polynomial leaves out"
    ax.set_xlabel(f"change of the loss by the group [loss], bars: 2 standard errors{missing}")
    ax.set_title(f"What each group did in the step from {found.step:g} to {found.to_step:g}", fontsize="medium")
    return legend(ax)


def changes(ds: xr.Dataset) -> pd.DataFrame:
    """``step, spans, quantity, value, se``: the measured change of the loss of each step, and the predictions."""
    told = predicted(ds)
    steps = np.atleast_1d(told["step"].values) if "step" in told.coords else np.array([0])
    columns = [("measured", told["measured"], told["measured_se"])]
    for order in told["order"].values:
        one = told.sel(order=order)
        columns.append((f"order {order}", one["predicted"], one["predicted_se"]))
    parts = [
        pd.DataFrame({"step": steps, "spans": np.atleast_1d(told["steps"].values), "quantity": name,
                      "value": np.atleast_1d(value.values), "se": np.atleast_1d(se.values)})
        for name, value, se in columns
    ]  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def prediction(ds: xr.Dataset, ax: Axes | None = None) -> Axes:
    """The measured change of the loss of each real step, with 2 standard errors, and its prediction by order.

    Single steps of training, or all where there are none, side by side: those that follow each other are joined, and
    what lies between is left out.
    """
    ax = style.axes(ax, 8.5, 3.8)
    if ds.attrs.get("direction") != NEXT and "change_along" not in ds:
        return style.nothing(ax, "no measured change: the direction is not to:next")
    try:
        frame = changes(ds)
    except HoError as reason:
        return style.nothing(ax, f"no prediction: {reason.what}")
    frame = frame[frame["spans"] == 1] if (frame["spans"] == 1).any() else frame
    if frame["value"].isna().all():
        return style.nothing(ax, "no prediction: nothing computed")
    measured = frame.loc[frame["quantity"] == "measured", "value"].to_numpy(float)
    style.signed_axis(ax, "y", frame["value"].to_numpy(float))
    at, ticks = _side_by_side(frame.loc[frame["quantity"] == "measured"])
    for k, (name, part) in enumerate(frame.groupby("quantity", sort=False)):
        x, y, se = at, *(part[c].to_numpy(float) for c in ("value", "se"))
        broken = np.flatnonzero(np.diff(x) > 1) + 1  # the line is not drawn across
        colour = "black" if name == "measured" else style.PALETTE[k - 1]
        ax.plot(np.insert(x, broken, np.nan), np.insert(y, broken, np.nan), color=colour, lw=1.2, marker="o", ms=3,
                ls="-" if name == "measured" else "--", label=str(name))  # fmt: skip
        if name == "measured":
            ax.errorbar(x, y, yerr=style.BAND * np.nan_to_num(se), fmt="none", ecolor=colour, elinewidth=1)
    low, high = np.nanmin(measured, initial=np.inf), np.nanmax(measured, initial=-np.inf)
    if ax.get_yscale() == "linear" and high > low:  # a prediction that explodes does not hide what was measured
        ax.set_ylim(low - (high - low), high + (high - low))
    ax.axhline(0, color="0.7", lw=0.8, zorder=0)
    _mark_break(ax, ds, frame.loc[frame["quantity"] == "measured", "step"].to_numpy(float), at)
    ax.set_xticks(list(ticks), labels=list(ticks.values()), fontsize="small")
    ax.set_xlabel("step (those that follow each other are joined)")
    ax.set_ylabel("change of the loss [loss]")
    ax.set_title("Was each step predicted? (bars: 2 standard errors)", fontsize="medium")
    ax.grid(color="0.93")
    ax.set_axisbelow(True)
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize="small", frameon=False)
    return ax


def _mark_break(ax: Axes, ds: xr.Dataset, steps: np.ndarray, at: np.ndarray) -> None:
    """A line in front of the first step of the climb: what is predicted before says nothing of what came after."""
    broke = break_of(ds) if "step" in ds.dims else None
    if broke is not None and float(broke.step) in steps:
        place = float(at[int(np.flatnonzero(steps == float(broke.step))[0])])
        ax.axvline(place - 0.5, color=UP, lw=1, ls=":", label=f"broke at step {broke.step:g}")


def _side_by_side(part: pd.DataFrame, most: int = 10) -> tuple[np.ndarray, dict[float, str]]:
    """A place for each step, two apart where steps are left out between, and at most ``most`` ticks: place -> label."""
    step, spans = (part[c].to_numpy(float) for c in ("step", "spans"))
    follows = np.append(False, step[1:] == step[:-1] + np.nan_to_num(spans[:-1], nan=-1))
    place = np.cumsum(np.where(follows, 1, 2)) - 2.0
    firsts = np.flatnonzero(~follows)
    shown = firsts if len(firsts) > 1 else np.arange(len(step))
    return place, {float(place[i]): f"{step[i]:g}" for i in shown[:: -(-len(shown) // most)]}
