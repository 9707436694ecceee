"""`ho.explore`: a run to play with in JupyterLab, and the same views as figures anywhere else.

State (plain values), figures (pure functions of Datasets and state) and wiring (ipywidgets) are apart: `state`;
`estimates`, `session`, `words`, `figures`; `widgets`. `background` fills a store while the explorer looks at it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xarray as xr

from hoanalysis.errors import ArgumentError
from hoanalysis.explorer.session import Session
from hoanalysis.explorer.state import State

__all__ = ["State", "explore"]


def explore(
    source: Any,
    run: Any = None,
    order: int | None = None,
    *,
    store: str | os.PathLike[str] | None = None,
    others: Mapping[str, xr.Dataset] | None = None,
    state: Mapping[str, Any] | State | None = None,
    **options: Any,
) -> Any:
    """Explore a run: sliders in JupyterLab, a static picture wherever nobody can move them.

    Parameters
    ----------
    source
        A summary Dataset, or the path of one (netCDF, Zarr, store); or a `Problem`, with ``run`` and ``store``: then
        what is missing in the store is computed in the background while the explorer shows what is there; or the path
        of a ``study.toml`` (or its folder), whose first summaries are computed in this way into ``store``.
    run, order, options
        With a `Problem`, as for `summarize_run` (order 2 by default).
    store
        The folder of the store that is filled. It can be stopped at any time, and filled further by the same call.
    others
        Runs to compare with: name -> summary Dataset along the same direction.
    state
        What is shown first, the choices of `State` that differ from the defaults, such as ``explorer.state`` of
        another explorer: ``{"step": 120, "matrix": "inverse", "grouping": "layer"}``.

    Returns
    -------
    Explorer
        Displayed by Jupyter. ``.figure()`` is the picture as a matplotlib Figure, ``.sentence`` says what it shows,
        ``.state`` is what is chosen (set it to choose), ``.code`` the line that makes the same figure.

    Raises
    ------
    ArgumentError, SchemaError
        ``source`` holds no summaries, or a choice is unknown.
    """
    from hoanalysis.explorer.widgets import Explorer

    chosen = State.of(state)
    expression = ""
    if isinstance(source, str | os.PathLike):
        if (study := _study_at(Path(source))) is not None:
            source, run, order, options = _of_study(study, run, order, options)
        else:
            from hoanalysis.store import open_dataset

            expression, source = f"ho.open_dataset({os.fspath(source)!r})", open_dataset(source)
    if isinstance(source, xr.Dataset):
        unused = {"run": run, "order": order, "store": store, **options}
        if given := [name for name, value in unused.items() if value is not None]:
            raise ArgumentError(
                f"a Dataset is explored without {' and '.join(given)}=",
                do="pass the choices in state={...}, or a ho.Problem to compute summaries",
            )
        return Explorer(Session(source, others), chosen, source=expression)
    if run is None or store is None:
        kind = type(source).__name__
        raise ArgumentError(
            f"there is nothing to explore in a {kind} alone",
            do="pass a Dataset (ho.open_dataset(path)), or a ho.Problem with run= and store=",
        )
    from hoanalysis.explorer.background import Filling

    filling = Filling(source, run, order, store, options)
    return Explorer(Session(filling.dataset(), others), chosen, filling)


def _study_at(path: Path) -> Path | None:
    """The study file at a path: the file itself, or the one in the folder; None where there is none."""
    if path.suffix == ".toml":
        return path
    return path / "study.toml" if (path / "study.toml").is_file() else None


def _of_study(path: Path, run: Any, order: int | None, options: dict[str, Any]) -> tuple[Any, Any, int, dict[str, Any]]:
    """Problem, run, order and options of the first summaries that a study asks for; what is given goes before."""
    from hoanalysis.study import StudySpec

    spec = StudySpec.read(path)
    settings = {**spec.settings()[0], **options}
    own = settings.pop("order")
    return spec.problem(), spec.run() if run is None else run, own if order is None else order, settings
