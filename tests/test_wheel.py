"""The wheel, built and installed elsewhere, renders the same report as the checkout: the template travels inside."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import hoanalysis as ho
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
    assert {"hoanalysis/notebooks/report.ipynb", "hoanalysis/notebooks/tour.ipynb"} <= set(names)
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "hoanalysis").rglob("*.py")}
    assert {n for n in names if n.endswith(".py")} == modules


def test_an_installed_wheel_renders_the_same_report(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel)
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
