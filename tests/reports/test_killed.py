"""`report` killed, on a full and on a failing disk: whole files only, and the next call ends as if nothing had been."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import hoanalysis as ho
from hoanalysis.errors import HoError, ReportError
from hoanalysis.reports import run
from hoanalysis.reports.output import write_whole
from tests.conftest import write_study
from tests.reports.forks import Forks, files_alone
from tests.reports.notebooks import notebook

ROOT = Path(__file__).parents[2]
NAMES = ("one", "two", "three")
SERIES, KILLS = 3, 2


def state(out: Path) -> dict[str, object]:
    """Everything under ``out`` but times: pages, notebooks and units byte by byte, Datasets as numbers."""
    found: dict[str, object] = {}
    for file in sorted(p for p in out.rglob("*") if p.is_file()):
        name = str(file.relative_to(out))
        if file.suffix == ".nc":
            with xr.open_dataset(file, engine="h5netcdf") as ds:
                found[name] = ds.load().drop_attrs().to_dict()
        elif file.suffix in (".html", ".ipynb", ".unit"):
            found[name] = file.read_bytes()
        else:
            found[name] = None
    return found


def assert_same(out: Path, expected: dict[str, object]) -> None:
    made = state(out)
    assert list(made) == list(expected)
    for name, content in expected.items():
        np.testing.assert_equal(made[name], content, err_msg=name)  # NaN is NaN


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[object]:
    folder = tmp_path_factory.mktemp("killed")
    studies = [write_study(folder / name, f"factories_{name}_killed", steps=2) for name in NAMES]
    mine = notebook(folder / "n.ipynb", "print(open(dataset, 'rb').read(4))")
    return ["report", *studies, "--notebook", mine, "--quiet", "--out"]


def test_killed_at_random_and_called_again_ends_as_one_quiet_call(forks: Forks, arguments, tmp_path: Path) -> None:
    quiet = forks(*arguments, tmp_path / "quiet")
    assert quiet.status == 0, quiet.output
    expected = state(tmp_path / "quiet")
    assert [n for n in expected if n.endswith(".html")] == ["index.html", *(f"{n}/index.html" for n in sorted(NAMES))]
    draw, killed = random.Random(0), 0
    for series in range(SERIES):
        out = tmp_path / str(series)
        for _ in range(KILLS):
            end = forks(*arguments, out, signal=signal.SIGKILL, seconds=draw.uniform(0, quiet.seconds))
            assert end.status in (-signal.SIGKILL, 0), end.output
            killed += end.status != 0
        last = forks(*arguments, out)
        assert last.status == 0, last.output
        assert_same(out, expected)
    assert killed >= SERIES


def test_killed_before_each_file_operation_leaves_whole_files_and_the_next_call_mends(
    forks: Forks, arguments, tmp_path: Path
) -> None:
    """With the numbers at hand and a page of another day: each file is the old or the new one, whole."""
    (_, one, two, _, *rest), out = arguments, tmp_path / "out"
    call = ["report", one, two, *rest, out]
    assert forks(*call).status == 0
    operations = ("fsync", "rename", "mkdir")
    assert forks(*call, operations=operations).status == 0  # as its notebooks were not executed, its pages are others
    new = state(out)
    page = out / "two" / "index.html"
    n, end = 0, None
    while end is None or end.status:
        n += 1
        page.write_bytes(b"old")
        end = forks(*call, operations=operations, n=n)
        assert end.status in (0, -signal.SIGKILL), end.output
        assert page.read_bytes() in (b"old", new["two/index.html"])
        for file in out.rglob("*.ipynb"):
            assert file.read_bytes() == new[str(file.relative_to(out))]
    assert n > 20
    assert_same(out, new)


@pytest.fixture
def without_kernel(monkeypatch) -> None:
    monkeypatch.setattr(run.Prepared, "execute", run.Prepared.execute)  # put back what files_alone replaces
    monkeypatch.setattr(run, "compute", run.compute)


FAULTS = [("write", errno.ENOSPC, "the disk is full"), ("fsync", errno.EIO, "input/output error"),
          ("rename", errno.EACCES, "permission denied")]  # fmt: skip


@pytest.mark.parametrize(("operation", "number", "words"), FAULTS)
def test_R5_each_operation_that_fails_is_a_sentence_and_leaves_whole_files(
    tmp_path: Path, monkeypatch, without_kernel, operation: str, number: int, words: str
) -> None:
    studies = [write_study(tmp_path / n, f"factories_{n}_r5_{operation}", steps=1) for n in ("one", "two")]
    out, mine = tmp_path / "out", notebook(tmp_path / "n.ipynb", "print(1)")
    ho.report(studies, out, mine, progress=False)
    files_alone()
    ho.report(studies, out, mine, progress=False)
    pages = {p: p.read_bytes() for p in out.rglob("*.html")}
    real, n, calls = getattr(os, operation), 0, 0

    def failing(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == n:
            raise OSError(number, os.strerror(number))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, operation, failing)
    told: list[str] = []
    while calls >= n:  # until a call has no n-th operation
        n, calls = n + 1, 0
        try:
            ho.report(studies, out, mine, progress=False)
        except HoError as error:
            told.append(str(error))
        for page, content in pages.items():
            assert page.read_bytes() == content or (page.parent == out and page.read_text().endswith("</html>\n"))
        assert not list(out.rglob(".hoanalysis*"))
    assert all(words in text for text in told)
    assert n - 1 >= len(told) >= n - 3 > 5  # an index that could not be written after the first study was later
    assert {p: p.read_bytes() for p in pages} == pages


def test_R5_a_page_is_whole_or_not_there(tmp_path: Path, monkeypatch) -> None:
    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(ReportError, match=r"cannot write index\.html: the disk is full") as caught:
        write_whole(tmp_path / "index.html", "<p>page</p>")
    assert "run the same call again" in caught.value.do
    assert list(tmp_path.iterdir()) == []


PROGRAM = """
import os, sys
from pathlib import Path
import hoanalysis as ho
from hoanalysis.errors import HoError

