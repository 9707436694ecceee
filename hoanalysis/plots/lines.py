"""Quantities over the steps of the run, with bands of 2 standard errors."""

from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from hoanalysis.analysis.contributions import TIMES
from hoanalysis.analysis.interactions import SHARES, pair_values, shares
from hoanalysis.analysis.triples import triple_values
from hoanalysis.plots import frames, style

PAIRS = 6


def loss(ds: xr.Dataset, ax: Axes | None = None, *, log: pd.DataFrame | None = None) -> Axes:
    """The loss at the checkpoints, with 2 standard errors, beside the losses of the training log."""
    ax = style.axes(ax, 7.5, 3.6)
    frame = frames.losses(ds)
    _line(ax, frame["step"], frame["value"], frame["se"], 0, "summaries")
    log = pd.DataFrame() if log is None else log
    columns = [c for c in log.columns if "loss" in str(c)]
    for k, column in enumerate(columns, 1):
        ax.plot(log["step"], log[column], color=style.PALETTE[k], lw=1, ls="--", label=style.text(f"log: {column}"))
    logged = log[columns].to_numpy(float).ravel() if columns else np.empty(0)
    style.signed_axis(ax, "y", np.concatenate([frame["value"].to_numpy(float), logged]))
    return _finish(ax, "loss [loss]", "Loss", frame)


def trajectories(ds: xr.Dataset, ax: Axes | None = None, *, top: int = PAIRS) -> Axes:
    """Loss, D1 of the groups where it is largest, and D2 of the strongest pairs, over the steps.

    Returns the axes of the first panel; all panels are in ``.figure.axes``.
    """
    panels = style.split(style.axes(ax, 8.5, 9.0), 3, 1)
    loss(ds, panels[0])
    slopes = frames.slopes(ds, top)
    _family(panels[1], slopes, "group")
    n = ds.sizes["group"]
    _finish(panels[1], "D1 [loss]", "First order" + (f", the {top} largest of {n} groups" if n > top else ""), slopes)
    pairs(ds, panels[2], top=top, quantity="value")
    return panels[0]


def pairs(ds: xr.Dataset, ax: Axes | None = None, *, top: int = PAIRS, quantity: str = "scale_free") -> Axes:
    """The strongest pairs of groups over the steps: ``"scale_free"`` entries or ``"value"`` (D2) of the same pairs."""
    ax = style.axes(ax, 8.5, 3.8)
    frame = pair_values(ds, top)
    if frame.empty:
        return style.nothing(ax, "there is no pair: one group, or nothing computed")
    names = [TIMES.join(style.text(g, 24) for g in row) for row in frame[["group", "group2"]].values.tolist()]
    frame = frame.assign(pair=names, value=frame[quantity], se=frame[f"{quantity}_se"])
    _family(ax, frame, "pair", linear=quantity == "scale_free")
    low, high = frame["value"].min(), frame["value"].max()
    if quantity == "scale_free" and high > low:  # a wide band does not flatten the lines
        ax.set_ylim(min(low, 0.0) - 0.3 * (high - low), max(high, 0.0) + 0.3 * (high - low))
    ax.axhline(0, color="0.7", lw=0.8, zorder=0)
    unit = "H-bar$_{st}$ / |H-bar$_{ss}$ H-bar$_{tt}$|$^{1/2}$ [no unit]" if quantity == "scale_free" else "D2 [loss]"
    return _finish(ax, unit, f"The {frame['pair'].nunique()} strongest pairs of groups", frame)


