"""What summaries along u = weights say: removing groups, flatness, and the Laplace posterior of their scales."""

from typing import Any

import xarray as xr
from matplotlib.axes import Axes

from hoanalysis.plots import frames, style
from hoanalysis.plots.dots import legend, rows

NEEDED = "this needs summaries along the direction 'weights'"


def saliency(ds: xr.Dataset, ax: Axes | None = None, *, step: Any = None) -> Axes:
    """How the loss changes when each group is removed: to second order, alone and with the others rescaled, and
    measured, where the Dataset holds that (summarize with ``measure=("removed",)``)."""
    if not _along_weights(ds):
        return style.nothing(style.axes(ax, 5.0, 3.0), NEEDED)
    frame = frames.removal(ds, step)
    ax = rows(frame, ax, by="quantity")
    ax.axvline(0, color="0.7", lw=0.8, zorder=0)
    ax.set_xlabel("change of the loss [loss], bars: 2 standard errors")
    ax.set_title(f"Removing groups{_when(ds, step)}")
    return legend(ax)


def flatness(ds: xr.Dataset, ax: Axes | None = None) -> Axes:
    """The curvature of the loss along the scale of each group, at the first and last checkpoint."""
    if not _along_weights(ds):
        return style.nothing(style.axes(ax, 5.0, 3.0), NEEDED)
    ax = rows(frames.sharpness(ds), ax)
    ax.axvline(0, color="0.7", lw=0.8, zorder=0)
    ax.set_xlabel("curvature along the scale of the group [loss], bars: 2 standard errors")
    ax.set_title("Sharpness for relative changes of groups")
    return legend(ax)


def laplace(ds: xr.Dataset, ax: Axes | None = None, *, step: Any = None, prior_precision: float = 1.0) -> Axes:
    """The posterior standard deviation of each group's relative scale, beside that of a block-diagonal Laplace."""
    if not _along_weights(ds):
        return style.nothing(style.axes(ax, 5.0, 3.0), NEEDED)
    frame = frames.posterior(ds, step, prior_precision)
    if frame["value"].isna().all():
        return style.nothing(
            style.axes(ax, 5.0, 3.0), "no Laplace approximation: not at a minimum, or nothing computed"
        )
    ax = rows(frame, ax, by="quantity")
    ax.set_xlabel("posterior standard deviation of the relative scale [no unit], bars: 2 standard errors")
    ax.set_title(f"Laplace approximation of the scales{_when(ds, step)}")
    return legend(ax)


def _along_weights(ds: xr.Dataset) -> bool:
    return ds.attrs.get("direction") == "weights" and {"D1", "D2"} <= set(ds.data_vars)


def _when(ds: xr.Dataset, step: Any) -> str:
    when = frames.step_of(frames.at_step(ds, step))
    return "" if when is None else f", step {when}"
