"""Was the step predicted? The Taylor terms of a real step beside the measured change of the loss.

    predicted_d = sum_{k=1..d} D^(k)[1_S,..,1_S] / k!        measured = L(theta + u) - L(theta)

u is the step that training took (the direction ``to:next``), so that eta = 1 for every group. The measured change is
``change_along`` at tau = 1 or ``change_path`` at the end of the path where they are stored, and otherwise the loss of
the next checkpoint minus the loss of this one, both on the data of the Dataset. Errors are those of paired differences
over the kept blocks: the noise of the two losses cancels as far as the same samples are behind both. Without blocks
that of a stored change is the stored one, over the batches.
"""

from collections.abc import Sequence
from math import factorial

import numpy as np
import xarray as xr

from hoanalysis import schema
from hoanalysis.analysis.arrays import Array, checkpoints, labelled, require, require_order, step_labels
from hoanalysis.analysis.errorbars import error_over_blocks
from hoanalysis.analysis.taylor import highest_order
from hoanalysis.errors import SchemaError

WITHIN = 0.1  # of the measured change: a step counts as predicted when the prediction is this close
NEXT = "to:next"


def prediction(ds: xr.Dataset) -> xr.Dataset:
    """The predicted and the measured change of the loss over the step u, order by order, with what is left unexplained.

    Returns
    -------
    Dataset
        Over ``step`` where ``ds`` has it, and ``order`` = 1..d, in loss: ``measured``, ``predicted`` (order),
        ``unexplained`` (order) = measured - predicted, each with ``<name>_se``, paired over the kept blocks and NaN
        without them (``measured_se`` then is the stored one, where the change itself is stored). ``predicted_alone``
        (order, group): the same with the other groups held still, sum_k D^(k)[s,..,s]/k!, and ``measured_alone``
        (group) where ``change_removed`` is stored. Without unit: ``within`` (order), whether |unexplained| <= 0.1
        |measured|; ``reach`` (order), the largest tau that is stored in ``change_along`` such that the prediction at it
        and at every smaller one is as close (0 where it already fails at the smallest, NaN where ``change_along`` is
        not stored); ``reach_low`` and ``reach_high`` (order), the same with the difference taken 2 standard errors
        larger, or smaller. ``steps`` is the number of training steps that u spans.

    Raises
    ------
    SchemaError
        D1 is missing, or nothing measures the change: the direction is not ``to:next`` and ``change_along`` is not
        stored at tau = 1.

    Source: the Taylor expansion of arXiv 2312.03885, Section 3.1, at eta = 1.
    """
    top = highest_order(ds)
    require(ds, schema.LOSS, *[schema.derivative(d) for d in range(1, max(top, 1) + 1)])
    require_order(ds)
    order = xr.Variable("order", np.arange(1, top + 1), {"long_name": "order of the prediction", "units": ""})
    measured, measured_blocks, stored = _measured(ds)
    predicted, blocks = _predicted(ds, top, order)
    left = measured - predicted
    paired = None if blocks is None or measured_blocks is None else measured_blocks - blocks
    found = {
        "measured": measured.rename("measured"),
        "measured_se": stored
        if measured_blocks is None and stored is not None
        else _error(ds, measured, measured_blocks),
        "predicted": predicted,
        "predicted_se": _error(ds, predicted, blocks),
        "unexplained": left,
        "unexplained_se": _error(ds, left, paired),
        "within": _within(left, measured),
        **_reach(ds, predicted, top, order),
        "predicted_alone": _alone(ds, top, order),
        "steps": _spans(ds),
    }
    if schema.CHANGE_REMOVED in ds:
        found["measured_alone"] = ds[schema.CHANGE_REMOVED]
    return xr.Dataset({k: _named(ds, k, v) for k, v in found.items()}).assign_attrs(within=WITHIN)


def _within(left: xr.DataArray, measured: xr.DataArray) -> xr.DataArray:
    close: xr.DataArray = abs(left) <= WITHIN * abs(measured)
    return close.where(left.notnull())


