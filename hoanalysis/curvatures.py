"""The curvature of the full Hessian at each checkpoint of a study, kept in its store beside the summaries.

A study asks for it with a table ``[summaries.curvature]`` of the options of `hoanalysis.curvature`: it costs tens of
Hessian-vector products a checkpoint, so that it is computed once, and a second report finds it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from tqdm.auto import tqdm

from hoanalysis import schema
from hoanalysis.errors import CheckpointError, ClusterError, HoError, NumericsError
from hoanalysis.store import Store
from hoanalysis.store.container import canonical

if TYPE_CHECKING:
    from hoanalysis.cluster.driver import Workers

Item = tuple[int, dict[str, Any]]


def curvatures(
    run: Any,
    problem: Any,
    store: Store,
    options: Mapping[str, Any],
    progress: bool = True,
    workers: Workers | None = None,
) -> tuple[xr.Dataset, int, HoError | None]:
    """What `hoanalysis.curvature` says of each checkpoint, over ``step``, each name with ``hessian_`` in front.

    Also how many checkpoints were computed now, by this process or by ``workers``, and the error of the first that
    could not be. A checkpoint that cannot be read, or whose Hessian is not finite, is a row of NaN with the reason in
    ``hessian_status``.
    """
    from hoanalysis.summaries import refuse_replaced

    keys: dict[int, dict[str, Any]] = {}
    failed: dict[int, HoError] = {}
    for i in range(len(run)):
        try:
            keys[i] = key(problem, run.sha256(i), options)
        except CheckpointError as error:
            failed[i] = error
    wanted = {canonical(k): (i, k) for i, k in reversed(keys.items())}  # the same content is computed once
    rows = {name: there for name, (_, k) in wanted.items() if (there := store.read(k)) is not None}
    missing = [item for name, item in reversed(wanted.items()) if name not in rows]
    with closing(_made(missing, run, problem, options, workers)) as made:
        for (i, k), row in tqdm(made, "checkpoints, curvature", len(missing), disable=not progress, leave=False):
            try:
                unit = row()
                store.publish(k, unit, check=functools.partial(refuse_replaced, run, i, k))
                rows[canonical(k)] = unit
            except (CheckpointError, ClusterError, NumericsError) as error:
                failed |= {j: error for j, other in keys.items() if canonical(other) == canonical(k)}
    series = [_without(failed[i]) if i in failed else rows[canonical(keys[i])] for i in range(len(run))]
    computed = sum(i not in failed for i, _ in missing)
    return _series(series, list(run.steps)), computed, failed[min(failed)] if failed else None


def key(problem: Any, sha256: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What the curvature of a checkpoint depends on."""
    return {
        "kind": "curvature",
        "schema": schema.SCHEMA_VERSION,
        "checkpoint": sha256,
        "data": problem.fingerprint(options.get("max_batches")),
        **problem.description(),
        **options,
    }


def computed(problem: Any, checkpoint: Any, options: Mapping[str, Any]) -> xr.Dataset:
    """The unit of a checkpoint."""
    from hoanalysis.hessian import curvature

    found = curvature(problem, checkpoint=checkpoint, progress=False, **options)
    return found.drop_vars("status").assign_attrs(status=str(found["status"].item()))


def _made(
    items: list[Item], run: Any, problem: Any, options: Mapping[str, Any], workers: Workers | None
) -> Generator[tuple[Item, Callable[[], xr.Dataset]]]:
    """The units of the items: computed here when they are called for, or by workers as these finish."""
    if workers is not None:
        yield from workers.curvatures(items, run, options)
        return
    for i, k in items:
        yield (i, k), functools.partial(_of_run, problem, run, i, options)


def _of_run(problem: Any, run: Any, position: int, options: Mapping[str, Any]) -> xr.Dataset:
    return computed(problem, run[position], options)


def _without(error: HoError) -> xr.Dataset:
    return xr.Dataset(attrs={"status": f"not computed: {error.what}"})


def _series(rows: list[xr.Dataset], steps: list[int]) -> xr.Dataset:
    """The rows one after the other; NaN where one holds nothing."""
    names = list(dict.fromkeys(str(n) for row in rows for n in row.data_vars))
    data: dict[str, Any] = {}
    for name in names:
        attrs = next(row[name].attrs for row in rows if name in row)
        values = [float(row[name]) if name in row else np.nan for row in rows]
        data[schema.HESSIAN + name] = (schema.STEP, np.array(values), attrs)
    words = np.array([row.attrs["status"] for row in rows], dtype=np.str_)
    title = {"long_name": "advice on the eigenvalues of the Hessian", "units": ""}
    data[f"{schema.HESSIAN}status"] = (schema.STEP, words, title)
    return xr.Dataset(data, {schema.STEP: np.array(steps)})