study, short, long, disk = map(Path, sys.argv[1:5])
out = disk / "out"
ho.report(study, out, short, progress=False, say=lambda line: None)
old = (out / "index.html").read_bytes()
try:
    with open(disk / "filler", "wb", buffering=0) as f:
        while True:
            f.write(bytes(4096))
except OSError:
    pass
os.truncate(disk / "filler", os.path.getsize(disk / "filler") - 160_000)  # room for the netCDF, not for the notebook
try:
    ho.report(study, out, long, progress=False, say=lambda line: None)
except HoError as error:
    print(error.what)
print((out / "index.html").read_bytes() == old, sorted(p.name for p in out.iterdir()))
os.system(f"mount -o remount,ro {disk}")
for where in (out, disk / "new"):
    try:
        ho.report(study, where, short, progress=False, say=lambda line: print("computed"))
    except HoError as error:
        print(error.what)
"""


def test_R5_a_full_and_a_read_only_disk(study: Path, tmp_path: Path) -> None:
    """Real ones: a small file system in memory, in a name space of its own."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "program.py").write_text(PROGRAM)
    mount = f"mount -t tmpfs -o size=2m tmpfs '{tmp_path}/disk'"
    if (
        shutil.which("unshare") is None
        or subprocess.run(["unshare", "-Urm", "sh", "-c", mount], check=False).returncode
    ):
        pytest.skip("a file system cannot be mounted here")
    short = notebook(tmp_path / "short.ipynb", "print('a page')")
    long = notebook(tmp_path / "long.ipynb", "print('long ' * 100_000)")
    command = [sys.executable, *(tmp_path / "program.py", study, short, long, tmp_path / "disk")]
    shell = f"{mount} && cd '{ROOT}' && PYTHONPATH=\"$PWD:$PYTHONPATH\" " + " ".join(f"'{r}'" for r in command)
    out = subprocess.run(["unshare", "-Urm", "sh", "-c", shell], stdout=subprocess.PIPE, text=True, check=True)
    assert out.stdout.splitlines() == [
        "cannot write report.ipynb: the disk is full",
        "True ['index.html', 'report.ipynb', 'store', 'summaries.nc']",
        "the output folder cannot be written",
        "the output folder cannot be written",
    ]