TITLES = {
    "measured": ("measured change of the loss", "loss"),
    "predicted": ("predicted change of the loss up to this order", "loss"),
    "unexplained": ("measured minus predicted change of the loss", "loss"),
    "within": ("whether the prediction is within 10 % of the measured change", "1"),
    "reach": ("largest multiple of the step that is predicted within 10 %", "1"),
    "reach_low": ("largest multiple of the step that is predicted within 10 % beyond doubt", "1"),
    "reach_high": ("largest multiple of the step that may be predicted within 10 %", "1"),
    "predicted_alone": ("predicted change of the loss when the group alone takes its step", "loss"),
    "measured_alone": ("measured change of the loss when the group alone takes its step", "loss"),
    "steps": ("training steps from this checkpoint to the next", "1"),
}


def _named(ds: xr.Dataset, name: str, array: xr.DataArray) -> xr.DataArray:
    title, units = TITLES[name.removesuffix("_se")]
    title = f"standard error of {title}" if name.endswith("_se") else title
    lead = [d for d in (schema.STEP,) if d in ds.dims]
    dims = [str(d) for d in array.dims if d not in lead]
    own = {d: array.coords[d].variable for d in dims if d in array.coords}
    return labelled(ds, array.transpose(*lead, *dims).values, dims, name, title, units, **own)


def _measured(ds: xr.Dataset) -> tuple[xr.DataArray, xr.DataArray | None, xr.DataArray | None]:
    """The measured change, its sums over blocks where they are kept, and its stored error where it is stored itself."""
    for name, dim in ((schema.CHANGE_ALONG, schema.TAU), (schema.CHANGE_PATH, schema.NODE)):
        whole = np.flatnonzero(np.asarray(ds[dim].values) == 1).tolist() if name in ds else []
        if whole:
            beside = (schema.blocks_of(name), schema.error_of(name))
            kept, error = (_plain(ds[n].isel({dim: whole[0]})) if n in ds else None for n in beside)
            return _plain(ds[name].isel({dim: whole[0]})), kept, error
    if ds.attrs.get("direction") != NEXT or schema.STEP not in ds.dims:
        raise SchemaError(
            "there is no measured change of the loss to compare with",
            why=f"the direction is {ds.attrs.get('direction')!r}, and change_along at tau = 1 is not stored",
            do="summarize the run along 'to:next', or with measure='along'",
        )
    blocks = schema.blocks_of(schema.LOSS)
    paired = _difference(ds[blocks]) if blocks in ds and _same_blocks(ds) else None
    return _difference(ds[schema.LOSS]), paired, None


def _plain(array: xr.DataArray) -> xr.DataArray:
    return array.reset_coords(drop=True)


def _difference(array: xr.DataArray) -> xr.DataArray:
    """The next checkpoint's value minus this one's; NaN at the last."""
    values = array.transpose(schema.STEP, ...).values.astype(float)
    following = np.concatenate([values[1:], np.full_like(values[:1], np.nan)])
    return _plain(array.transpose(schema.STEP, ...).copy(data=following - values))


def _same_blocks(ds: xr.Dataset) -> bool:
    """Whether all computed checkpoints have the same blocks, so that differences are paired."""
    weight = ds[schema.WEIGHT].transpose(schema.STEP, ...).values
    filled = weight[(weight > 0).any(axis=1)]
    return bool(len(filled) and (filled == filled[0]).all())


def _predicted(ds: xr.Dataset, top: int, order: xr.Variable) -> tuple[xr.DataArray, xr.DataArray | None]:
    """Up to each order; and the same of the blocks where all are kept."""
    total = _cumulated([_summed(ds[schema.derivative(d)], d) for d in range(1, top + 1)], order)
    names = [schema.blocks_of(schema.derivative(d)) for d in range(1, top + 1)]
    if any(name not in ds for name in names) or schema.WEIGHT not in ds:
        return total, None
    return total, _cumulated([_summed(ds[name], d) for d, name in enumerate(names, 1)], order)


