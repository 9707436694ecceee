"""The pictures of a view. Everything is placed by hand from the lengths of the labels: a constrained layout would cost
more than all the rest, and a slider is waited for.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnchoredText
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hoanalysis.analysis.arrays import Array
from hoanalysis.errors import HoError
from hoanalysis.explorer.canvas import Canvas, Names
from hoanalysis.explorer.session import TAUS, Session, View, told
from hoanalysis.explorer.state import State
from hoanalysis.explorer.words import nothing, sentence
from hoanalysis.plots import style
from hoanalysis.plots.heatmaps import LABELS

BLANK = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGNgYGBgAAAABQABpfZFQAAAAABJRU5ErkJggg=="
)  # a PNG of one pixel
DPI = 100
CELLS = 200  # more rows than this are drawn as blocks, each by its largest entry
MATRIX, SIDE = (6.6, 5.9), (5.6, 5.0)  # inches
LETTER, LINE = 0.068, 0.17  # inches of a letter and of a line of small type
ROWS = 40  # of learning rates
NAME = 28  # letters of a group's name


@dataclass(frozen=True)
class Place:
    """A rectangle in inches within a figure.

    ``live``: of a picture that a slider draws again, in which names of groups are texts instead of labels of ticks.
    """

    figure: Figure
    left: float
    bottom: float
    width: float
    height: float
    live: bool = False

    def axes(self, left: float, bottom: float, right: float, top: float) -> Axes:
        """New axes with these margins."""
        w, h = (float(x) for x in self.figure.get_size_inches())
        box = (self.left + left, self.bottom + bottom, self.width - left - right, self.height - bottom - top)
        return self.figure.add_axes((box[0] / w, box[1] / h, max(box[2], 0.3) / w, max(box[3], 0.3) / h))


def panel(session: Session, state: State, name: str, **texts: str) -> bytes:
    """One panel by itself as PNG: ``"matrix"`` or one of `PANELS`; ``texts`` are stored in it."""
    width, height = MATRIX if name == "matrix" else SIDE
    figure = _empty(width, height)
    _draw(session, state, name, Place(figure, 0, 0, width, height, live=True))
    return png(figure, **texts)


def _empty(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=DPI)
    Canvas(figure)
    return figure


def whole(session: Session, state: State) -> Figure:
    """All panels and the sentence."""
    caption = _wrapped(sentence(session.view(state)), 165)
    head, low = max(0.7, 0.35 + LINE * (1 + caption.count("\n"))), 3.6
    width, height = MATRIX[0] + SIDE[0], head + MATRIX[1] + low
    figure = _empty(width, height)
    figure.text(0.01, 1 - 0.12 / height, caption, va="top", fontsize="medium")
    _draw(session, state, "matrix", Place(figure, 0, low, *MATRIX))
    _draw(session, state, "rates", Place(figure, MATRIX[0], low + MATRIX[1] - SIDE[1], *SIDE))
    _draw(session, state, "trajectories", Place(figure, 0, 0, MATRIX[0], low))
    _draw(session, state, "taylor", Place(figure, MATRIX[0], 0, SIDE[0], low))
    return figure


def png(figure: Figure, **texts: str) -> bytes:
    """The figure as PNG; a picture knows what it shows: ``texts``, and where its cells are."""
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    info = PngInfo()
    for key, text in {**texts, "Cells": cells_of(figure)}.items():
        info.add_itxt(key, text)
    out = io.BytesIO()
    Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).save(out, "png", compress_level=1, pnginfo=info)
    return out.getvalue()


def cells_of(figure: Figure) -> str:
    """Where the cells of the matrix are, in pixels: ``left top right bottom rows columns``; empty without one."""
    for ax in figure.axes:
        if ax.images:
            rows, columns = ax.images[0].get_size()
            box = ax.get_window_extent()
            height = figure.bbox.height
            return f"{box.x0:.2f} {height - box.y1:.2f} {box.x1:.2f} {height - box.y0:.2f} {rows} {columns}"
    return ""


def _draw(session: Session, state: State, name: str, place: Place) -> None:
    view = session.view(state)
    if view.shown is None:
        _say(place, " ".join(view.notes) or "There is nothing to show.")
        return
    try:
        _PANELS[name](session, view, place)
    except HoError as error:  # of this panel alone, such as r without a third order
        _say(place, told(error))


# ---- the matrix ------------------------------------------------------------------------------------------------------


def matrix(session: Session, view: View, place: Place) -> None:
    """White near zero, red positive, blue negative; dots within two standard errors of 0, grey cells missing."""
    shown = view.shown
    assert shown is not None
    title = f"{shown.title[0].upper()}{shown.title[1:]}"
    title += f"\nstep {view.step}" + (f" minus {view.reference}" if view.reference else "")
    if not np.isfinite(shown.values).any():
        _say(place, f"{title}\n\n{nothing(view)}")
        return
    if shown.values.ndim == 1:
        names = {"": replace(shown, title=title)}
        _dots(place, list(names.items()), f"{shown.title} [{style.unit(shown.units)}]", title)
        return
    values, errors, rows, columns, stride = _decimated(shown.values, shown.errors, shown.rows, shown.columns)
    scale = style.auto_scale(values) if view.state.scale == "auto" else view.state.scale
    norm = style.signed_norm(np.append(values, view.limit or 0.0), scale)
    ax = _square(place, rows, columns)
    colours = matplotlib.colormaps[style.SIGNED].with_extremes(bad=style.MISSING)
    ax.imshow(np.ma.masked_invalid(values), norm=norm, cmap=colours, interpolation="nearest", aspect="auto")
    _mark(ax, np.abs(values) < style.BAND * errors, ".", len(rows))
    if view.state.entries:
        _mark_selected(ax, view, rows, columns)
    _name(place, ax, rows, columns)
    if stride > 1:
        ax.set_xlabel(f"each cell is the largest of {stride} × {stride} entries", fontsize="small", labelpad=70)
    _bar(place, ax, norm, f"[{style.unit(shown.units)}], dots: within 2 standard errors of 0")
    ax.set_title(title, fontsize="medium", y=1.0)


def _decimated(
    values: Array, errors: Array, rows: Sequence[str], columns: Sequence[str]
) -> tuple[Array, Array, Sequence[str], Sequence[str], int]:
    """At most `CELLS` rows: of each square of k x k entries the largest in size, with its own error."""
    k = -(-max(values.shape) // CELLS)
    if k == 1:
        return values, errors, rows, columns, 1
    padded = [np.pad(x, [(0, -n % k) for n in x.shape], constant_values=np.nan) for x in (values, errors)]
    shape = (padded[0].shape[0] // k, padded[0].shape[1] // k)
    tiles = [x.reshape(shape[0], k, shape[1], k).transpose(0, 2, 1, 3).reshape(*shape, k * k) for x in padded]
    at = np.nan_to_num(np.abs(tiles[0]), nan=-1.0).argmax(-1)[..., None]
    value, error = (np.take_along_axis(x, at, -1)[..., 0] for x in tiles)
    return value, error, rows[::k], columns[::k], k


def _square(place: Place, rows: Sequence[str], columns: Sequence[str]) -> Axes:
    """Axes with square cells, between the labels of both sides and the colour bar."""
    left = 0.15 + LETTER * max(map(len, _texts(tuple(rows))))
    below = 0.15 + LETTER * max(map(len, _texts(tuple(columns))))
    room = (place.width - left - 1.05, place.height - below - 0.6)
    cell = min(room[0] / len(columns), room[1] / len(rows))
    width, height = cell * len(columns), cell * len(rows)
    return place.axes(left, place.height - 0.6 - height, place.width - left - width, 0.6)


def _name(
    place: Place, ax: Axes, rows: Sequence[str], columns: Sequence[str] = (), size: float | str = "small"
) -> None:
    """The names of groups on the left and below, every k-th where there are too many."""
    ax.tick_params(length=0)
    ax.set_frame_on(bool(not columns))
    every = -(-max(len(rows), len(columns)) // LABELS)
    if not place.live:
        _tick(ax, rows, columns, size, every)
        return
    ax.set_yticks([])
    if columns:
        ax.set_xticks([])
    left, below = (dict(list(enumerate(_texts(tuple(names))))[::every]) for names in (rows, columns))
    ax.add_artist(Names(left, below, size))


def _tick(ax: Axes, rows: Sequence[str], columns: Sequence[str], size: float | str, every: int) -> None:
    for axis, names, turn in ((ax.xaxis, columns, 90), (ax.yaxis, rows, 0)):
        if names:
            shown = _texts(tuple(names))[::every]
            axis.set_ticks(range(0, len(names), every), labels=shown, rotation=turn, fontsize=size)


@lru_cache(maxsize=64)
def _texts(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names of groups as they are drawn."""
    return tuple(style.texts(names, NAME))


