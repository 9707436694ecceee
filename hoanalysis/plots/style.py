"""What all figures share: new axes, labels that cannot break, the paper's colours, scales for signed numbers."""

import functools
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import NullLocator, SymmetricalLogLocator

from hoanalysis.analysis.arrays import Array
from hoanalysis.errors import ArgumentError

#: The paper's legend: white near zero, dark red large positive, dark blue large negative; grey: not available.
SIGNED, SIZE, MISSING = "RdBu_r", "YlOrBr", "0.85"
#: Colour-blind safe (Okabe and Ito); black last.
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#000000"]
USED = "0.35"
BAND = 2.0  # standard errors on each side, in bars and bands
DECADES = 4
UNEVEN = 5.0  # the ratio of gaps between checkpoints from which a true axis would squeeze the small ones


def axes(ax: Axes | None, width: float, height: float) -> Axes:
    """``ax``, or the axes of a new figure of this size in inches.

    In an interactive session (Jupyter) pyplot owns the figure, shows it and closes it; elsewhere nothing is registered
    anywhere, and the figure goes away with its last reference.
    """
    if ax is not None:
        return ax
    if _interactive():
        from matplotlib import pyplot

        return pyplot.figure(figsize=(width, height), layout="constrained").add_subplot()
    return Figure(figsize=(width, height), layout="constrained").add_subplot()


def _interactive() -> bool:
    """A session whose pyplot shows figures by itself; a notebook's kernel says so only once pyplot is loaded."""
    in_kernel = "ipykernel" in sys.modules and "inline" in str(matplotlib.get_backend())
    return in_kernel or matplotlib.is_interactive()


def split(ax: Axes, rows: int, columns: int, **ratios: Any) -> list[Axes]:
    """Panels in the place of ``ax``, which is removed; fill a row before the next."""
    spec = ax.get_subplotspec()
    if spec is None:
        raise ArgumentError("this figure has several panels and needs axes of a grid", do="use ax from plt.subplots()")
    figure = ax.figure
    ax.remove()
    grid = spec.subgridspec(rows, columns, **ratios)
    return [figure.add_subplot(grid[i, j]) for i in range(rows) for j in range(columns)]