def _summed(array: xr.DataArray, d: int) -> xr.DataArray:
    return _plain(array).sum(schema.group_dims(d), skipna=False) / factorial(d)


def _cumulated(terms: Sequence[xr.DataArray], order: xr.Variable) -> xr.DataArray:
    return (
        xr.concat(list(terms), order, coords="minimal", compat="override")
        .cumsum("order", skipna=False)
        .assign_coords(order=order)
    )


def _error(ds: xr.Dataset, like: xr.DataArray, blocks: xr.DataArray | None) -> xr.DataArray:
    if blocks is None:
        return xr.full_like(like, np.nan, dtype=float)
    return error_over_blocks(blocks, _plain(ds[schema.WEIGHT])).transpose(*like.dims)


def _alone(ds: xr.Dataset, top: int, order: xr.Variable) -> xr.DataArray:
    """sum_{k<=d} D^(k)[s,..,s]/k!, from the diagonals."""
    terms = []
    for d in range(1, top + 1):
        array = _plain(ds[schema.derivative(d)]).transpose(..., *schema.group_dims(d))
        values = np.einsum(f"...{'s' * d}->...s", array.values)
        terms.append(xr.DataArray(values / factorial(d), dims=array.dims[: array.ndim - d + 1]))
    return _cumulated(terms, order).assign_coords({schema.GROUP: ds[schema.GROUP]})


def _reach(ds: xr.Dataset, predicted: xr.DataArray, top: int, order: xr.Variable) -> dict[str, xr.DataArray]:
    names = ("reach", "reach_low", "reach_high")
    if schema.CHANGE_ALONG not in ds:
        return dict.fromkeys(names, xr.full_like(predicted, np.nan))
    tau = np.asarray(ds[schema.TAU].values, float)
    forward = np.flatnonzero(tau > 0)
    left, real, error = _unexplained_along(ds, tau, forward, top, order)
    found = {}
    for name, doubt in zip(names, (0.0, 2.0, -2.0), strict=True):
        close: xr.DataArray = abs(left) + (doubt * error if doubt else 0.0) <= WITHIN * abs(real)
        reached = (close.astype(int).cumprod("tau") * real.tau).max("tau")
        found[name] = reached.where(predicted.notnull() & (error.notnull().all("tau") if doubt else True))
    return found


def _unexplained_along(
    ds: xr.Dataset, tau: Array, forward: Array, top: int, order: xr.Variable
) -> tuple[xr.DataArray, xr.DataArray, xr.DataArray]:
    """Predicted minus measured change at each tau > 0, the measured one, and the paired error of the difference."""

    def against(change: str, names: list[str]) -> tuple[xr.DataArray, xr.DataArray]:
        real = _plain(ds[change].isel(tau=forward)).assign_coords(tau=tau[forward])
        powers = [_summed(ds[name], d) * real.tau**d for d, name in enumerate(names, 1)]
        return _cumulated(powers, order) - real, real

    names = [schema.derivative(d) for d in range(1, top + 1)]
    left, real = against(schema.CHANGE_ALONG, names)
    kept = [schema.blocks_of(n) for n in (schema.CHANGE_ALONG, *names)]
    whole = all(n in ds for n in (*kept, schema.WEIGHT))
    return left, real, _error(ds, left, against(kept[0], kept[1:])[0] if whole else None)


def _spans(ds: xr.Dataset) -> xr.DataArray:
    """How many training steps lie between each checkpoint and the next; NaN at the last and where it is not told."""
    at = np.asarray(step_labels(ds), float)
    spans = np.append(np.diff(at), np.nan)
    if schema.STEP not in ds.dims:
        return xr.DataArray(np.nan)
    return xr.DataArray(spans, dims=schema.STEP)


def single_steps(ds: xr.Dataset) -> list[int]:
    """Positions of the checkpoints whose u is one step of training and is computed; of all computed where none is."""
    done = [i for i, one in enumerate(checkpoints(ds)) if np.isfinite(one["D1"].values).all()]
    spans = np.atleast_1d(_spans(ds).values)
    single = [i for i in done if spans[i] == 1]
    return single or done
