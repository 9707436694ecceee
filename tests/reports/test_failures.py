"""Notebooks that fail in every way: kept with the reason, shown in red, never taken for complete; the others go on."""

import random
import signal
from pathlib import Path

import nbformat
import pytest

import hoanalysis as ho
from hoanalysis.errors import ReportError
from hoanalysis.reports.execute import NotebookFailed, prepare
from tests.conftest import write_study
from tests.reports.forks import End, Forks
from tests.reports.notebooks import assert_inert, notebook, text_of

FAULTS = {
    "exception": (
        ["print('first')", "raise ValueError('no\\x1b[31m such *layer*')"],
        "In [4]: ValueError: no such *layer*",
    ),
    "exit": (["print('first')", "import sys; sys.exit(0)"], "In [4]: SystemExit: 0"),
    "dead": (["print('first')", "import os; os.kill(os.getpid(), 9)"], "In [4]: the kernel died"),
    "timeout": (["print('first')", "while True: pass"], "In [4]: timeout, no answer within 1 seconds"),
}


def test_R4_each_fault_is_a_failed_notebook_and_a_red_card_and_the_others_go_on(forks: Forks, tmp_path: Path) -> None:
    studies = []
    for name, (sources, _) in {**FAULTS, "good": (["print('a good report')"], "")}.items():
        notebook(tmp_path / f"{name}.ipynb", *sources, "print('the last cell')")
        report = f'[report]\nnotebook = "../{name}.ipynb"\n'
        studies.append(write_study(tmp_path / name, f"factories_{name}_r4", report, steps=1))
    out = tmp_path / "out"
    end = forks("report", *studies, "--out", out, "--timeout", 1, "--quiet")
    assert end.status == 1
    assert "4 of 5 reports failed: 'exception', 'exit', 'dead', 'timeout'" in end.output
    assert "Traceback" not in end.output
    index = (out / "index.html").read_text()
    assert_inert(index)
    assert index.count('class="card failed"') == 4
    assert "the last cell" in (out / "good" / "index.html").read_text()
    for name, (_, reason) in FAULTS.items():
        assert reason in text_of(index)
        assert f'href="./{name}/report.failed.ipynb"' in index
        assert sorted(p.name for p in (out / name).iterdir()) == ["report.failed.ipynb", "store", "summaries.nc"]
        failed = nbformat.read(out / name / "report.failed.ipynb", as_version=4)
        assert f"    {reason}" in failed.cells[0].source
        assert failed.cells[3].outputs[0].text == "first\n"
        assert failed.cells[-1].outputs == []
        assert str(tmp_path) not in nbformat.writes(failed)


def test_R4_the_last_good_report_stays_until_the_next(study: Path, tmp_path: Path) -> None:
    out, good = tmp_path / "out", notebook(tmp_path / "good.ipynb", "print('a good report')")
    ho.report(study, out, good, progress=False)
    kept = {name: (out / name).read_bytes() for name in ("index.html", "report.ipynb")}
    with pytest.raises(ReportError, match="ZeroDivisionError") as caught:
        ho.report(study, out, notebook(tmp_path / "bad.ipynb", "1 / 0"), progress=False)
    assert "every summary" in caught.value.kept
    assert {name: (out / name).read_bytes() for name in kept} == kept
    assert (out / "report.failed.ipynb").exists()
    ho.report(study, out, good, progress=False)
    assert not (out / "report.failed.ipynb").exists()
    assert {name: (out / name).read_bytes() for name in kept} == kept


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_R4_ctrl_c_in_a_cell_stops_with_130_and_leaves_an_index(
    forks: Forks, tmp_path: Path, sent: int, status: int
) -> None:
    studies = [write_study(tmp_path / name, f"factories_{name}_c", steps=1) for name in ("one", "two", "three")]
    flag, out = tmp_path / "flag", tmp_path / "out"
    wait = f"import os, time\nif 'two' in os.getcwd():\n    open({str(flag)!r}, 'w').write(str(os.getpid()))\n"
    mine = notebook(tmp_path / "n.ipynb", "print('first')", f"{wait}    time.sleep(100)")
    end = forks("report", *studies, "--out", out, "-q", "--notebook", mine, signal=sent, file=str(flag))
    assert end.status == status, end.output
    assert "interrupted" in end.output
    assert "Traceback" not in end.output
    assert not alive(int(flag.read_text()))  # the kernel
    index = (out / "index.html").read_text()
    assert_inert(index)
    assert index.count('class="card failed"') == 1
    assert "In [4]: interrupted" in text_of(index)
    assert "not started" in text_of(index)
    assert 'href="./one/index.html"' in index
    failed = nbformat.read(out / "two" / "report.failed.ipynb", as_version=4)
    assert "In [4]: interrupted" in failed.cells[0].source
    assert failed.cells[3].outputs[0].text == "first\n"
    assert not list(out.rglob(".hoanalysis*"))