def triples(ds: xr.Dataset, ax: Axes | None = None, *, top: int = PAIRS, distinct: bool = True) -> Axes:
    """The strongest triples of groups over the steps: D3_stu / sqrt|H-bar_ss H-bar_tt H-bar_uu| in loss^(-1/2)."""
    ax = style.axes(ax, 9.5, 3.8)
    if "D3" not in ds:
        return style.nothing(ax, "no full D3: summarize with order=3")
    frame = triple_values(ds, top, distinct=distinct)
    if frame.empty:
        return style.nothing(ax, "there is no triple: fewer than three groups, or nothing computed")
    members = frame[["group", "group2", "group3"]].values.tolist()
    names = [TIMES.join(style.text(g, 18) for g in row) for row in members]
    frame = frame.assign(triple=names, value=frame["scale_free"], se=frame["scale_free_se"])
    _family(ax, frame, "triple")
    ax.axhline(0, color="0.7", lw=0.8, zorder=0)
    unit = "D3$_{stu}$ / |H-bar$_{ss}$ H-bar$_{tt}$ H-bar$_{uu}$|$^{1/2}$ [loss$^{-1/2}$]"
    return _finish(ax, unit, f"The {frame['triple'].nunique()} strongest triples of groups", frame)


def merging(ds: xr.Dataset, ax: Axes | None = None) -> Axes:
    """What one learning rate per merged group keeps of the gain of a step, against the number of groups.

    The line is the greedy merging of `suggest_partition`; crosses are the partitions by layer and by kind, with 2
    standard errors. In a series, the mean over its checkpoints.
    """
    ax = style.axes(ax, 7.0, 3.6)
    if not {"D1", "D2"} <= set(ds.data_vars) or not np.isfinite(ds["D1"].values).any():
        return style.nothing(ax, "no partition can be suggested: D1 and D2 are not computed")
    frame = frames.merging(ds)
    path = frame[frame["name"] == ""]
    ax.plot(path["groups"], path["kept"], color=style.PALETTE[0], marker="o", ms=3.5, lw=1.5, label="suggested")
    for k, (name, part) in enumerate(frame[frame["name"] != ""].groupby("name"), 1):
        bars = (style.BAND * part["se"].fillna(0)).to_numpy(float)
        ax.errorbar(
            part["groups"].to_numpy(float),
            part["kept"].to_numpy(float),
            yerr=bars,
            fmt="x",
            color=style.PALETTE[k],
            label=f"by {name}",
        )
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("number of groups")
    ax.set_ylabel("share of g-bar' H-bar$^{-1}$ g-bar kept [no unit]")
    ax.set_title("What coarser partitions keep of a step's gain", fontsize="medium")
    ax.grid(color="0.93")
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize="small", frameon=False)
    return ax


def interaction_shares(ds: xr.Dataset, ax: Axes | None = None) -> Axes:
    """How much of H-bar lies between groups (full lines) and between layers (dashes), over the steps.

    One colour for the scale-free shares and one for the raw ones. Where the two lines of a colour coincide, all that is
    off the diagonal lies between layers, and the rings of one stand around the dots of the other.
    """
    ax = style.axes(ax, 7.5, 3.6)
    found = shares(ds)
    steps = frames.losses(ds)["step"]
    for name in SHARES:
        scale, between = int("raw" in name), "block" in name
        words = f"{'between layers' if between else 'between groups'}, {'raw' if scale else 'scale-free'}"
        look: dict[str, Any] = {"ls": "--", "ms": 7.5, "mfc": "none", "lw": 1.0} if between else {"ms": 3.5}
        values, errors = (np.atleast_1d(found[n].values) for n in (name, f"{name}_se"))
        _line(ax, steps, values, errors, scale, words, **look)
    ax.set_ylim(0, 1)
    frame = pd.DataFrame({"step": steps, "value": np.atleast_1d(found["off_diagonal"].values)})
    return _finish(
        ax, "share of the sum of |entries| [no unit]", "Interactions between groups and between layers", frame
    )


