"""The curvature of the full Hessian at each checkpoint of a study, kept in its store beside the summaries.

A study asks for it with a table ``[summaries.curvature]`` of the options of `hoanalysis.curvature`: it costs tens of
Hessian-vector products a checkpoint, so that it is computed once, and a second report finds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from tqdm.auto import tqdm

from hoanalysis import schema
from hoanalysis.errors import CheckpointError, HoError, NumericsError, StoreError
from hoanalysis.store import Store


def hessians(
    run: Any, problem: Any, store: Store, options: Mapping[str, Any], progress: bool = True
) -> tuple[xr.Dataset, int, HoError | None]:
    """What `hoanalysis.curvature` says of each checkpoint, over ``step``, each name with ``hessian_`` in front.

    Also how many checkpoints were computed now, and the first error. A checkpoint that cannot be read, or whose Hessian
    is not finite, is a row of NaN with the reason in ``hessian_status``.
    """
    rows, computed, failed = [], 0, None
    for i in tqdm(range(len(run)), "checkpoints, curvature", disable=not progress, leave=False):
        row = None
        try:
            key = _key(problem, run.sha256(i), options)
            row = store.read(key)
            if row is None:
                row = _computed(problem, run[i], options)
                store.publish(key, row)
                computed += 1
        except StoreError:
            raise
        except (CheckpointError, NumericsError) as error:
            failed = failed or error
            row = xr.Dataset(attrs={"status": f"not computed: {error.what}"})
        rows.append(row)
    return _series(rows, list(run.steps)), computed, failed


def _key(problem: Any, sha256: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What the curvature of a checkpoint depends on."""
    return {
        "kind": "curvature",
        "schema": schema.SCHEMA_VERSION,
        "checkpoint": sha256,
        "data": problem.fingerprint(options.get("max_batches")),
        **problem.description(),
        **options,
    }


def _computed(problem: Any, checkpoint: Any, options: Mapping[str, Any]) -> xr.Dataset:
    from hoanalysis.hessian import curvature

    found = curvature(problem, checkpoint=checkpoint, progress=False, **options)
    return found.drop_vars("status").assign_attrs(status=str(found["status"].item()))


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
