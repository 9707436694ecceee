"""Pages as a browser's parser sees them: hostile labels are text, nothing runs, nothing comes from elsewhere."""

from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from lxml import html as lxml_html

import hoanalysis as ho
from hoanalysis.errors import ReportError
from hoanalysis.notebook import bullets, readable, table
from hoanalysis.reports import Outcome
from hoanalysis.reports.pages import index_page, page, sparkline
from tests.reports.notebooks import assert_inert, references, text_of

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg/onload=alert(1)>",
    "</style></title></pre><iframe srcdoc=x>",
    "{{7*7}}{% raw %}{0}%s",
    "\u202egnp<b>\u2066\x07",
    "&lt;b&gt;&#60;",
    "a\n\n<b>b</b>\tc",
    "[x](javascript:alert(1)) $\\alpha$ `c`",
    "x" * 10_000 + "<i>",
]
MODEL = f"""
import torch
from torch import nn

NAMES = {HOSTILE!r}

class Hostile(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        for name in NAMES:
            self.register_parameter(name.replace(".", "_"), nn.Parameter(torch.randn(3, 4)))

    def forward(self, x):
        return sum(torch.tanh(x @ getattr(self, name.replace(".", "_")).T) for name in NAMES)

def data(batch_size=8, max_samples=32):
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(max_samples, 4, generator=g), torch.randint(0, 3, (max_samples,), generator=g)
    return [(x[i : i + batch_size], y[i : i + batch_size]) for i in range(0, max_samples, batch_size)]
"""


def hostile_study(folder: Path) -> Path:
    from safetensors.torch import save_file

    namespace: dict = {}
    exec(MODEL, namespace)
    folder.mkdir()
    (folder / "hostile_factories.py").write_text(MODEL)
    for step in (0, 10):
        save_file(dict(namespace["Hostile"](seed=step).state_dict()), folder / f"step_{step}.safetensors")
    (folder / "log.csv").write_text("step,loss,<script>loss</script>,learning_rate\n0,1.2,1,0.1\n10,1.1,1,0.1\n")
    (folder / "study.toml").write_text(
        '[model]\nfactory = "hostile_factories:Hostile"\n[data]\nfactory = "hostile_factories:data"\n'
        '[checkpoints]\nlog = "log.csv"\n[summaries]\norder = 2\ndiagonal = 3\nkeep_batches = 4\n'
    )
    return folder / "study.toml"


def test_R3_hostile_labels_are_text_in_a_real_report(tmp_path: Path) -> None:
    good = hostile_study(tmp_path / "<script>alert('name')<")
    bad = hostile_study(tmp_path / 'javascript:"><img src=x onerror=alert(1)>?#\u202e%41')
    (bad.parent / "step_10.safetensors").write_bytes(b"<script>alert(1)</script>")
    with pytest.raises(ReportError, match="1 of 2 reports failed"):
        ho.report([good, bad], tmp_path / "out", progress=False)
    report = (tmp_path / "out" / good.parent.name / "index.html").read_text()
    index = (tmp_path / "out" / "index.html").read_text()
    for html in (report, index):
        assert_inert(html)
    assert references(report) == []
    assert report.count("<img") >= 8
    text, whole = text_of(report), text_of(index)
    cells = [c.text_content() for c in lxml_html.fromstring(report).iter("td", "th")]
    for label in HOSTILE[:-1]:
        assert readable(label.replace(".", "_")) in cells or readable(repr(label))[1:-1] in text, label
    assert any("xxx…xxx" in c for c in cells) or "x" * 10_000 in text
    assert "{{7*7}}" in text
    assert "49" not in [c.strip() for c in cells]
    assert "<script>alert('name')<" in whole
    assert 'javascript:"><img src=x onerror=alert(1)>?#\\u202e%41' in whole
    first, second = references(index)  # the second study's page shows the checkpoint that could be read
    assert first == "./%3Cscript%3Ealert%28%27name%27%29%3C/index.html"
    assert second.startswith("./javascript%3A%22%3E%3Cimg%20src%3Dx%20onerror%3Dalert%281%29%3E%3F%23")
    executed = nbformat.read(tmp_path / "out" / good.parent.name / "report.ipynb", as_version=4)
    for output in (o for c in executed.cells if c.cell_type == "code" for o in c.outputs):
        if shown := output.get("data", {}).get("text/html"):  # what JupyterLab would show
            tree = lxml_html.fromstring(f"<div>{shown}</div>")
            assert {e.tag for e in tree.iter()} <= {
                "div",
                "ul",
                "h2",
                "li",
                "table",
                "thead",
                "tbody",
                "tr",
                "th",
                "td",
                "p",
                "strong",
            }
            assert "\u202e" not in shown


@pytest.mark.parametrize("label", HOSTILE)
def test_R3_each_label_is_text_in_the_index_and_in_cells(tmp_path: Path, label: str) -> None:
    good = Outcome(label, tmp_path, rendered=True, findings=[f"In {label} something is."], losses=[1.0, 0.5])
    bad = Outcome(label, tmp_path, error=ReportError(label, where=label, kept=label), failed=tmp_path / "f.ipynb")
    made = index_page([good, bad, Outcome(label, tmp_path)])
    assert_inert(made)
    assert text_of(made).count(readable(label)) >= 3
    for shown in (bullets([label]), table(pd.DataFrame({label: [label, 1.5]}, index=[label, 3]))):
        tree = lxml_html.fromstring(f"<div>{shown.data}</div>")
        assert {e.tag for e in tree.iter()} <= {"div", "ul", "li", "table", "thead", "tbody", "tr", "th", "td"}
        assert readable(label)[:100] in tree.text_content()


def test_R3_names_that_are_not_utf8_are_escaped(tmp_path: Path) -> None:
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    made = index_page([Outcome(name, tmp_path, rendered=True)])
    made.encode("utf-8")
    assert "caf\\xe9" in text_of(made)
    assert references(made) == ["./caf%E9/index.html"]


def test_scripts_and_widgets_of_a_notebook_do_not_run() -> None:
    """What a user's own notebook shows: the text beside a widget, and a policy against the rest."""
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "IntSlider(value=3)"}
    script = {"application/javascript": "alert(1)", "text/plain": "<Javascript object>"}
    outputs = [nbformat.v4.new_output("display_data", data) for data in (view, script, {"text/html": "<b>bold</b>"})]
    cell = nbformat.v4.new_code_cell("secret = 1", outputs=outputs, execution_count=1)
    made = page(nbformat.v4.new_notebook(cells=[cell]), "title")
    text = text_of(made)
    assert "IntSlider(value=3)" in text
    assert "bold" in text
    assert "secret" not in text
    assert "<script" not in made
    assert "default-src 'none'" in made


def test_sparklines_have_gaps_where_values_are_missing() -> None:
    nan = np.nan
    drawn = lxml_html.fromstring(sparkline([3, 2, nan, 1, nan, nan, 0.5, 0.4, nan]))
    curves = [[float(p.split(",")[0]) for p in c.get("points").split()] for c in drawn.iter("polyline")]
    width = 118 / 8
    np.testing.assert_allclose(curves[0], [1, 1 + width], atol=0.05)
    np.testing.assert_allclose(curves[1], [1 + 6 * width, 1 + 7 * width], atol=0.05)
    (dot,) = drawn.iter("circle")
    np.testing.assert_allclose(float(dot.get("cx")), 1 + 3 * width, atol=0.05)
    assert sparkline([1.0]) == sparkline([nan, nan]) == ""
    assert sparkline([1.0, 1.0]).count(",") == 2  # a constant is a line, not a division by zero