def spectrum(
    ds: xr.Dataset,
    ax: Axes | None = None,
    *,
    used: frames.Used = None,
    momentum: frames.Used = None,
    momentum_se: float = 0.0,
    top: int = 8,
) -> Axes:
    """Eigenvalues of the Hessian compressed to the directions; beside them 2 (1 + momentum) / learning rate.

    The largest of them is a lower bound on the Hessian's. Above 2 / rate gradient descent is unstable, and with the
    momentum mu of a heavy ball above 2 (1 + mu) / rate; other optimizers have other limits. ``used`` is the rate and
    ``momentum`` mu: a number each, or the training log with the column ``learning_rate`` or ``momentum``.
    ``momentum_se``, the standard error of a mu that is itself an estimate, makes the line a band.
    """
    frame = frames.eigenvalues(ds)
    ax = style.axes(ax, 7.5, 3.8)
    if frame["value"].isna().all():
        return style.nothing(ax, "no spectrum: nothing computed")
    style.signed_axis(ax, "y", frame["value"].to_numpy(float))
    if _single(frame):
        _line(ax, frame["rank"], frame["value"], frame["se"], 0, "eigenvalues")
    else:
        ranks = sorted(frame["rank"].unique())
        kept = ranks if len(ranks) <= top else ranks[: top - 2] + ranks[-2:]
        _family(ax, frame[frame["rank"].isin(kept)].assign(name=frame["rank"].map(lambda r: f"eigenvalue {r}")), "name")
        _edge(ax, list(frame["step"].unique()), used, momentum, momentum_se)
    ax.axhline(0, color="0.7", lw=0.8, zorder=0)
    unit = "eigenvalue [loss/parameter$^2$]"
    ax = _finish(ax, unit, "Spectrum of the Hessian compressed to the directions", frame)
    if _single(frame):
        ax.set_xlabel("rank of the eigenvalue")
    return ax


def curvature(
    ds: xr.Dataset,
    ax: Axes | None = None,
    *,
    hessian: xr.Dataset | None = None,
    used: frames.Used = None,
    momentum: frames.Used = None,
    momentum_se: float = 0.0,
) -> Axes:
    """The largest and the lowest eigenvalue of the full Hessian beside the edge of stability, over the steps.

    ``hessian`` is what `hoanalysis.curvature(problem, checkpoint=run)` returned; without it what the Dataset holds
    (``curvature`` in the study). Where there is neither, the extremes along the groups, which lie within. ``used``,
    ``momentum`` and ``momentum_se`` as for `spectrum`.
    """
    ax = style.axes(ax, 7.5, 3.8)
    frame = frames.extremes(ds, hessian)
    if frame["value"].isna().all():
        return style.nothing(ax, "no curvature: nothing computed")
    steps = list(dict.fromkeys(frame["step"]))
    limits = frames.edge(steps, used, momentum)
    style.signed_axis(ax, "y", np.append(frame["value"].to_numpy(float), [] if limits is None else limits))
    full = frame["quantity"].str.contains("of the Hessian").any()
    for name, part in frame.groupby("quantity", sort=False):
        look: dict[str, Any] = {} if "of the Hessian" in str(name) else {"ls": ":", "ms": 2.5}
        _line(ax, part["step"], part["value"], part["se"], int("lowest" in str(name)), str(name), **look)
    _edge(ax, steps, used, momentum, momentum_se)
    ax.axhline(0, color="0.7", lw=0.8, zorder=0)
    title = "Curvature of the loss" + ("" if full else " along the groups")
    return _finish(ax, "eigenvalue [loss/parameter$^2$]", title, frame)


def _single(frame: pd.DataFrame) -> bool:
    return len(frame["step"].unique()) == 1


def _edge(ax: Axes, steps: list[Any], used: frames.Used, momentum: frames.Used, error: float) -> None:
    plain, limits = frames.edge(steps, used), frames.edge(steps, used, momentum)
    if plain is None or limits is None:
        return
    look: dict[str, Any] = {"color": style.USED, "lw": 1, "marker": "" if len(steps) > 1 else "_"}
    ax.plot(steps, plain, ls="--", label="2 / learning rate", **look)
    if momentum is not None:
        mu = (limits / plain - 1)[np.isfinite(plain)]
        told = f"{mu[0]:.2g}" if np.ptp(mu) < 1e-9 else "momentum"
        told += f" ± {error:.1g}" if error > 0 else ""
        ax.plot(steps, limits, ls="-.", label=f"2 (1 + {told}) / learning rate", **look)
        if error > 0:
            wide = style.BAND * error * plain  # plain = 2 / rate
            ax.fill_between(steps, limits - wide, limits + wide, color=style.USED, alpha=0.15, lw=0)