def test_R4_ctrl_c_at_any_time_stops_with_130(forks: Forks, tmp_path: Path) -> None:
    studies = [write_study(tmp_path / name, f"factories_{name}_any", steps=1) for name in ("one", "two")]
    mine = notebook(tmp_path / "n.ipynb", "print('first')")
    draw = random.Random(1)
    for trial in range(8):
        out = tmp_path / str(trial)
        when = {"signal": signal.SIGINT, "seconds": draw.uniform(0.1, 1.5)}
        end = forks("report", *studies, "--out", out, "-q", "--notebook", mine, **when)
        assert end.status in (0, 130), end.output
        assert ("interrupted" in end.output) == (end.status == 130), end.output
        assert "Traceback" not in end.output
        if end.status and (out / "index.html").exists():
            assert (out / "index.html").read_text().count('class="card failed"') == 1
        if list(out.rglob(".hoanalysis*")):  # it fell between making a temporary file and its care: the next call's
            assert forks("report", *studies, "--out", out, "-q", "--notebook", mine).status == 0
            assert not list(out.rglob(".hoanalysis*"))


FINALIZERS = """
import os, signal, time
_model = model

class Ends:
    def __del__(self):
        {at_the_end}

def model():
    ends = Ends()
    {then}
    return _model()
"""


def summarized(forks: Forks, folder: Path, **finalizers: str) -> End:
    """Of ``summarize`` on a study whose model leaves an object behind, with these lines in it and after it."""
    study = write_study(folder / "study", f"factories_{folder.name.replace('-', '_')}", steps=1)
    factories = next(study.parent.glob("*.py"))
    factories.write_text(factories.read_text() + FINALIZERS.format(**finalizers))
    return forks("summarize", study, "--out", folder / "out", "-q")


@pytest.mark.parametrize(("sent", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_R4_ctrl_c_that_falls_into_a_finalizer_is_not_lost(
    forks: Forks, tmp_path: Path, sent: str, status: int
) -> None:
    kill = f"os.kill(os.getpid(), signal.{sent})"
    end = summarized(forks, tmp_path, at_the_end=kill, then="del ends; time.sleep(60)")
    assert end.status == status, end.output
    assert "interrupted" in end.output
    assert "Exception ignored" not in end.output
    assert end.seconds < 60


def test_R4_nothing_is_told_of_what_ctrl_c_left_half_made(forks: Forks, tmp_path: Path) -> None:
    end = summarized(forks, tmp_path, at_the_end="raise KeyError('half made')", then="raise KeyboardInterrupt")
    assert end.status == 130, end.output
    assert "interrupted" in end.output
    assert "half made" not in end.output


def test_what_else_goes_wrong_in_a_finalizer_is_still_told(forks: Forks, tmp_path: Path) -> None:
    end = summarized(forks, tmp_path, at_the_end="raise KeyError('a mistake')", then="del ends")
    assert end.status == 0, end.output
    assert "a mistake" in end.output


def test_R4_a_kernel_that_does_not_start_is_told(tmp_path: Path, monkeypatch) -> None:
    broken = tmp_path / "jupyter" / "kernels" / "broken"
    broken.mkdir(parents=True)
    (broken / "kernel.json").write_text('{"argv": ["/bin/false"], "display_name": "B", "language": "python"}')
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    prepared = prepare(notebook(tmp_path / "n.ipynb", "print(1)", kernel="broken"), {}, {})
    with pytest.raises(NotebookFailed, match="before the first cell: RuntimeError: Kernel died"):
        prepared.execute(tmp_path)


def test_cells_that_are_meant_to_fail_or_to_be_skipped_do_not_count(tmp_path: Path) -> None:
    path = notebook(tmp_path / "n.ipynb", "1 / 0", "raise SystemError", "", "print('end')")
    node = nbformat.read(path, as_version=4)
    node.cells[1].metadata["tags"], node.cells[2].metadata["tags"] = ["raises-exception"], ["skip-execution"]
    nbformat.write(node, path)
    executed = prepare(path, {}, {}).execute(tmp_path)
    assert executed.cells[-1].outputs[0].text == "end\n"
