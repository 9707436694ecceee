"""Small notebooks, and what is inside pages, as two parsers that are not ours see it."""

import re
from html.parser import HTMLParser
from pathlib import Path

import nbformat
from lxml import html as lxml_html


def notebook(
    path: Path, *sources: str, parameters: str | None = 'dataset = ""\nx = 1', kernel: str | None = "python3"
) -> Path:
    """A notebook with a parameters cell and the given code cells."""
    cells = [nbformat.v4.new_code_cell(s, id=f"c{i}") for i, s in enumerate(sources)]
    if parameters is not None:
        cells.insert(0, nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}, id="parameters"))
    spec = {"kernelspec": {"name": kernel, "display_name": "P", "language": "python"}} if kernel else {}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=spec), path)
    return path


def references(page: str) -> list[str]:
    """Everything that a page would fetch or follow: src, href, url(..), scripts."""
    tree = lxml_html.fromstring(page)
    found = [v for e in tree.iter() for k, v in e.attrib.items() if k in ("src", "href", "srcset", "data", "action")]
    found += re.findall(r"url\(([^)]*)\)", page)
    found += ["<script>" for _ in tree.iter("script")]
    return [f for f in found if not f.startswith(("data:image/", "#"))]


def text_of(page: str) -> str:
    return lxml_html.fromstring(page).text_content()


class _Elements(HTMLParser):
    """Names of elements and of attributes, and the text, by the parser of the standard library."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        self.attributes |= {name for name, _ in attrs}


ELEMENTS = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "div", "span", "ul", "li", "a", "pre",
    "img", "table", "thead", "tbody", "tr", "th", "td", "strong", "em", "code", "svg", "polyline", "circle", "main",
    "br", "hr", "nav",
}  # fmt: skip
ATTRIBUTES = {
    "lang", "charset", "http-equiv", "content", "name", "class", "id", "href", "src", "alt", "style", "border", "width",
    "height", "role", "aria-label", "points", "fill", "stroke", "cx", "cy", "r", "tabindex",
}  # fmt: skip


def assert_inert(page: str) -> None:
    """A policy that forbids scripts, and no element or attribute but those that our pages are made of."""
    tree = lxml_html.fromstring(page)
    policy = tree.xpath("//meta[@http-equiv='Content-Security-Policy']/@content")
    assert len(policy) == 1
    assert policy[0].startswith("default-src 'none'")
    assert "script-src" not in policy[0]
    standard = _Elements()
    standard.feed(page)
    lxml_elements = {e.tag for e in tree.iter() if isinstance(e.tag, str)}
    lxml_attributes = {k for e in tree.iter() for k in e.attrib}
    assert standard.elements | lxml_elements <= ELEMENTS, standard.elements | lxml_elements
    known = {a for a in standard.attributes | lxml_attributes if not a.startswith("data-")}
    assert known <= ATTRIBUTES, known
    assert not any(ord(c) in range(0x202A, 0x202F) for c in page)
    assert [r for r in references(page) if not re.fullmatch(r"\./[\w%.~-]+/[\w.]+", r)] == []