def _mark(ax: Axes, where: Array, marker: str, n: int) -> None:
    rows, columns = np.nonzero(where)
    if len(rows):
        size = min(18.0, 1500.0 / max(n, 1) ** 1.5)
        ax.scatter(columns, rows, s=size, marker=marker, color="0.1", linewidth=0)


def _mark_selected(ax: Axes, view: View, rows: Sequence[str], columns: Sequence[str]) -> None:
    for entry in view.state.entries:
        for r, c in {(entry[0], entry[1]), (entry[1], entry[0])}:
            if r in rows and c in columns:
                x, y = columns.index(c) - 0.5, rows.index(r) - 0.5
                ax.add_patch(matplotlib.patches.Rectangle((x, y), 1, 1, fill=False, ec="black", lw=1.6))


def _bar(place: Place, ax: Axes, norm: Normalize, label: str) -> None:
    w, h = (float(x) for x in place.figure.get_size_inches())
    box = ax.get_position()
    size = min(box.height * h, 4.2)
    bottom = box.y0 + (box.height - size / h) / 2
    cax = place.figure.add_axes((box.x1 + 0.12 / w, bottom, 0.16 / w, size / h))
    ticks = style.signed_ticks(norm)
    bar = place.figure.colorbar(ax.images[0], cax=cax, ticks=ticks)
    if ticks is not None:
        bar.set_ticks(ticks, labels=[_power(t) for t in ticks])
        bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize="x-small")
    bar.set_label(label, fontsize="x-small")


