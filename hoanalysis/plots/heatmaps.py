"""Heatmaps over pairs of groups, in the paper's legend: white near zero, dark red positive, dark blue negative."""

from typing import Any

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize

from hoanalysis import schema
from hoanalysis.analysis.arrays import Array, error_of
from hoanalysis.analysis.inverse import Which
from hoanalysis.analysis.inverse import blocks as blocks_of
from hoanalysis.analysis.regularized import Regularization
from hoanalysis.plots import frames, style

LABELS = 48  # more tick labels than this are not readable; every k-th is shown, and the axis says so
TITLES = {"H": "Pseudo-Hessian", "inverse": "Inverse of the pseudo-Hessian", "scale_free": "Scale-free pseudo-Hessian"}


def matrix(
    ds: xr.Dataset,
    ax: Axes | None = None,
    *,
    which: Which = "H",
    step: Any = None,
    scale: str | None = None,
    regularization: Regularization = None,
    epsilon: float = 1.0,
    limit: float | None = None,
) -> Axes:
    """H-bar (``"H"``), its inverse (``"inverse"``) or A_st / sqrt|A_ss A_tt| (``"scale_free"``) at one checkpoint.

    ``scale`` is ``"linear"`` or ``"log"`` (signed, four decades); by default log where a linear scale would be white.
    ``limit`` fixes the end of the colours, so that figures compare. Dots mark entries within 2 standard errors of 0,
    grey cells groups without effect; along the gradient the words beside the colours say which errors these are:
    unconditional where they are stored, and otherwise with u held fixed, which are too small. ``step`` is a step,
    ``"first"`` or ``"last"`` (the default).
    """
    array = frames.matrix_at(ds, which, step, regularization, epsilon)
    title = f"{TITLES[which]}{_regularized(regularization, epsilon)}, {_when(array)}"
    return signed(array, ax, title, scale=scale, limit=limit, note=frames.errors_told(ds))


def third(
    ds: xr.Dataset,
    ax: Axes | None = None,
    *,
    group: str | None = None,
    step: Any = None,
    scale_free: bool = True,
    scale: str | None = None,
    limit: float | None = None,
) -> Axes:
    """The slice D3[:, :, group] at one checkpoint: how moving ``group`` changes each entry of the pseudo-Hessian.

    By default the group whose scale-free slice has the largest sum of sizes. ``scale_free`` shows D3_stu /
    sqrt|H-bar_ss H-bar_tt H-bar_uu| in loss^(-1/2), and otherwise D3 in loss. Dots mark entries within 2 standard
    errors of 0.
    """
    array = frames.third_at(ds, group, step, scale_free)
    if array is None:
        return style.nothing(style.axes(ax, 5.0, 3.0), "no full D3: summarize with order=3")
    name = style.text(array.attrs["slice"], 30)
    title = f"{'Scale-free ' if scale_free else ''}D3, slice of {name}, {_when(array)}"
    return signed(array, ax, title, scale=scale, limit=limit, note=frames.errors_told(ds))


def change(
    ds: xr.Dataset,
    ax: Axes | None = None,
    *,
    other: xr.Dataset | None = None,
    step: Any = None,
    quantity: str = "scale_free",
    scale: str | None = None,
) -> Axes:
    """What changes in a matrix from this Dataset to ``other``, b - a as `compare` has it.

    ``quantity`` is ``"scale_free"`` or ``"D2"``. Without ``other``, from the first to the last checkpoint of a series;
    with it, at the last of each; ``step`` chooses others, as in `compare`. Dots mark differences within 2 standard
    errors of 0.
    """
    array, title = frames.changed(ds, other, step, quantity)
    if array is None:
        return style.nothing(style.axes(ax, 5.0, 3.0), title)
    return signed(array, ax, title, scale=scale, note=frames.errors_told(ds))


def signed(
    array: xr.DataArray,
    ax: Axes | None,
    title: str,
    *,
    scale: str | None = None,
    limit: float | None = None,
    note: str = "",
) -> Axes:
    """A matrix with its errors, in the paper's colours: dots mark entries within 2 standard errors of 0.

    ``note`` says of which kind the errors are, where there are two.
    """
    values = np.asarray(array.values, dtype=float)
    shown = np.append(values, limit) if limit else values
    norm = style.signed_norm(shown, scale or style.auto_scale(values))
    ax = style.axes(ax, *_size(array))
    if not np.isfinite(values).any():
        return style.nothing(ax, f"{array.attrs['long_name']}: nothing computed at {_when(array)}")
    _cells(ax, array, norm, style.SIGNED)
    _dots(ax, values, np.asarray(error_of(array).values, dtype=float))
    _colorbar(ax, array, norm, note)
    ax.set_title(title, fontsize="medium")
    return ax


