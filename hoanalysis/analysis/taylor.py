"""What the summaries predict that a move eta does to the loss.

    f(eta) - f(0) = sum_{d=1..order} D^(d)[eta, .., eta] / d!  + o(|eta|^order)

f moves by +U, so that a training step is ``taylor(-rates)`` (design: arXiv 2312.03885, Section 3.1).
"""

from collections.abc import Mapping
from math import factorial
from typing import Any

import numpy as np
import xarray as xr

from hoanalysis import schema
from hoanalysis.analysis.arrays import number, require, with_error
from hoanalysis.analysis.errorbars import error_over_blocks
from hoanalysis.errors import ArgumentError, SchemaError, nearest

Move = xr.DataArray | np.ndarray | Mapping[str, float] | float


def taylor(ds: xr.Dataset, eta: Move, order: int | None = None) -> xr.DataArray:
    """The predicted change of the loss, in loss, over the dims of ``eta`` other than ``group`` and those of ``ds``.

    Parameters
    ----------
    eta
        The move of each group in units of U^s, without unit: a DataArray over ``group`` and any further dims, an array
        (S,), a mapping label -> value (others stay), or one number for all groups. NaN (a group without effect) counts
        as no move, unless all are NaN.
    order
        The highest order; by default the highest whose full tensor the Dataset holds.

    Returns
    -------
    DataArray
        The coordinate ``taylor_se`` is its standard error from the kept blocks, exact because the prediction is linear
        in the tensors; NaN without blocks.

    Raises
    ------
    SchemaError
        A full tensor up to ``order`` is missing.
    ArgumentError
        ``eta`` names an unknown group or has another number of groups.
    """
    return taylor_terms(ds, eta, order).sum("order", skipna=False, keep_attrs=True).pipe(_finish, ds, eta, order)


def taylor_terms(ds: xr.Dataset, eta: Move, order: int | None = None) -> xr.DataArray:
    """The terms D^(d)[eta, .., eta] / d!, along a leading dim ``order`` = 1..order, in loss."""
    names, move = _names(ds, order), as_move(ds, eta)
    parts = [_contract(ds[name], move, d) for d, name in enumerate(names, 1)]
    terms = xr.concat(parts, xr.Variable("order", np.arange(1, len(names) + 1)), coords="minimal", compat="override")
    terms = terms.rename("taylor_terms").transpose("order", ...)
    terms.order.attrs = {"long_name": "order of the derivative", "units": ""}
    return terms.assign_attrs(long_name="term D^(d)[eta, .., eta]/d! of the predicted change", units="loss")


def _names(ds: xr.Dataset, order: int | None) -> list[str]:
    if schema.derivative(1) not in ds:
        raise SchemaError("a Taylor prediction needs D1, which the Dataset does not hold", do="summarize with order=2")
    top = highest_order(ds) if order is None else order
    if isinstance(top, bool) or not isinstance(top, int | np.integer) or top < 1:
        raise ArgumentError(f"order must be a whole number from 1 on, not {order!r}")
    names = [schema.derivative(d) for d in range(1, int(top) + 1)]
    require(ds, *names)
    return names


def highest_order(ds: xr.Dataset) -> int:
    """The highest d such that D1 to D^(d) are all held in full."""
    held = schema.orders(ds)
    return sum(d == i for i, d in enumerate(held, 1))


def as_move(ds: xr.Dataset, eta: Move) -> xr.DataArray:
    """``eta`` as a DataArray over ``group``, checked against the labels of ``ds``; NaN as 0 unless all are NaN."""
    labels = schema.labels(ds)
    if isinstance(eta, xr.DataArray) and schema.GROUP in eta.dims:
        move = _aligned(eta, labels)
    elif isinstance(eta, Mapping):
        move = _from_mapping(eta, labels)
    else:
        move = _from_array(ds, _numbers(eta), labels)
    gone = move.isnull().all(schema.GROUP)
    return move.fillna(0.0).where(~gone).reset_coords(drop=True)


def _numbers(eta: Any) -> np.ndarray:
    """As floats; `ArgumentError` for words and truth values, which numpy would take for numbers."""
    values = np.asarray(eta)
    if values.dtype.kind not in "iuf":
        raise ArgumentError(f"eta must be made of numbers, not {eta!r}")
    return values.astype(float)


def _aligned(eta: xr.DataArray, labels: list[str]) -> xr.DataArray:
    if schema.GROUP not in eta.coords:
        eta = eta.assign_coords(group=labels) if eta.sizes[schema.GROUP] == len(labels) else eta
    known = [str(g) for g in eta[schema.GROUP].values]
    if sorted(known) != sorted(labels):
        other = sorted(set(known) ^ set(labels))[:5]
        raise ArgumentError("eta is over other groups than the Dataset", where=f"groups {other}", do="use its labels")
    return eta.sel(group=labels)


def _from_mapping(eta: Mapping[str, Any], labels: list[str]) -> xr.DataArray:
    for label in eta:
        if label not in labels:
            raise ArgumentError(f"no group is called {label!r}", where="eta", do=nearest(str(label), labels))
    moves = [number(eta.get(g, 0.0), f"the move of {g!r}") for g in labels]
    return xr.DataArray(moves, dims=schema.GROUP, coords={schema.GROUP: labels})


def _from_array(ds: xr.Dataset, eta: np.ndarray, labels: list[str]) -> xr.DataArray:
    steps = ds.sizes.get(schema.STEP, 0)
    if eta.ndim == 0 or eta.shape == (len(labels),):
        return xr.DataArray(np.broadcast_to(eta, len(labels)), dims=schema.GROUP, coords={schema.GROUP: labels})
    if eta.shape == (steps, len(labels)):
        array = xr.DataArray(eta, dims=(schema.STEP, schema.GROUP), coords={schema.GROUP: labels})
        return array.assign_coords(step=ds[schema.STEP]) if schema.STEP in ds.coords else array
    expected = f"({len(labels)},)" + (f" or ({steps}, {len(labels)})" if steps else "")
    raise ArgumentError(f"eta has shape {eta.shape}, expected {expected}: one value per group")


def _contract(array: xr.DataArray, move: xr.DataArray, d: int) -> xr.DataArray:
    """D^(d)[eta, .., eta] / d!, one index after the other from the last."""
    array = array.reset_coords(drop=True)
    for dim in reversed(schema.group_dims(d)):
        array = xr.dot(array, move.rename({schema.GROUP: dim}), dim=dim)
    return array / factorial(d)


def _finish(total: xr.DataArray, ds: xr.Dataset, eta: Move, order: int | None) -> xr.DataArray:
    names = _names(ds, order)
    title = f"predicted change of the loss to order {len(names)}"
    total = total.rename("taylor").assign_attrs(long_name=title, units="loss")
    missing = [n for n in [*map(schema.blocks_of, names), schema.WEIGHT] if n not in ds.data_vars]
    if missing:
        return with_error(ds, total, np.full(total.shape, np.nan), f"because {', '.join(missing)} were not kept")
    return with_error(ds, total, block_errors(ds, as_move(ds, eta), names).transpose(*total.dims).values)


def block_errors(ds: xr.Dataset, move: xr.DataArray, names: list[str]) -> xr.DataArray:
    """The error of the mean over blocks of the same linear combination of tensors."""
    parts = [_contract(ds[schema.blocks_of(name)], move, d) for d, name in enumerate(names, 1)]
    sums: xr.DataArray = sum(parts[1:], parts[0])
    return error_over_blocks(sums, ds[schema.WEIGHT].reset_coords(drop=True))
