"""The numbers behind the cells of the picture, read by pointing at them: HTML and CSS alone, over the image."""

from __future__ import annotations

import html
import io

from PIL import Image

from hoanalysis.explorer.session import View, entry_name
from hoanalysis.explorer.words import number
from hoanalysis.plots import style

CELLS = 10_000  # at most so many; a page of more elements is slow to lay out
NAME = 48  # letters of a group's name
DOUBT = ", within 2 standard errors of 0"

#: The text of a cell is beneath its row, within the width of the matrix: nothing is wider or higher than the picture.
STYLE = """<style>
.ho-live .ho-picture {position: relative; display: block; width: fit-content; max-width: 100%; overflow: visible}
.ho-live .ho-picture img {display: block; margin: 0; max-width: 100%; height: auto}
.ho-live .ho-cells, .ho-live .ho-cells .widget-html-content {
  position: absolute; inset: 0; width: auto; height: auto; margin: 0; padding: 0; overflow: visible}
.ho-cells section {position: absolute; display: flex; flex-direction: column}
.ho-cells section > div {position: relative; flex: 1 1 0; min-height: 0; display: flex}
.ho-cells i {flex: 1 1 0; min-width: 0; cursor: crosshair}
.ho-cells i:hover, .ho-cells i:focus {outline: 1.5px solid black}
.ho-cells i:hover::after, .ho-cells i:focus::after {
  content: attr(t); position: absolute; left: 0; top: calc(100% + 3px); max-width: 100%; z-index: 9;
  pointer-events: none; box-sizing: border-box; padding: 2px 6px; font: 12px/1.35 sans-serif; overflow-wrap: anywhere;
  color: black; background: white; border: 1px solid gray; box-shadow: 0 1px 4px #0006}
.ho-cells section:has(i:hover) i:focus:not(:hover)::after {display: none}
</style>"""


def cells(view: View, picture: bytes) -> str:
    """An element for each cell of ``picture``, the PNG of `figures.panel`, with names, value and error as its text.

    Empty where the picture has no cells, and where there are more than `CELLS`.
    """
    image = Image.open(io.BytesIO(picture))
    told = str(image.info.get("Cells", "")).split()  # ahead of the pixels, which are not read
    whole = view.whole
    if not told or whole is None or whole.values.ndim != 2 or whole.values.size > CELLS:
        return ""
    left, top, right, bottom = (
        100 * float(x) / side for x, side in zip(told[:4], 2 * (image.width, image.height), strict=True)
    )
    place = f"left:{left:.3f}%;top:{top:.3f}%;width:{right - left:.3f}%;height:{bottom - top:.3f}%"
    further = [_name(g) for g in view.state.slices]
    columns = [html.escape(entry_name((_name(g), *further))) for g in whole.columns]
    ends, sure = (html.escape(f" [{style.unit(whole.units)}]{doubt}") + '"></i>' for doubt in (DOUBT, ""))
    rows = []
    settled = whole.settled.tolist()
    for label, values, errors, clear in zip(
        whole.rows, whole.values.tolist(), whole.errors.tolist(), settled, strict=True
    ):
        start = '<i tabindex=-1 t="' + html.escape(entry_name((_name(label), "")))
        rows.append(
            "".join(
                f"{start}{column}: {number(v, se)}{sure if known else ends}"
                for column, v, se, known in zip(columns, values, errors, clear, strict=True)
            )
        )
    return f'<section style="{place}">' + "".join(f"<div>{row}</div>" for row in rows) + "</section>"


def _name(label: str) -> str:
    """A name that is what it looks like, the middle left out where it is long."""
    seen = "".join(c if c.isprintable() else "\N{WHITE SQUARE}" for c in label)
    return seen if len(seen) <= NAME else seen[: NAME // 2] + "\N{HORIZONTAL ELLIPSIS}" + seen[1 - NAME // 2 :]
