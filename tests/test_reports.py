"""Reports: from a study to a self-contained page, computed once, rendered again; a failure loses nothing."""

import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from lxml import html as lxml_html

import hoanalysis as ho
from hoanalysis import reports
from hoanalysis.errors import ReportError
from tests.conftest import write_study


def notebook(path: Path, *sources: str, parameters: str = 'dataset = ""\nx = 1') -> Path:
    """A notebook with a parameters cell and the given code cells."""
    cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    cells += [nbformat.v4.new_code_cell(s) for s in sources]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)
    return path


def references(page: str) -> list[str]:
    """Everything that a page would fetch or follow: src, href, url(..), scripts."""
    tree = lxml_html.fromstring(page)
    found = [v for e in tree.iter() for k, v in e.attrib.items() if k in ("src", "href", "srcset", "data", "action")]
    found += re.findall(r"url\(([^)]*)\)", page)
    found += ["<script>" for _ in tree.iter("script")]
    return [f for f in found if not f.startswith(("data:image/", "#"))]


def test_the_built_in_report(study: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    index = ho.report(study, out, progress=False)
    assert index == out / "index.html"
    page = index.read_text()
    assert page.count("<img") >= 8
    assert references(page) == []
    assert "Content-Security-Policy" in page
    assert "import hoanalysis" not in page  # the code is hidden
    text = lxml_html.fromstring(page).text_content()
    for word in (
        "What was found",
        "Learning rates",
        "The inverse",
        "regularizer",
        "strongest pairs",
        "Quality",
        "sha256",
    ):
        assert word in text, word
    assert sorted(p.name for p in out.iterdir()) == ["index.html", "report.ipynb", "store", "summaries.nc"]
    executed = (out / "report.ipynb").read_text()
    assert str(tmp_path) not in executed  # no path of this machine in what is passed on
    ds = ho.open_dataset(out / "summaries.nc")
    assert ds.sizes["step"] == 3
    assert np.isfinite(ds.D3_diag).all()
    assert "computed 3 of 3" in capsys.readouterr().out


def test_a_second_call_computes_nothing_and_says_so(study: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    plain = notebook(tmp_path / "n.ipynb", "print(x)")
    ho.report(study, tmp_path / "out", plain, progress=False)

    def explode(*args, **kwargs):
        raise AssertionError("computed again")

    monkeypatch.setattr("hoanalysis.summaries.Work.unit", explode)
    ho.report(study, tmp_path / "out", plain, progress=False)
    assert "nothing to compute, all 3 summaries are in" in capsys.readouterr().out


def test_several_studies_get_an_index(tmp_path: Path) -> None:
    studies = [write_study(tmp_path / name, f"factories_{name}_x") for name in ("one", "two")]
    plain = notebook(tmp_path / "n.ipynb", "print(x)")
    index = ho.report(studies, tmp_path / "out", plain, {"x": 7}, progress=False)
    page = index.read_text()
    assert re.findall(r'href="([^"]+)"', page) == ["one/index.html", "two/index.html"]
    assert page.count("<svg") == 2
    for name in ("one", "two"):
        assert "7" in (tmp_path / "out" / name / "index.html").read_text()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise ValueError('no such layer')", "ValueError: no such layer"),
        ("import os; os.kill(os.getpid(), 9)", "DeadKernelError"),
    ],
)
def test_a_failing_notebook_is_kept_with_the_reason(study: Path, tmp_path: Path, source: str, reason: str) -> None:
    out, good = tmp_path / "out", notebook(tmp_path / "good.ipynb", "print('a good report')")
    ho.report(study, out, good, progress=False)
    before = (out / "index.html").read_text()
    bad = notebook(tmp_path / "bad.ipynb", "print('first')", source, "print('last')")
    with pytest.raises(ReportError, match=reason) as caught:
        ho.report(study, out, bad, progress=False)
    assert "every summary" in str(caught.value)
    assert (out / "index.html").read_text() == before
    assert reason.split(":")[0] in (out / "report.failed.ipynb").read_text()
    assert not list(out.glob(".executing*"))
    ho.report(study, out, good, progress=False)
    assert not (out / "report.failed.ipynb").exists()


def test_a_failing_study_does_not_stop_the_others(tmp_path: Path) -> None:
    bad = write_study(tmp_path / "bad", "factories_bad_y")
    (bad.parent / "step_10.safetensors").write_bytes(b"")
    good = write_study(tmp_path / "good", "factories_good_y")
    plain = notebook(tmp_path / "n.ipynb", "print(x)")
    with pytest.raises(ReportError, match="1 of 2 reports failed: 'bad'"):
        ho.report([bad, good], tmp_path / "out", plain, progress=False)
    page = (tmp_path / "out" / "index.html").read_text()
    assert "empty" in lxml_html.fromstring(page).text_content()
    assert 'class="card failed"' in page
    assert (tmp_path / "out" / "good" / "index.html").exists()
    assert not (tmp_path / "out" / "bad" / "summaries.nc").exists()


def test_labels_are_escaped(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", "factories_labels").parent
    hostile = '<script>alert(1)</script>"><img onerror=x src=y>'
    page = reports.index_page([reports.Outcome(hostile, folder, findings=[hostile], losses=[1.0, 0.5])])
    assert list(lxml_html.fromstring(page).iter("script")) == []
    assert list(lxml_html.fromstring(page).iter("img")) == []
    assert hostile in lxml_html.fromstring(page).text_content()


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"y": 1}, "has no parameter 'y'"),
        ({"not a name": 1}, "cannot be called"),
        ({"lambda": 1}, "cannot be called"),
        ({"x": object()}, "is a object"),
    ],
)
def test_parameters_are_checked_before_anything_is_computed(study: Path, tmp_path: Path, parameters, words) -> None:
    plain = notebook(tmp_path / "n.ipynb", "print(x)")
    with pytest.raises(ReportError, match=words):
        ho.report(study, tmp_path / "out", plain, parameters, progress=False)
    assert not (tmp_path / "out").exists()


def test_parameters_become_plain_values() -> None:
    import datetime

    given = {
        "a": np.float64(0.5),
        "b": Path("x/y"),
        "c": (1, np.int64(2)),
        "d": datetime.date(2024, 5, 1),
        "e": {"k": None},
    }
    plain = {k: reports.plain(k, v) for k, v in given.items()}
    assert plain == {"a": 0.5, "b": "x/y", "c": [1, 2], "d": "2024-05-01", "e": {"k": None}}
    assert type(plain["a"]) is float


def test_wrong_calls_are_named(study: Path, tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="no study"):
        ho.report([], tmp_path / "out")
    with pytest.raises(ReportError, match="no such notebook"):
        ho.report(study, tmp_path / "out", tmp_path / "missing.ipynb")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ReportError, match="is a file, not a folder"):
        ho.report(study, tmp_path / "file" / "out", progress=False)
    with pytest.raises(ReportError, match="several studies are called 'small'"):
        ho.report([study, study], tmp_path / "out")
