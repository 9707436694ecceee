"""Which layers the network could have back from its initialization: predicted, and measured by doing it.

The direction is u = to:init = theta_0 - theta, so that eta_s = 1 puts group s back to its initial value while the
others stay as trained, and

    predicted_s = sum_{k=1..d} D^(k)[s,..,s] / k!        measured_s = L(theta + U^s) - L(theta)

A group is *critical* where re-initialising it raises the loss, *ambient* where it does not (Zhang, Bengio and Singer
2022, "Are all layers created equal?", who measure; summaries of the partition ``layer`` are theirs). The Taylor terms
are those of a long way: where they miss the measured change, trust what was measured.
"""

from math import factorial

import numpy as np
import xarray as xr

from hoanalysis import schema
from hoanalysis.analysis.arrays import Array, error_attrs, kept_blocks, labelled, over_checkpoints, require, tensor
from hoanalysis.analysis.errorbars import error_of_mean, why_none
from hoanalysis.errors import SchemaError, listed

INIT = "to:init"
CLEAR = 2.0


def reinitialization(ds: xr.Dataset) -> xr.Dataset:
    """How the loss changes when each group alone goes back to its initial value, in loss.

    Returns
    -------
    Dataset
        Over ``step`` where ``ds`` has it: ``predicted`` (order, group), the Taylor terms up to each order that is held,
        from the full tensors or their diagonals, with ``predicted_se`` from the kept blocks; ``measured`` (group) with
        ``measured_se``, where the summaries hold it (``measure=("removed",)``); ``critical`` (group), whether the loss
        rises by more than 2 standard errors, by what was measured or else by the highest order; ``moved`` (group) =
        |theta - theta_0| / |theta| of the group; ``status``, advice.

    Raises
    ------
    SchemaError
        The direction is not ``to:init``, or D1 is missing.
    """
    direction = str(ds.attrs.get("direction", "unknown"))
    if direction != INIT:
        raise SchemaError(
            f"re-initialisation needs summaries along the direction 'to:init', and these are along {direction!r}",
            why="along it eta_s = 1 puts group s back to its initial value",
            do="summarize the run with direction='to:init', measure=('removed',)",
        )
    require(ds, "D1")
    names = _names(ds)
    orders = xr.Variable("order", np.arange(1, len(names) + 1), {"long_name": "order of the prediction", "units": ""})
    parts = over_checkpoints(ds, lambda one: _predicted(one, names))
    title = "predicted change of the loss when the group is re-initialised"
    dims = ("order", schema.GROUP)
    found = {"predicted": labelled(ds, parts[..., 0, :, :], dims, "predicted", title, "loss", order=orders)}
    found["predicted_se"] = found["predicted"].copy(data=parts[..., 1, :, :])
    found["predicted_se"].attrs = error_attrs(ds, title, "loss", why_none(ds, names))
    found |= _measured(ds)
    by = ("measured", "measured_se") if "measured" in found else ("predicted", "predicted_se")
    value, error = (found[n] if "order" not in found[n].dims else found[n].isel(order=-1) for n in by)
    rises = np.nan_to_num(value.values, nan=0.0) > CLEAR * np.nan_to_num(error.values, nan=0.0)
    text = "group whose re-initialisation raises the loss"
    found["critical"] = labelled(ds, rises, (schema.GROUP,), "critical", text, "")
    moved = over_checkpoints(ds, _moved)
    text = "length of the way from the initial value, relative to the weights"
    found["moved"] = labelled(ds, moved, (schema.GROUP,), "moved", text, "1")
    result = xr.Dataset(found)
    words = [_status(one) for one in _each(result)]
    result["status"] = labelled(ds, words if schema.STEP in ds.dims else words[0], (), "status", "advice", "")
    return result


def _names(ds: xr.Dataset) -> list[str]:
    """D1, D2, .. as far as they are held without a gap, each as the full tensor or as its diagonal."""
    names: list[str] = []
    while held := [n for n in (schema.derivative(len(names) + 1), schema.diagonal(len(names) + 1)) if n in ds]:
        names.append(held[0])
    return names


def _alone(values: Array, order: int) -> Array:
    """D^(k)[s,..,s] / k! of tensors (.., S, S, ..) or of diagonals (.., S)."""
    return values if order == 1 else np.einsum(f"...{'s' * order}->...s", values)


def _predicted(one: xr.Dataset, names: list[str]) -> Array:
    """The prediction up to each order and its error, shape (2, d, S)."""

    def terms(values: dict[str, Array]) -> Array:
        own = [_alone(values[n], 1 if n.endswith("diag") else k) / factorial(k) for k, n in enumerate(names, 1)]
        return np.cumsum(own, axis=0)

    value, blocks = terms({n: tensor(one, n) for n in names}), kept_blocks(one, names)
    if blocks is None:
        return np.stack([value, np.full_like(value, np.nan)])
    means = np.moveaxis(terms({n: blocks.means(n) for n in names}), 1, 0)
    return np.stack([value, error_of_mean(means, blocks.weight)])


def _measured(ds: xr.Dataset) -> dict[str, xr.DataArray]:
    if schema.CHANGE_REMOVED not in ds:
        return {}
    found, title = {}, "measured change of the loss when the group is re-initialised"
    se = schema.error_of(schema.CHANGE_REMOVED)
    values = over_checkpoints(ds, lambda one: tensor(one, schema.CHANGE_REMOVED))
    found["measured"] = labelled(ds, values, (schema.GROUP,), "measured", title, "loss")
    error = over_checkpoints(ds, lambda one: tensor(one, se)) if se in ds else values * np.nan
    found["measured_se"] = labelled(ds, error, (schema.GROUP,), "measured_se", "", "loss")
    found["measured_se"].attrs = error_attrs(ds, title, "loss", "" if se in ds else f"because {se} is not held")
    return found


def _moved(one: xr.Dataset) -> Array:
    if not {"direction_norm", "parameter_norm"} <= set(one.coords):
        return np.full(one.sizes[schema.GROUP], np.nan)
    way, size = (np.asarray(one[n].values, float) for n in ("direction_norm", "parameter_norm"))
    return np.divide(way, size, out=np.full_like(way, np.nan), where=size > 0)


def _each(found: xr.Dataset) -> list[xr.Dataset]:
    return [found.isel(step=i) for i in range(found.sizes[schema.STEP])] if schema.STEP in found.dims else [found]


def _status(one: xr.Dataset) -> str:
    names = np.array(schema.labels(one), dtype=object)
    last = one["predicted"].isel(order=-1).values
    if not np.isfinite(last).any():
        return "not computed: this checkpoint has no summaries along 'to:init' (the first one is the initialization)."
    critical, lines = one["critical"].values.astype(bool), []
    if critical.any():
        lines.append(f"critical: re-initialising {listed(names[critical])} raises the loss by over 2 standard errors.")
    if not critical.all():
        lines.append(f"ambient: re-initialising {listed(names[~critical])} does not raise the loss beyond its errors.")
    if "measured" not in one:
        lines.append("predicted only: the loss was not measured; summarize with measure=('removed',).")
        return "\n".join(lines)
    measured = one["measured"].values
    noise = np.hypot(*(np.nan_to_num(v) for v in (one["predicted_se"].isel(order=-1).values, one["measured_se"])))
    far = names[np.abs(last - measured) > np.maximum(np.abs(measured) / 2, CLEAR * noise)]
    if len(far):
        lines.append(
            f"far: order {one.sizes['order']} misses the measured change by more than half of it for {listed(far)}; "
            "rank them by what was measured."
        )
    return "\n".join(lines)
