"""The files that describe the package agree with one another and with what is installed."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import hoanalysis as ho

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = [
    Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
]
PINS = {re.sub(r"[-_.]+", "-", r.name).lower(): next(iter(r.specifier)).version for r in CONSTRAINTS}
EXTRAS = ("test", "zarr", "dask")
DECLARED = [Requirement(r) for r in PROJECT["dependencies"]] + [
    Requirement(r) for extra in EXTRAS for r in PROJECT["optional-dependencies"][extra]
]


@pytest.mark.parametrize("requirement", DECLARED, ids=lambda r: r.name)
def test_every_dependency_is_pinned_within_its_bounds_and_installed_as_pinned(requirement: Requirement) -> None:
    pin = PINS[re.sub(r"[-_.]+", "-", requirement.name).lower()]
    assert requirement.specifier.contains(pin)
    assert Version(version(requirement.name)).public == Version(pin).public


def test_torch_is_pinned_exactly_and_nothing_is_installed_from_a_path() -> None:
    assert PINS["torch"] == "2.13.0"
    assert all(r.url is None for r in CONSTRAINTS)


def test_environment_installs_this_package_with_the_constraints() -> None:
    env = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert env["name"] == PROJECT["name"]
    pip = next(d["pip"] for d in env["dependencies"] if isinstance(d, dict))
    assert pip == ["-c constraints.txt", f"-e .[{','.join(EXTRAS)}]"]
    python = next(d for d in env["dependencies"] if isinstance(d, str) and d.startswith("python="))
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(python.partition("=")[2])
    makefile = (ROOT / "Makefile").read_text()
    assert f"-c constraints.txt -e '.[{','.join(EXTRAS)}]'" in makefile


def test_version_is_one_and_in_the_changelog() -> None:
    assert version("hoanalysis") == ho.__version__
    assert f"## {ho.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_public_name_is_there_and_has_a_docstring() -> None:
    for name in ho.__all__:
        assert getattr(ho, name).__doc__, name
    assert set(ho.__all__) <= set(dir(ho))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ho.nothing


def test_importing_the_package_loads_neither_torch_nor_matplotlib() -> None:
    code = "import hoanalysis, sys; sys.exit(any(m in sys.modules for m in ('torch', 'matplotlib', 'papermill')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