def _power(value: float) -> str:
    """Plain text: math text is slow."""
    return "0" if value == 0 else f"{'-' if value < 0 else ''}1e{round(np.log10(abs(value)))}"


# ---- the panels beside it --------------------------------------------------------------------------------------------


def rates(session: Session, view: View, place: Place) -> None:
    """The learning rate of each group with two standard errors, of both checkpoints where two are compared."""
    state = view.state
    how = "no regularization" if state.regularization is None else f"{state.regularization} ({state.epsilon:g})"
    series, title = session.rates(state), f"Learning rates, {how}"
    if not any(np.isfinite(part.values).any() for _, part in series):
        _say(place, f"{title}\n\n{nothing(view)}")
        return
    _dots(place, series, "learning rate [no unit], bars: 2 standard errors", title)


def trajectories(session: Session, view: View, place: Place) -> None:
    """The selected entries over the checkpoints, with two standard errors, and the loss above them."""
    steps, series = session.trajectories(view.state)
    assert view.shown is not None
    ax = place.axes(0.85, 0.5, 0.2, 0.6 + LINE * len(series))
    x = _positions(steps)
    if not len(steps) or not any(np.isfinite(s.values).any() for s in series):
        ax.remove()
        _say(place, "No trajectory: none of the selected entries is computed.")
        return
    _symlog(ax, "y", np.concatenate([s.values for s in series]))
    for k, one in enumerate(series):
        colour = style.PALETTE[k % len(style.PALETTE)]
        ax.plot(x, one.values, color=colour, marker="o", ms=3, lw=1.3, label=style.text(one.name, 70))
        low, high = one.values - style.BAND * one.errors, one.values + style.BAND * one.errors
        ax.fill_between(x, low, high, color=colour, alpha=0.18, lw=0)
    if view.step in steps:
        ax.axvline(x[steps.index(view.step)], color="0.4", lw=1, ls=":")
    ax.axhline(0, color="0.7", lw=0.8, zorder=0)
    ax.set_ylabel(f"entry [{style.unit(view.shown.units)}]", fontsize="small")
    ax.set_xlabel("step", fontsize="small")
    _light(ax, "Trajectories (bands: 2 standard errors)", LINE * len(series))
    ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), fontsize="x-small", frameon=False, borderaxespad=0.1,
              labelspacing=0.15)  # fmt: skip


def taylor(session: Session, view: View, place: Place) -> None:
    """The predicted change of the loss along minus the learning rates, by order, with two standard errors."""
    values, errors = session.along(view.state)
    if not np.isfinite(values).any():
        _say(place, "No prediction: the learning rates of this checkpoint are not available.")
        return
    ax = place.axes(0.85, 0.5, 0.2, 0.4)
    for k, (value, error) in enumerate(zip(values, errors, strict=True)):
        colour = style.PALETTE[k % len(style.PALETTE)]
        ax.plot(TAUS, value, color=colour, lw=1.3, label=f"order {k + 1}")
        ax.fill_between(TAUS, value - style.BAND * error, value + style.BAND * error, color=colour, alpha=0.18, lw=0)
    ax.axhline(0, color="0.7", lw=0.8, zorder=0)
    ax.axvline(1, color="0.7", lw=0.8, zorder=0)
    ax.set_xlabel("multiple of the learning rates shown [no unit]", fontsize="small")
    ax.set_ylabel("predicted change of the loss [loss]", fontsize="small")
    _light(ax, f"Taylor prediction along the learning rates, step {view.step}")
    ax.legend(fontsize="x-small", frameon=False, loc="best" if len(values) < 3 else "upper left")


