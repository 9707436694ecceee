"""The notebooks and the runs that they open, copied to where they can be run and edited."""

from __future__ import annotations

import importlib.resources
import os
import shutil
from pathlib import Path

from hoanalysis.errors import ArgumentError, listed

NOTEBOOKS = ("tour.ipynb", "explore.ipynb", "own_model.ipynb", "report.ipynb")
RUNS = ("lenet5-mnist", "lenet5-mnist-diverged")


def copy_examples(to: str | os.PathLike[str], *, force: bool = False) -> list[Path]:
    """Copy the notebooks into ``to/notebooks`` and the runs into ``to/data``, as they lie in the repository.

    Parameters
    ----------
    to
        A folder, made where there is none.
    force
        Overwrite notebooks and runs that are there.

    Returns
    -------
    list of Path
        The notebooks, ready to be run: their relative paths hold.

    Raises
    ------
    ArgumentError
        If some are there already, with nothing copied, or if the folder cannot be written.
    """
    pairs = {source: Path(to) / place for source, place in _pairs().items()}
    if not force and (there := [str(target) for target in pairs.values() if target.exists()]):
        raise ArgumentError(
            f"there is already {listed(there, 4)}", do="choose another folder, or overwrite with --force"
        )
    try:
        for source, target in pairs.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    except OSError as error:
        raise ArgumentError(
            "the examples cannot be copied", where=str(to), why=error.strerror or str(error),
            do="choose a folder that can be written",
        ) from error  # fmt: skip
    return [target for target in pairs.values() if target.suffix == ".ipynb"]


def _pairs() -> dict[Path, Path]:
    """Each file, and where it goes below the folder: from the installed package, or from a checkout."""
    packaged = Path(str(importlib.resources.files("hoanalysis") / "notebooks"))
    checkout = Path(__file__).resolve().parents[1]
    notebooks, data = (
        (packaged, packaged / "data") if packaged.is_dir() else (checkout / "notebooks", checkout / "data")
    )
    found = {notebooks / name: Path("notebooks", name) for name in NOTEBOOKS}
    for run in RUNS:
        found |= {file: Path("data", run, file.name) for file in sorted((data / run).iterdir()) if file.is_file()}
    return found