def text(label: object, width: int = 44) -> str:
    """A label as plain text: no math mode, control characters or missing glyphs; the middle left out if too long."""
    shown = "".join(c if _drawable(c) else "\N{WHITE SQUARE}" for c in str(label)) or "(no name)"
    if len(shown) > width:
        shown = shown[: width // 2 - 1] + "\N{HORIZONTAL ELLIPSIS}" + shown[-(width - width // 2) :]
    return (" " if shown.startswith("_") else "") + shown.replace("$", r"\$")


def texts(labels: Any, width: int = 44) -> list[str]:
    """`text` of each label; those that became equal get their position."""
    shown = [text(label, width) for label in labels]
    return [f"{s} [{i}]" if shown.count(s) > 1 else s for i, s in enumerate(shown)]


def unit(units: str) -> str:
    """The ``units`` attribute as words.

    >>> unit("1")
    'no unit'
    """
    return {"1": "no unit"}.get(units, units)


@functools.cache
def _glyphs() -> frozenset[int]:
    return frozenset(get_font(findfont(FontProperties())).get_charmap())


def _drawable(character: str) -> bool:
    return character.isprintable() and ord(character) in _glyphs()


def signed_norm(values: Array, scale: str) -> Normalize:
    """Limits symmetric about 0: ``"linear"``, or ``"log"`` over four decades on each side and linear within."""
    top = np.nanmax(np.abs(values), initial=0.0)
    top = float(top) if np.isfinite(top) and top > 0 else 1.0
    if scale == "linear":
        return Normalize(-top, top)
    if scale != "log":
        raise ArgumentError(f"unknown scale {scale!r}", do="use 'linear' or 'log'")
    return SymLogNorm(top * 10.0**-DECADES, linscale=0.5, vmin=-top, vmax=top, base=10)


def auto_scale(values: Array) -> str:
    """``"log"`` where the largest entry is more than 30 times the median one: a linear scale would be white."""
    size = np.abs(values[np.isfinite(values) & (values != 0)])
    return "log" if size.size and size.max() > 30 * np.median(size) else "linear"


def signed_ticks(norm: Normalize) -> list[float] | None:
    """Powers of ten on both sides and 0 for a signed log scale; None (matplotlib's own) for a linear one."""
    if not isinstance(norm, SymLogNorm) or norm.vmax is None:
        return None
    top = int(np.floor(np.log10(norm.vmax)))
    powers = [10.0**p for p in range(top, top - DECADES, -1)]
    return [-p for p in powers] + [0.0] + powers[::-1]


def signed_axis(ax: Axes, which: str, values: Array) -> None:
    """A symlog axis that keeps its tick labels apart; log where all values are positive; linear within one decade."""
    finite = np.abs(values[np.isfinite(values) & (values != 0)])
    if not finite.size or finite.max() < 20 * finite.min():
        return
    setter, axis = (ax.set_xscale, ax.xaxis) if which == "x" else (ax.set_yscale, ax.yaxis)
    if (values[np.isfinite(values)] > 0).all():
        setter("log")
        limits = ax.set_xlim if which == "x" else ax.set_ylim
        limits(finite.min() / 3, finite.max() * 3)  # a band that reaches 0 would otherwise open the axis without end
        return
    threshold = 10.0 ** np.floor(np.log10(max(finite.min(), finite.max() * 10.0**-DECADES)))
    setter("symlog", linthresh=threshold)
    decades = np.log10(finite.max() / threshold) * (2 if (values < 0).any() else 1)
    axis.set_major_locator(_Sparse(threshold, stride=int(np.ceil((decades + 1) / 5))))
    axis.set_minor_locator(NullLocator())


class _Sparse(SymmetricalLogLocator):
    """Zero and every ``stride``-th power of ten outwards from it: matplotlib's own labels overlap near zero."""

    def __init__(self, threshold: float, stride: int) -> None:
        super().__init__(base=10, linthresh=threshold)
        self._threshold, self._stride = threshold, stride

    def tick_values(self, vmin: float, vmax: float) -> list[float]:
        outer = max(abs(vmin), abs(vmax), self._threshold)
        count = int(np.ceil(np.log10(outer / self._threshold))) + 1
        powers = self._threshold * 10.0 ** np.arange(1 if self._stride > 1 else 0, count, self._stride)
        return [*(-powers[::-1]), 0.0, *powers]


def step_axis(ax: Axes, steps: Array, most: int = 10) -> None:
    """The x axis over checkpoints: where their gaps differ much, checkpoints stand side by side, evenly spaced.

    Single steps around a break, between checkpoints of whole epochs, would be a vertical line otherwise. Data stay in
    steps: what lies between two checkpoints (of the log, say) is drawn in proportion.
    """
    knots = np.unique(np.asarray(steps, dtype=float))
    gaps = np.diff(knots)
    if len(knots) < 4 or gaps.max() <= UNEVEN * gaps.min():
        return
    place = np.arange(len(knots), dtype=float)
    ax.set_xscale("function", functions=(_through(knots, place), _through(place, knots)))
    shown = knots[:: -(-len(knots) // most)]
    ax.set_xticks(shown, labels=[f"{step:g}" for step in shown], minor=False)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("step (checkpoints evenly spaced)")


def _through(x: Array, y: Array) -> Callable[[Any], Array]:
    """The piecewise linear function through these points, continued beyond them."""

    def function(values: Any) -> Array:
        v = np.asarray(values, dtype=float)
        inside = np.interp(v, x, y)
        below, above = (y[1] - y[0]) / (x[1] - x[0]), (y[-1] - y[-2]) / (x[-1] - x[-2])
        return inside + np.minimum(v - x[0], 0.0) * below + np.maximum(v - x[-1], 0.0) * above

    return function


def nothing(ax: Axes, message: str) -> Axes:
    """Say in the axes why there is nothing to see."""
    lines = "\n".join(textwrap.wrap(message, 52))
    ax.text(0.5, 0.5, lines, ha="center", va="center", transform=ax.transAxes, color="0.3")
    ax.set_xticks([])
    ax.set_yticks([])
    return ax