def blocks(
    ds: xr.Dataset,
    ax: Axes | None = None,
    *,
    which: Which = "H",
    step: Any = None,
    scale: str | None = None,
    regularization: Regularization = None,
    epsilon: float = 1.0,
) -> Axes:
    """The blocks by kind side by side, WW, BB, WB first, with common limits; for the inverse, blocks of the inverse.

    Returns the axes of the first panel; all panels are in ``.figure.axes``.
    """
    found = blocks_of(frames.at_step(ds, step), which, regularization, epsilon)
    values = np.concatenate([np.ravel(a.values) for a in found.values()])
    if not np.isfinite(values).any():
        first = next(iter(found.values()))
        message = f"{first.attrs['long_name']}: nothing computed at {_when(first)}"
        return style.nothing(style.axes(ax, 5.0, 3.0), message)
    norm = style.signed_norm(values, scale or style.auto_scale(values))
    columns = min(len(found), 3)
    rows = -(-len(found) // columns)
    width, height = _size(*found.values())
    panels = style.split(style.axes(ax, (width - 1.2) * columns + 1.2, height * rows + 0.4), rows, columns)
    for panel, (name, array) in zip(panels, found.items(), strict=False):
        _cells(panel, array, norm, style.SIGNED)
        _dots(panel, np.asarray(array.values, float), np.asarray(error_of(array).values, float))
        panel.set_title(f"{name} ({style.text(array.attrs.get('block', 'all groups'))})", fontsize="medium")
    for panel in panels[len(found) :]:
        panel.set_axis_off()
    _colorbar(panels[len(found) - 1], next(iter(found.values())), norm, frames.errors_told(ds))
    figure = panels[0].figure
    if ax is None:
        when = _when(next(iter(found.values())))
        figure.suptitle(f"{TITLES[which]}{_regularized(regularization, epsilon)}, blocks by kind, {when}")
    return panels[0]


def errors(ds: xr.Dataset, ax: Axes | None = None, *, step: Any = None) -> Axes:
    """How well each entry of H-bar is known: its standard error relative to its size; crosses: not told from 0.

    An entry is told from 0 where |D2_st| is more than 2 standard errors. Along the gradient the words beside the
    colours say which errors those are: unconditional where they are stored, and otherwise with u held fixed.
    """
    array = frames.relative_errors(ds, step)
    values = np.asarray(array.values, dtype=float)
    ax = style.axes(ax, *_size(array))
    if not np.isfinite(values).any():
        return style.nothing(ax, f"no standard errors at {_when(array)}")
    norm = LogNorm(1e-3, 10.0, clip=True)
    _cells(ax, array.copy(data=np.maximum(values, 1e-3)), norm, style.SIZE)
    _marks(ax, values > 1 / style.BAND, "x")
    bar = ax.figure.colorbar(ax.collections[0], ax=ax, shrink=0.8, extend="both")
    note = frames.errors_told(ds)
    words = ["standard error / |entry|", "crosses: within 2 standard errors of 0", *([f"({note})"] if note else [])]
    bar.set_label("\n".join(words), fontsize="small")
    ax.set_title(f"Relative standard errors of the pseudo-Hessian, {_when(array)}", fontsize="medium")
    return ax


def _size(*arrays: xr.DataArray) -> tuple[float, float]:
    """Inches for one panel: cells, the longest label on both sides, the colour bar and its words."""
    n = max(max(array.shape) for array in arrays)
    names = [style.text(g) for array in arrays for dim in array.dims for g in array[dim].values]
    cells, label = min(max(0.34 * n, 2.8), 11.0), 0.075 * max(map(len, names), default=0)
    return cells + label + 1.8, cells + label + 0.6


def _when(array: xr.DataArray) -> str:
    step = frames.step_of(array.to_dataset(name="x"))
    return "this checkpoint" if step is None else f"step {step}"


def _regularized(regularization: Regularization, epsilon: float) -> str:
    return "" if regularization is None else f" + {regularization} ({epsilon:g})"


def _cells(ax: Axes, array: xr.DataArray, norm: Normalize, colours: str) -> None:
    values = np.ma.masked_invalid(np.asarray(array.values, dtype=float))
    cmap = matplotlib.colormaps[colours].with_extremes(bad=style.MISSING)
    ax.pcolormesh(values, norm=norm, cmap=cmap, edgecolors="white" if values.size < 2500 else "none", linewidth=0.5)
    ax.set_aspect("equal")
    ax.invert_yaxis()
    for axis, dim, turn in ((ax.xaxis, schema.group_dim(1), 90), (ax.yaxis, schema.GROUP, 0)):
        _label(ax, axis, array[dim].values, turn)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)


def _label(ax: Axes, axis: Any, labels: Array, turn: int) -> None:
    stride = -(-len(labels) // LABELS)
    axis.set_ticks(
        np.arange(0, len(labels), stride) + 0.5, labels=style.texts(labels)[::stride], rotation=turn, fontsize="small"
    )
    if stride > 1:
        axis.set_label_text(f"{len(labels)} groups, one in {stride} named")


def _dots(ax: Axes, values: Array, error: Array) -> None:
    _marks(ax, np.abs(values) < style.BAND * error, ".")


def _marks(ax: Axes, where: Array, marker: str) -> None:
    rows, columns = np.nonzero(where)
    if len(rows):
        ax.scatter(columns + 0.5, rows + 0.5, s=18, marker=marker, color="0.1", linewidth=0.8)


def _colorbar(ax: Axes, array: xr.DataArray, norm: Normalize, note: str = "") -> None:
    bar = ax.figure.colorbar(ax.collections[0], ax=ax, shrink=0.8, ticks=style.signed_ticks(norm))
    ticks = style.signed_ticks(norm)
    if ticks is not None:
        bar.set_ticks(ticks, labels=[_power(t) for t in ticks])
        bar.ax.minorticks_off()
    units = style.unit(array.attrs["units"])
    words = [f"{array.attrs['long_name']} [{units}]" + (", signed log scale" if ticks else "")]
    words += ["dots: within 2 standard errors of 0", *([f"({note})"] if note else [])]
    bar.set_label("\n".join(words), fontsize="small")


def _power(value: float) -> str:
    if value == 0:
        return "0"
    return f"${'-' if value < 0 else ''}10^{{{round(np.log10(abs(value)))}}}$"
