"""What summaries along u = weights or to:init say: removing and re-initialising groups, flatness, Laplace."""

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from hoanalysis.analysis.laplace import laplace as posterior_of
from hoanalysis.analysis.reinitialization import INIT
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
    """The posterior standard deviation of each group's relative scale, beside that of a block-diagonal Laplace.

    What the two lines leave between them is the cross-layer part; the title says which share of the correlations lies
    between layers, and what layers know of each other.
    """
    if not _along_weights(ds):
        return style.nothing(style.axes(ax, 5.0, 3.0), NEEDED)
    frame = frames.posterior(ds, step, prior_precision)
    if frame["value"].isna().all():
        return style.nothing(
            style.axes(ax, 5.0, 3.0), "no Laplace approximation: not at a minimum, or nothing computed"
        )
    ax = rows(frame, ax, by="quantity")
    ax.set_xlabel("posterior standard deviation of the relative scale [no unit], bars: 2 standard errors")
    found = posterior_of(frames.at_step(ds, step), prior_precision)
    share, nats = (_told(found, name) for name in ("cross_layer", "information"))
    title = f"Laplace approximation of the scales{_when(ds, step)}"
    ax.set_title(f"{title}\n{share} of the correlations between layers; {nats} nats shared", fontsize="medium")
    return legend(ax)


def _told(found: xr.Dataset, name: str) -> str:
    value, error = found[name].item(), found[f"{name}_se"].item()
    return f"{value:.2g}" + (f" ± {error:.1g}" if np.isfinite(error) else "")


def reinitialization(ds: xr.Dataset, ax: Axes | None = None, *, step: Any = None) -> Axes:
    """How the loss changes when each group alone goes back to its initial value: Taylor by order, and measured.

    Along ``to:init``; measured where the Dataset holds that (summarize with ``measure=("removed",)``). As in "Are all
    layers created equal?" (Zhang, Bengio and Singer).
    """
    if ds.attrs.get("direction") != INIT or "D1" not in ds:
        return style.nothing(style.axes(ax, 5.0, 3.0), "this needs summaries along the direction 'to:init'")
    ax = rows(frames.put_back(ds, step), ax, by="quantity")
    ax.axvline(0, color="0.7", lw=0.8, zorder=0)
    ax.set_xlabel("change of the loss [loss], bars: 2 standard errors")
    ax.set_title(f"Re-initialising groups{_when(ds, step)}")
    return legend(ax)


def _along_weights(ds: xr.Dataset) -> bool:
    return ds.attrs.get("direction") == "weights" and {"D1", "D2"} <= set(ds.data_vars)


def _when(ds: xr.Dataset, step: Any) -> str:
    when = frames.step_of(frames.at_step(ds, step))
    return "" if when is None else f", step {when}"