def taylor(
    ds: xr.Dataset,
    ax: Axes | None = None,
    *,
    step: Any = None,
    eta: xr.DataArray | None = None,
    regularization: frames.Step = None,
) -> Axes:
    """The predicted change of the loss along ``eta``, by order; by default minus the learning rates.

    ``regularization`` is theirs, as in `learning_rates`: ``"taylor"`` for the Taylor step.
    """
    frame = frames.along_step(ds, step, eta, regularization=regularization)
    ax = style.axes(ax, 7.5, 3.8)
    if frame["value"].isna().all():
        return style.nothing(ax, "no prediction: the learning rates of this checkpoint are not available")
    for k, (order, part) in enumerate(frame.groupby("order")):
        _line(ax, part["tau"], part["value"], part["se"], k, f"order {order}", marker="")
    ax.axhline(0, color="0.7", lw=0.8, zorder=0)
    ax.axvline(1, color="0.7", lw=0.8, zorder=0)
    low, high = frame.loc[frame["order"] > 1, "value"].min(), frame.loc[frame["order"] > 1, "value"].max()
    if np.isfinite(low) and high > low:
        ax.set_ylim(low - 0.3 * (high - low), high + 0.3 * (high - low))
    when = frames.step_of(frames.at_step(ds, step))
    place = "" if when is None else f", step {when}"
    how = {None: "the learning rates", "taylor": "the Taylor step"}.get(
        regularization, f"the learning rates ({regularization})"
    )
    move = how if eta is None else "the given move"
    ax = _finish(ax, "predicted change of the loss [loss]", f"Taylor prediction along {move}{place}", frame)
    ax.set_xlabel("multiple of the move [no unit]")
    return ax


def _family(ax: Axes, frame: pd.DataFrame, by: str, linear: bool = False) -> None:
    if not linear:
        style.signed_axis(ax, "y", frame["value"].to_numpy(float))
    groups = list(frame.groupby(by, sort=False))
    names = style.texts([name for name, _ in groups], 56)
    for k, (name, (_, part)) in enumerate(zip(names, groups, strict=True)):
        _line(ax, part["step"], part["value"], part["se"], k, name)


def _line(ax: Axes, x: Any, y: Any, se: Any, k: int, label: str, **look: Any) -> None:
    x, y, se = (np.asarray(v, dtype=float) for v in (x, y, se))
    colour, dash = style.PALETTE[k % len(style.PALETTE)], ["-", "--", ":"][k // len(style.PALETTE) % 3]
    ax.plot(x, y, label=label, **{"color": colour, "ls": dash, "lw": 1.5, "marker": "o", "ms": 3.5, **look})
    if len(x) == 1:
        ax.errorbar(x, y, yerr=style.BAND * np.nan_to_num(se), color=colour, lw=1.2)
    elif np.isfinite(se).any():
        ax.fill_between(x, y - style.BAND * se, y + style.BAND * se, color=colour, alpha=0.18, lw=0)


def _finish(ax: Axes, unit: str, title: str, frame: pd.DataFrame) -> Axes:
    ax.set_xlabel("step")
    ax.set_ylabel(unit)
    ax.set_title(f"{title} (bands: 2 standard errors)", fontsize="medium")
    ax.grid(color="0.93")
    ax.set_axisbelow(True)
    if "step" in frame and _single(frame) and "tau" not in frame:
        ax.set_xticks([float(frame["step"].iloc[0])], labels=[str(frame["step"].iloc[0])])
    elif "step" in frame:
        style.step_axis(ax, frame["step"].to_numpy(float))
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize="small", frameon=False)
    return ax