_PANELS = {"matrix": matrix, "rates": rates, "trajectories": trajectories, "taylor": taylor}


def _dots(place: Place, series: Sequence[tuple[str, Any]], label: str, title: str) -> None:
    """A row for each group, the first ``ROWS`` by size where there are more."""
    first = series[0][1]
    size = np.nan_to_num(np.abs(first.values))
    kept = np.sort(np.argsort(-size, kind="stable")[:ROWS])
    labels = [first.rows[i] for i in kept]
    room = max(map(len, _texts(tuple(labels))), default=1)
    legend = LINE if len(series) > 1 else 0.0
    ax = place.axes(0.15 + LETTER * room, 0.5, 0.2, 0.35 + LINE * (2 if title.count("\n") else 1) * 0.7 + legend)
    y = np.arange(len(kept))
    _symlog(ax, "x", np.concatenate([part.values for _, part in series]))
    if ax.get_xscale() == "log" and any((part.values < style.BAND * part.errors).any() for _, part in series):
        label += " (a bar that ends at the left reaches 0)"
    for k, (name, part) in enumerate(series):
        at = {g: i for i, g in enumerate(part.rows)}
        where = [at.get(g) for g in labels]
        value = np.array([np.nan if i is None else part.values[i] for i in where])
        error = np.array([np.nan if i is None else part.errors[i] for i in where])
        shift = (k - (len(series) - 1) / 2) * 0.28
        ax.plot(value, y + shift, "o", ms=4, color=style.PALETTE[k], label=name or None)
        bar = style.BAND * np.nan_to_num(error)
        ax.hlines(y + shift, value - bar, value + bar, color=style.PALETTE[k], lw=1.1)
        for at_y in (y + shift)[~np.isfinite(value)]:
            ax.text(0.01, at_y, "no effect or not computed", transform=ax.get_yaxis_transform(), fontsize="x-small",
                    color="0.45", va="center")  # fmt: skip
    ax.set_ylim(len(y) - 0.5, -0.5)
    ax.hlines(y, 0, 1, transform=ax.get_yaxis_transform(), color="0.93", lw=0.8, zorder=0)
    ax.axvline(0, color="0.7", lw=0.8, zorder=0)
    ax.set_xlabel(label, fontsize="small")
    if len(first.rows) > len(kept):
        title += f", the {ROWS} largest of {len(first.rows)}"
    _light(ax, title, legend)
    _name(place, ax, labels, size="small" if len(y) <= 24 else 5)
    if legend:
        ax.legend(fontsize="x-small", frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(series),
                  borderaxespad=0.1)  # fmt: skip


def _symlog(ax: Axes, which: str, values: Array) -> None:
    """`style.signed_axis`, with plain labels."""
    style.signed_axis(ax, which, np.asarray(values, dtype=float))
    axis = ax.xaxis if which == "x" else ax.yaxis
    scale = ax.get_xscale() if which == "x" else ax.get_yscale()
    if scale != "linear":
        axis.set_major_formatter(lambda v, _: _power(v) if v == 0 or np.isclose(np.log10(abs(v)) % 1, 0) else f"{v:g}")


def _positions(steps: Sequence[Any]) -> Array:
    try:
        return np.array(steps, dtype=float)
    except (TypeError, ValueError):
        return np.arange(len(steps), dtype=float)


def _light(ax: Axes, title: str, pad: float = 0.0) -> None:
    ax.set_title(title, fontsize="medium", y=1.0, pad=6 + 72 * pad)
    ax.grid(color="0.93")
    ax.set_axisbelow(True)
    ax.tick_params(axis="both", labelsize="small")


def _say(place: Place, message: str) -> None:
    """The reason why there is nothing to see, where it would be."""
    ax = place.axes(0.3, 0.3, 0.3, 0.3)
    ax.set_axis_off()
    text = AnchoredText(_wrapped(message, int(place.width * 11)), loc="center", frameon=False,
                        prop={"color": "0.3", "fontsize": "medium"})  # fmt: skip
    ax.add_artist(text)


def _wrapped(message: str, width: int) -> str:
    import textwrap

    safe = message.replace("$", r"\$")
    return "\n".join("\n".join(textwrap.wrap(line, width)) for line in safe.split("\n"))
