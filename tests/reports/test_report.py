"""Reports: from a study to a self-contained page, computed once, rendered again; a failure loses nothing."""

import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import hoanalysis as ho
from hoanalysis.errors import CheckpointError, NumericsError, ReportError
from tests.conftest import write_study
from tests.reports.notebooks import notebook, references, text_of


def test_the_built_in_report(study: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    index = ho.report(study, out, progress=False)
    assert index == out / "index.html"
    page = index.read_text()
    assert page.count("<img") >= 8
    assert references(page) == []
    assert "Content-Security-Policy" in page
    assert "import hoanalysis" not in page  # the code is hidden
    text = text_of(page)
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
    assert "vnd.jupyter.widget" not in executed + page  # static where nobody can move a slider
    pictures = re.findall(r'src="(data:image/[^"]+)"', page)
    assert len(set(pictures)) == len(pictures)
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
    assert re.findall(r'href="([^"]+)"', page) == ["./one/index.html", "./two/index.html"]
    assert page.count("<svg") == 2
    for name in ("one", "two"):
        assert "7" in (tmp_path / "out" / name / "index.html").read_text()


def test_a_failing_study_does_not_stop_the_others(tmp_path: Path) -> None:
    bad = write_study(tmp_path / "bad", "factories_bad_y")
    (bad.parent / "step_10.safetensors").write_bytes(b"")
    good = write_study(tmp_path / "good", "factories_good_y")
    plain = notebook(tmp_path / "n.ipynb", "print(x)")
    with pytest.raises(ReportError, match="1 of 2 reports failed: 'bad'"):
        ho.report([bad, good], tmp_path / "out", plain, progress=False)
    page = (tmp_path / "out" / "index.html").read_text()
    assert "empty" in text_of(page)
    assert 'class="card failed"' in page
    assert (tmp_path / "out" / "good" / "index.html").exists()
    shown = ho.open_dataset(tmp_path / "out" / "bad" / "summaries.nc")  # the other checkpoints of the bad one
    assert shown.coverage.values.tolist() == [1, 0, 1]


def test_an_error_of_the_studys_own_code_is_a_red_card(tmp_path: Path) -> None:
    bad = write_study(tmp_path / "bad", "factories_bad_z")
    code = (bad.parent / "factories_bad_z.py").read_text()
    broken = "def data(batch_size=8, max_samples=32):\n    raise RuntimeError('no such device')\n"
    (bad.parent / "factories_bad_z.py").write_text(
        code
        + "\nclass Odd(nn.Sequential):\n    def forward(self, x):\n        raise ZeroDivisionError('odd')\n"
        + "\nplain = model\ndef model(**k):\n    return Odd(*plain(**k))\n"
    )
    worse = write_study(tmp_path / "worse", "factories_worse_z")
    (worse.parent / "factories_worse_z.py").write_text(code + broken)
    good = write_study(tmp_path / "good", "factories_good_z")
    plain = notebook(tmp_path / "n.ipynb", "print(x)")
    with pytest.raises(ReportError, match="2 of 3 reports failed: 'bad', 'worse'"):
        ho.report([bad, worse, good], tmp_path / "out", plain, progress=False)
    text = text_of((tmp_path / "out" / "index.html").read_text())
    assert "ZeroDivisionError: odd" in text
    assert "no such device" in text
    assert (tmp_path / "out" / "good" / "index.html").exists()


@pytest.fixture
def gap(monkeypatch) -> None:
    """The unit of step 10 cannot be computed."""
    from hoanalysis.summaries import Work

    real = Work.unit

    def unit(self, checkpoint, *args, **kwargs):
        if checkpoint.step == 10:
            raise NumericsError("D2 overflowed", where="step_10.safetensors")
        return real(self, checkpoint, *args, **kwargs)

    monkeypatch.setattr(Work, "unit", unit)


def test_R7_an_incomplete_store_is_shown_with_a_banner_and_gaps(study: Path, tmp_path: Path, gap) -> None:
    out = tmp_path / "out"
    with pytest.raises(NumericsError, match="D2 overflowed"):
        ho.report(study, out, progress=False)
    page = (out / "index.html").read_text()
    assert "This report is incomplete: 2 of 3 units are in the store." in text_of(page)
    assert page.count("<img") >= 8
    assert "1 of 3 checkpoints are not computed: steps '10'" in text_of(page)
    (line, *_) = ho.open_dataset(out / "summaries.nc").ho.plot.loss().lines
    np.testing.assert_array_equal(line.get_xdata(), [0, 10, 20])
    np.testing.assert_array_equal(np.isnan(line.get_ydata()), [False, True, False])


def test_R7_the_index_says_how_many_units_there_are(tmp_path: Path, gap) -> None:
    studies = [write_study(tmp_path / name, f"factories_{name}_gap") for name in ("one", "two")]
    plain = notebook(tmp_path / "n.ipynb", "print(x)")
    with pytest.raises(ReportError, match="2 of 2 reports failed"):
        ho.report(studies, tmp_path / "out", plain, progress=False)
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count('class="card failed"') == 2
    assert text_of(page).count("the page of the 2 of 3 units that are there") == 2
    assert "./one/index.html" in page


def test_a_checkpoint_that_diverged_is_a_gap(study: Path, tmp_path: Path) -> None:
    file = study.parent / "step_20.safetensors"
    weights = load_file(file)
    save_file({n: w * float("nan") for n, w in weights.items()}, file)
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="NaN or infinite") as caught:
        ho.report(study, out, progress=False)
    assert caught.value.where.startswith("step 20, ")
    assert "This report is incomplete: 2 of 3 units are in the store." in text_of((out / "index.html").read_text())
    assert ho.open_dataset(out / "summaries.nc").coverage.values.tolist() == [1, 1, 0]


