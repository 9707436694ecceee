"""An executed notebook as a self-contained page, and the index of several reports.

Whatever a page shows is text of others: names of parameters, of columns, of folders. Every piece is escaped where it is
put in, and the policy of each page forbids scripts and anything from elsewhere.
"""

from __future__ import annotations

import html
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING
from urllib.parse import quote

import nbformat
import numpy as np

from hoanalysis.notebook import readable
from hoanalysis.store.files import shown

if TYPE_CHECKING:
    from hoanalysis.reports.run import Outcome

PAGE = "index.html"

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto; padding: 0 1.5rem; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; padding-bottom: .3rem; }
img { max-width: 100%; height: auto; margin-top: .6rem; } pre { overflow-x: auto; background: #f6f6f6; padding: .6rem; }
table { border-collapse: collapse; font-size: 14px; display: block; overflow-x: auto; }
td, th { padding: .25rem .5rem; border-bottom: 1px solid #e5e5e5; text-align: right; vertical-align: top; }
table.words td:last-child { text-align: left; }
nav { font-size: 14px; line-height: 1.9; margin: 1.5rem 0; padding: .5rem .8rem; background: #f6f6f6; }
th { background: #fafafa; } a { color: #1a4f8b; } .anchor-link { display: none; }
li, h1, h2, pre { overflow-wrap: anywhere; } td, th { overflow-wrap: break-word; max-width: 24em; min-width: 3em; }
.long { max-height: 12em; overflow-y: auto; }
.card { border: 1px solid #ddd; border-radius: 6px; padding: 1rem 1.2rem; margin: 1rem 0; }
.card h2 { margin-top: 0; border: none; } .card pre { white-space: pre-wrap; background: none; padding: 0; }
.banner { border: 1px solid #b8860b; background: #fdf6e0; border-radius: 6px; padding: .6rem 1rem; }
.failed { border-color: #b40426; background: #fdf0f0; } .waiting { color: #777; } svg { vertical-align: middle; }
"""
# base-uri and form-action do not fall back to default-src
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="referrer" content="no-referrer">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body>
{body}
</body></html>
"""
#: What a cell shows of an output with several forms. Scripts and widgets are not among them: their text or picture is.
_SHOWN = ["text/html", "image/svg+xml", "image/png", "image/jpeg", "text/markdown", "text/latex", "text/plain"]
_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u202a-\u202e\u2066-\u2069]")


def page(executed: nbformat.NotebookNode, title: str) -> str:
    """A self-contained page: the notebook's text and pictures, no code, nothing that runs, nothing from elsewhere."""
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    config = Config({"NbConvertBase": {"display_data_priority": _SHOWN}})
    exporter = HTMLExporter(config=config, template_name="basic", exclude_input=True, exclude_input_prompt=True,
                            exclude_output_prompt=True, embed_images=True)  # fmt: skip
    body, _ = exporter.from_notebook_node(executed)
    return _whole(title, _with_contents(body))


_SECTION = re.compile(r"<h2([^>]*)>(.*?)</h2>", re.DOTALL)
_ANCHOR_OR_TAG = re.compile(r'<a class="anchor-link".*?</a>|<[^>]*>', re.DOTALL)


def _with_contents(body: str) -> str:
    """A line of links to the sections in front of the second one: what was found stands above it."""
    sections = list(_SECTION.finditer(body))
    if len(sections) < 4:
        return body
    links, pieces, at = [], [], 0
    for k, section in enumerate(sections):
        links.append(f'<a href="#section-{k}">{_ANCHOR_OR_TAG.sub("", section[2]).strip()}</a>')
        pieces += [body[at : section.start()], f'<h2 id="section-{k}">{section[2]}</h2>']
        at = section.end()
    pieces.insert(3, f"<nav>{' · '.join(links[1:])}</nav>\n")  # behind all that belongs to the first section
    return "".join([*pieces, body[at:]])


def index_page(outcomes: Sequence[Outcome]) -> str:
    """One card a study: a sparkline of the loss and the first findings, or in red what went wrong."""
    return _whole("Reports", "<h1>Reports</h1>\n" + "\n".join(map(_card, outcomes)))


def _whole(title: str, body: str) -> str:
    """The page, with characters that would turn or hide the text around them made visible."""
    text = _PAGE.format(policy=_POLICY, title=html.escape(title), style=_STYLE, body=body)
    return _CONTROLS.sub(lambda m: f"\\u{ord(m[0]):04x}", text)


def _card(o: Outcome) -> str:
    name = html.escape(readable(shown(o.name)))
    if o.error is not None:
        reason = html.escape("\n".join(map(readable, str(o.error).splitlines())))
        return f'<div class="card failed"><h2>{name}</h2><pre>{reason}</pre>{_links(o)}</div>'
    if not o.done:
        return f'<div class="card waiting"><h2>{name}</h2><p>not started</p>{_links(o)}</div>'
    lines = "".join(f"<li>{html.escape(readable(line, 600))}</li>" for line in o.findings[:4])
    link = html.escape(_link(o, PAGE))
    return f'<div class="card"><h2><a href="{link}">{name}</a> {sparkline(o.losses)}</h2><ul>{lines}</ul></div>'


def _links(o: Outcome) -> str:
    """The failed notebook, and a page that shows less than everything or is of an earlier call."""
    links = []
    if o.failed is not None:
        links.append((o.failed.name, "the notebook as far as it came"))
    if o.page.is_file():
        there = f"the page of the {o.present} of {o.units} units that are there" if o.rendered else ""
        links.append((PAGE, there or "the page of an earlier call"))
    return "".join(f'<p><a href="{html.escape(_link(o, to))}">{text}</a></p>' for to, text in links)


def _link(o: Outcome, file: str) -> str:
    """Relative to the index. A name like ``javascript:x`` or ``a?b`` is a folder, not a scheme or a query."""
    return f"./{quote(os.fsencode(o.name), safe='')}/{file}"


def sparkline(values: Sequence[float], width: int = 120, height: int = 24) -> str:
    """A small curve as inline SVG, broken where values are missing."""
    v = np.asarray(values, dtype=float)
    finite = np.isfinite(v)
    if finite.sum() < 2:
        return ""
    low, span = v[finite].min(), np.ptp(v[finite]) or 1.0
    x, y = np.linspace(1, width - 1, len(v)), height - 2 - (v - low) / span * (height - 4)
    pieces = [i for i in np.split(np.arange(len(v)), np.flatnonzero(~finite)) if finite[i].any()]
    curves = "".join(_stroke([(x[k], y[k]) for k in piece if finite[k]]) for piece in pieces)
    return f'<svg width="{width}" height="{height}" role="img" aria-label="loss">{curves}</svg>'


def _stroke(points: Sequence[tuple[float, float]]) -> str:
    if len(points) == 1:
        return f'<circle cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="1" fill="#1a4f8b"/>'
    joined = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    return f'<polyline points="{joined}" fill="none" stroke="#1a4f8b"/>'
