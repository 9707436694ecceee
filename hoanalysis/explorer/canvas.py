"""A canvas for pictures that are drawn again and again: it keeps the texts that it has written.

Text is most of the time of a picture, and few texts change when a slider moves.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from math import ceil, cos, radians, sin
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.font_manager import FontProperties

from hoanalysis.analysis.arrays import Array

GAP = 3.5  # points between the axes and the names of groups, as those of ticks
EDGE = 4  # pixels around a text


class Canvas(FigureCanvasAgg):
    """Agg, with texts at whole pixels."""

    def get_renderer(self) -> RendererAgg:
        found = super().get_renderer()
        if not isinstance(found, _Renderer):
            found = self.renderer = _Renderer(found.width, found.height, found.dpi)
        return found


class _Renderer(RendererAgg):
    def __init__(self, width: float, height: float, dpi: float) -> None:
        super().__init__(width, height, dpi)
        rc = matplotlib.rcParams  # what a text's look depends on besides its font's properties
        names = rc["font.sans-serif"], rc["font.serif"], rc["font.monospace"], rc["text.hinting"]
        self._fonts = tuple(map(str, names))

    def draw_text(
        self, gc: Any, x: float, y: float, s: str, prop: FontProperties, angle: float, ismath: Any = False,
        mtext: Any = None,
    ) -> None:  # fmt: skip
        if ismath or not gc.get_antialiased():
            super().draw_text(gc, x, y, s, prop, angle, ismath, mtext)
            return
        letters, left, bottom = _written(s, prop.copy(), angle, self.dpi, self._fonts)
        if letters.size:
            self._renderer.draw_text_image(letters, round(x) + left, round(y) + bottom, 0, gc)

    def get_text_width_height_descent(self, s: str, prop: FontProperties, ismath: Any) -> tuple[float, float, float]:
        if ismath:
            return super().get_text_width_height_descent(s, prop, ismath)
        return _size(s, prop.copy(), self.dpi, self._fonts)


@lru_cache(maxsize=4096)
def _size(s: str, prop: FontProperties, dpi: float, fonts: tuple[str, ...]) -> tuple[float, float, float]:
    return RendererAgg(1, 1, dpi).get_text_width_height_descent(s, prop, False)


@lru_cache(maxsize=2048)
def _written(s: str, prop: FontProperties, angle: float, dpi: float, fonts: tuple[str, ...]) -> tuple[Array, int, int]:
    """The cover of each pixel of a text that begins at (0, 0), and where its left and its bottom are (y downwards)."""
    width, height, _ = _size(s, prop, dpi, fonts)
    along, up = (
        np.array([cos(radians(angle)), -sin(radians(angle))]),
        np.array([-sin(radians(angle)), -cos(radians(angle))]),
    )
    corners = np.array([a * width * along + b * height * up for a in (0, 1) for b in (-1, 1)])
    (left, top), (right, bottom) = corners.min(0) - EDGE, corners.max(0) + EDGE
    x, y = ceil(-left), ceil(-top)
    paper = RendererAgg(x + ceil(right), y + ceil(bottom), dpi)
    paper.draw_text(paper.new_gc(), x, y, s, prop, angle)
    cover = np.asarray(paper.buffer_rgba())[..., 3]
    rows, columns = np.flatnonzero(cover.any(1)), np.flatnonzero(cover.any(0))
    if not len(rows):
        return cover[:0], 0, 0
    cut = cover[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].copy()
    return cut, int(columns[0]) - x, int(rows[-1]) + 1 - y


class Names(Artist):
    """The names of groups to the left of an axes and below it, where their ticks' labels would be.

    A tick is an object of several, made anew for each picture; here a name is a text, and nothing else.
    """

    def __init__(self, rows: Mapping[int, str], columns: Mapping[int, str], size: float | str) -> None:
        super().__init__()
        self._rows, self._columns, self._font = rows, columns, FontProperties(size=size)

    def draw(self, renderer: Any) -> None:
        """Right-aligned on the left, turned below."""
        ax = self.axes
        assert ax is not None
        gc, box, gap = renderer.new_gc(), ax.bbox, renderer.points_to_pixels(GAP)
        gc.set_foreground(matplotlib.rcParams["ytick.color"])
        _, line, descent = renderer.get_text_width_height_descent("lp", self._font, False)
        page = renderer.height

        def write(text: str, x: float, y: float, angle: float) -> None:
            renderer.draw_text(gc, x, page - y, text, self._font, angle)

        def length(text: str) -> float:
            return renderer.get_text_width_height_descent(text, self._font, False)[0]

        for at, text in self._rows.items():
            y = ax.transData.transform((0, at))[1]
            write(text, box.x0 - gap - length(text), y - (line - descent) / 2, 0)
        for at, text in self._columns.items():
            x = ax.transData.transform((at, 0))[0]
            write(text, x + line / 2 - descent, box.y0 - gap - length(text), 90)
        gc.restore()