def test_where_nothing_can_be_computed_the_last_good_file_stays(study: Path, tmp_path: Path, monkeypatch) -> None:
    from hoanalysis.summaries import Work

    out, plain = tmp_path / "out", notebook(tmp_path / "n.ipynb", "print(1)")
    ho.report(study, out, plain, progress=False)
    good = (out / "summaries.nc").read_bytes()
    study.write_text(study.read_text().replace("order = 2", "order = 1"))

    def unit(self, *args, **kwargs):
        raise NumericsError("D1 overflowed")

    monkeypatch.setattr(Work, "unit", unit)
    with pytest.raises(NumericsError, match="3 of 3 checkpoints failed, at steps '0', '10', '20'; the first: D1"):
        ho.report(study, out, plain, progress=False)
    assert (out / "summaries.nc").read_bytes() == good


def test_a_study_without_a_unit_is_an_error(tmp_path: Path) -> None:
    study = write_study(tmp_path / "one", "factories_one_unit", 'directions = ["to:next"]\n', steps=1)
    with pytest.raises(ReportError, match="asks for no summary"):
        ho.report(study, tmp_path / "out", notebook(tmp_path / "n.ipynb"), progress=False)


# ---- what is refused before anything is computed ---------------------------------------------------------------------


def test_wrong_calls_are_named(study: Path, tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="no study"):
        ho.report([], tmp_path / "out")
    with pytest.raises(ReportError, match="no such notebook"):
        ho.report(study, tmp_path / "out", tmp_path / "missing.ipynb")
    with pytest.raises(ReportError, match="several studies are called 'small'"):
        ho.report([study, study], tmp_path / "out")


def test_R5_an_output_folder_that_cannot_be_used_is_told_before_computing(study: Path, tmp_path: Path) -> None:
    plain = notebook(tmp_path / "n.ipynb")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "taken" / "index.html").mkdir(parents=True)
    for out, words in {
        tmp_path / "file" / "out": "is a file, not a folder",
        tmp_path / "file": "is a file, not a folder",
        tmp_path / "link": "is a link to nothing, not a folder",
        tmp_path / "loop" / "x": "loop of symbolic links|a link to nothing",
        tmp_path / ("n" * 300): "the name is too long",
        tmp_path / "taken": "a folder is in the place of the file index.html",
        Path("/proc/version/x"): "is a file, not a folder",
    }.items():
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ReportError, match=words):
            ho.report(study, out, plain, progress=False)
        assert sorted(tmp_path.rglob("*")) == before
    for existing in (
        tmp_path / "new" / "deep",
        tmp_path / "new",
    ):  # one that is missing is made, one that is there is used
        ho.report(study, existing, plain, progress=False)
        assert (existing / "index.html").is_file()


def test_R5_of_several_each_folder_is_looked_at(tmp_path: Path) -> None:
    studies = [write_study(tmp_path / name, f"factories_{name}_r5") for name in ("one", "two")]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "two").write_text("x")
    with pytest.raises(ReportError, match="two is a file, not a folder"):
        ho.report(studies, tmp_path / "out", notebook(tmp_path / "n.ipynb"), progress=False)
    assert not (tmp_path / "out" / "one").exists()


@pytest.mark.parametrize("name", ["...toml", "..toml", "index.html.toml", ".hoanalysis-new-x.toml"])
def test_R8_a_name_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    one = write_study(tmp_path / "in" / "one", "factories_r8")
    odd = one.with_name(name)
    odd.write_text(one.read_text())
    with pytest.raises(ReportError, match="a report cannot be put into a folder called"):
        ho.report([one, odd], tmp_path / "out", notebook(tmp_path / "n.ipynb"), progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "n.ipynb"]


def test_R8_paths_are_never_templates(tmp_path: Path) -> None:
    """papermill formats paths with the parameters: {x} in them is a name here."""
    study = write_study(tmp_path / "{x}" / "{missing}", "factories_r8_braces")
    mine = notebook(study.parent / "{dataset}.ipynb", "print('x is', x)")
    ho.report(study, tmp_path / "{x}" / "{out.__class__}", mine, {"x": "../../up"}, progress=False)
    assert "x is ../../up" in (tmp_path / "{x}" / "{out.__class__}" / "index.html").read_text()


def test_an_error_of_our_own_ends_one_study_and_is_told_with_its_place(tmp_path: Path, monkeypatch) -> None:
    from hoanalysis.reports import run

    real = run.findings

    def findings(ds, *args):
        if ds.sizes["step"] == 2:
            raise IndexError("no such entry")
        return real(ds, *args)

    monkeypatch.setattr(run, "findings", findings)
    one, two = (write_study(tmp_path / n, f"factories_{n}_own", steps=s) for n, s in (("one", 1), ("two", 2)))
    plain = notebook(tmp_path / "n.ipynb", "print(x)")
    with pytest.raises(ReportError, match="1 of 2 reports failed: 'two'"):
        ho.report([two, one], tmp_path / "out", plain, progress=False)
    assert (tmp_path / "out" / "one" / "index.html").exists()
    with pytest.raises(ReportError, match="IndexError: no such entry") as caught:
        ho.report(two, tmp_path / "out2", plain, progress=False)
    assert "in findings" in caught.value.where
    assert isinstance(caught.value.__cause__, IndexError)
