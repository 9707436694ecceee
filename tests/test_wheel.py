"""The wheel, built and installed elsewhere, renders the same report as the checkout and runs the notebooks: these, and
the runs that they open, travel inside.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest

import hoanalysis as ho
from hoanalysis.errors import ArgumentError
from hoanalysis.examples import NOTEBOOKS, RUNS, copy_examples
from tests.conftest import write_study

ROOT = Path(__file__).parents[1]


def run(*command: object, **options) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(list(map(str, command)), text=True, capture_output=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built with the packages that are here, so without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        folder,
        ROOT,
    )
    (file,) = folder.glob("*.whl")
    return file


def test_the_wheel_holds_the_package_the_template_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.partition("/")[0] for n in names} == {"hoanalysis", f"hoanalysis-{ho.__version__}.dist-info"}
    assert {f"hoanalysis/notebooks/{name}" for name in NOTEBOOKS} == {n for n in names if n.endswith(".ipynb")}
    assert {n.split("/")[3] for n in names if "notebooks/data/" in n} == set(RUNS)
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "hoanalysis").rglob("*.py")}
    assert {n for n in names if n.endswith(".py")} == modules


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory) -> Path:
    """Where it is installed, with nothing of the checkout."""
    site = tmp_path_factory.mktemp("site")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel)
    return site


def test_an_installed_wheel_renders_the_same_report(site: Path, tmp_path: Path) -> None:
    study = write_study(tmp_path / "small", "factories_wheel", steps=2)
    env = {**os.environ, "PYTHONPATH": str(site)}
    where = "import hoanalysis.reports.execute as e; print(e.__file__, e.builtin_notebook(), sep='\\n')"
    for path in run(sys.executable, "-c", where, cwd=tmp_path, env=env).stdout.split():
        assert Path(path).is_relative_to(site)
    command = [sys.executable, "-m", "hoanalysis.cli", "report", study, "--out", tmp_path / "wheel", "--quiet"]
    run(*command, cwd=tmp_path, env=env)
    ho.report(study, tmp_path / "checkout", progress=False)
    page = (tmp_path / "wheel" / "index.html").read_bytes()
    assert page.count(b"<img") >= 8
    assert page == (tmp_path / "checkout" / "index.html").read_bytes()
    assert (tmp_path / "wheel" / "report.ipynb").read_bytes() == (tmp_path / "checkout" / "report.ipynb").read_bytes()


#: What each is run with, which makes it small, and words of its result. The other paths hold as they are.
SMALL = {
    "tour.ipynb": ({"images": 64}, "engine tangents"),
    "explore.ipynb": ({"path": "../data/few", "store": "../reports/few/store"}, "Step 40: pseudo-Hessian"),
    "own_model.ipynb": ({"batches": 2}, "transformer.h.0.attn.c_attn.bias[k]"),
}


@pytest.fixture(scope="module")
def examples(site: Path, tmp_path_factory) -> Path:
    """What `hoanalysis notebooks` of the wheel copies, and a study of two of its checkpoints on few images."""
    folder, env = tmp_path_factory.mktemp("user") / "a b", {**os.environ, "PYTHONPATH": str(site)}
    done = run(sys.executable, "-m", "hoanalysis.cli", "notebooks", folder, cwd=folder.parent, env=env)
    assert [line.rpartition(os.sep)[2] for line in done.stdout.splitlines()[:-1]] == list(NOTEBOOKS)
    for name in ("notebooks/report.ipynb", "data/lenet5-mnist-diverged/log.csv", "data/lenet5-mnist/study.toml"):
        assert (folder / name).read_bytes() == (ROOT / name).read_bytes()
    whole, few = folder / "data" / "lenet5-mnist", folder / "data" / "few"
    few.mkdir()
    for name in ("step_00000.safetensors", "step_00040.safetensors", "log.csv"):
        shutil.copy(whole / name, few)
    study = (whole / "study.toml").read_text()
    (few / "study.toml").write_text(study.replace("batch_size = 128", "batch_size = 32\nmax_samples = 64"))
    return folder


@pytest.mark.parametrize("name", SMALL)
def test_the_notebooks_of_an_installed_wheel_run(name: str, examples: Path, site: Path, tmp_path: Path) -> None:
    if name == "own_model.ipynb":
        pytest.importorskip("transformers")
    parameters, words = SMALL[name]
    notebook = nbformat.read(examples / "notebooks" / name, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell("print(ho.__file__)"))
    nbformat.write(notebook, tmp_path / "in.ipynb")
    given = [x for key, value in parameters.items() for x in ("-p", key, value)]
    run(
        sys.executable, "-m", "papermill", "--no-progress-bar", "--cwd", examples / "notebooks", tmp_path / "in.ipynb",
        tmp_path / "out.ipynb", *given, env={**os.environ, "PYTHONPATH": str(site)},
    )  # fmt: skip
    outputs = [o for c in nbformat.read(tmp_path / "out.ipynb", as_version=4).cells for o in c.get("outputs", [])]
    text = "".join(o.get("text", "") for o in outputs)
    assert words in text
    assert Path(text.split()[-1]).is_relative_to(site)


def test_examples_that_are_there_are_not_overwritten(tmp_path: Path) -> None:
    first = copy_examples(tmp_path)
    assert [p.name for p in first] == list(NOTEBOOKS)
    first[0].write_text("mine")
    with pytest.raises(ArgumentError, match=r"(?s)there is already.*--force"):
        copy_examples(tmp_path)
    assert first[0].read_text() == "mine"
    copy_examples(tmp_path, force=True)
    assert first[0].read_bytes() == (ROOT / "notebooks" / first[0].name).read_bytes()
    (tmp_path / "file").touch()
    with pytest.raises(ArgumentError, match="a folder that can be written"):
        copy_examples(tmp_path / "file" / "below")
