"""What removing groups does to the loss, to second order: optimal brain damage and optimal brain surgeon, on groups.

The direction is u = weights = -theta, so that eta_s = 1 removes group s. With D1, D2 along it,

    OBD_s  = D1_s + D2_ss/2                        the change of the loss when s alone is removed
    OBD_st = OBD_s + OBD_t + D2_st                 when the pair is removed
    OBS_s  = min over eta with eta_s = 1 of D1.eta + eta.D2 eta/2
                                                   when s is removed and the other groups are rescaled to make up for it

OBS_s = 1/(2 (D2^-1)_ss) where D1 = 0 and D2 is positive definite. LeCun, Denker and Solla 1989; Hassibi and Stork 1992;
design: the section on pruning.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import xarray as xr

from hoanalysis import schema
from hoanalysis.analysis.arrays import Array, Tensors, error_attrs, labelled, over_checkpoints, require, tensor, tensors
from hoanalysis.analysis.errorbars import standard_error, why_none
from hoanalysis.analysis.groups import System, system
from hoanalysis.errors import SchemaError, listed

NAMES = ["D1", "D2"]
CLEAR = 2.0
SCORES = {
    "obd": ("change of the loss when the group is removed", 1),
    "obd_pair": ("change of the loss when the pair of groups is removed", 2),
    "obs": ("change of the loss when the group is removed and the others are rescaled", 1),
}


def saliency(ds: xr.Dataset) -> xr.Dataset:
    """OBD of groups and pairs and OBS of groups, in loss, to second order along u = weights.

    Returns
    -------
    Dataset
        ``obd`` (S,), ``obd_pair`` (S, S; NaN on the diagonal) and ``obs`` (S,), each with ``<name>_se`` by the
        delete-one jackknife over the kept blocks. ``obs`` is NaN where the other groups have no minimum to go to (their
        D2 is not positive definite). ``measured`` (S,) and ``measured_pair`` (S, S), with errors, the change of the
        loss after really removing groups and pairs, where it was measured (summarize with
        ``measure=("removed", "pairs")``). ``scale_invariant`` (S,): groups whose scale the loss does not depend on, as
        before a norm; they score 0 and removing them matters all the same. ``status``, advice in words.

    Raises
    ------
    SchemaError
        The direction is not ``weights``, or D1 or D2 is missing.
    """
    needs_weights(ds, "saliency", "along it eta_s = 1 removes group s")
    require(ds, *NAMES)
    found = {}
    for name, (title, order) in SCORES.items():
        parts = over_checkpoints(ds, partial(_with_error, name=name))
        value, error = np.moveaxis(parts, -1 - order, 0)
        array = labelled(ds, value, schema.group_dims(order), name, title, "loss")
        found[name] = array
        found[f"{name}_se"] = array.copy(data=error)
        found[f"{name}_se"].attrs = error_attrs(ds, title, "loss", why_none(ds, NAMES))
    found |= _measured(ds)
    null = over_checkpoints(ds, lambda one: system(one).null)
    found["scale_invariant"] = labelled(ds, null, ("group",), "scale_invariant", "group whose scale has no effect", "")
    status = over_checkpoints(ds, _status)
    found["status"] = labelled(ds, status, (), "status", "advice on removing groups", "")
    return xr.Dataset(found)


MEASURED = {"measured": (schema.CHANGE_REMOVED, "obd", 1), "measured_pair": (schema.CHANGE_REMOVED_PAIR, "obd_pair", 2)}


def _measured(ds: xr.Dataset) -> dict[str, xr.DataArray]:
    """The measured changes that the Dataset holds, under the names and with the dims of the scores."""
    found = {}
    for name, (stored, score, order) in MEASURED.items():
        if stored not in ds:
            continue
        title = f"measured {SCORES[score][0]}"
        values = over_checkpoints(ds, partial(tensor, name=stored))
        found[name] = labelled(ds, values, schema.group_dims(order), name, title, "loss")
        se = schema.error_of(stored)
        error = over_checkpoints(ds, partial(tensor, name=se)) if se in ds else values * np.nan
        found[f"{name}_se"] = labelled(ds, error, schema.group_dims(order), f"{name}_se", "", "loss")
        found[f"{name}_se"].attrs = error_attrs(ds, title, "loss", "" if se in ds else f"because {se} is not held")
    return found


def needs_weights(ds: xr.Dataset, what: str, why: str) -> None:
    """Raise `SchemaError` unless the summaries are along u = weights."""
    direction = str(ds.attrs.get("direction", "unknown"))
    if direction != "weights":
        raise SchemaError(
            f"{what} needs summaries along the direction 'weights', and these are along {direction!r}",
            why=why,
            do="summarize with direction='weights'",
        )


def obd(t: Tensors) -> Array:
    """D1_s + D2_ss/2, shape (S,)."""
    return t["D1"] + np.diagonal(t["D2"]) / 2


def obd_pair(t: Tensors) -> Array:
    """OBD_s + OBD_t + D2_st, shape (S, S), NaN on the diagonal."""
    single = obd(t)
    pair = single[:, None] + single[None, :] + t["D2"]
    np.fill_diagonal(pair, np.nan)
    return pair


def obs(t: Tensors, groups: System) -> Array:
    """min over eta with eta_s = 1 of D1.eta + eta.D2 eta/2, shape (S,), over the groups that have an effect.

    With R the other groups: OBD_s - (D1_R + D2_Rs) . D2_RR^-1 (D1_R + D2_Rs) / 2, where D2_RR is positive definite.
    """
    out, used = obd(t), np.flatnonzero(groups.used)
    for s in used:
        rest = used[used != s]
        d2 = t["D2"][np.ix_(rest, rest)] / np.outer(groups.scale[rest], groups.scale[rest])
        slope = (t["D1"][rest] + t["D2"][rest, s]) / groups.scale[rest]
        out[s] -= _gain(d2, slope)
    return np.where(groups.missing, np.nan, out)


def _gain(d2: Array, slope: Array) -> float:
    """slope . D2^-1 slope / 2; NaN where D2 is not positive definite."""
    try:
        factor = np.linalg.cholesky(d2)
    except np.linalg.LinAlgError:
        return float("nan")
    if not np.isfinite(factor).all():
        return float("nan")
    return float(np.sum(np.linalg.solve(factor, slope) ** 2) / 2)


def _with_error(one: xr.Dataset, name: str) -> Array:
    scores: dict[str, Callable[[Tensors], Array]]
    scores = {"obd": obd, "obd_pair": obd_pair, "obs": partial(obs, groups=system(one))}
    function = scores[name]
    return np.stack([function(tensors(one, NAMES)), standard_error(one, NAMES, function)])


SCALE_INVARIANT = (
    "scale-invariant: the loss does not depend on the scale of {} (weights before a norm, or without effect)"
)
ZERO = "zero weights: all entries of {} are 0"


def without_scale(one: xr.Dataset, groups: System) -> tuple[str, str]:
    """The groups along whose weights nothing happens, as words: those that have weights, and those that are 0."""
    names = np.array(schema.labels(one), dtype=object)
    norm = np.asarray(one["direction_norm"].values, float) if "direction_norm" in one.coords else np.ones(len(names))
    return tuple(listed(names[groups.null & m]) if (groups.null & m).any() else "" for m in (norm > 0, norm == 0))  # type: ignore[return-value]


def _status(one: xr.Dataset) -> str:
    groups, names = system(one), np.array(schema.labels(one), dtype=object)
    if groups.missing.all():
        return "not computed: D1 and D2 of this checkpoint are missing."
    lines = []
    scaled, zero = without_scale(one, groups)
    if scaled:
        lines.append(
            f"{SCALE_INVARIANT.format(scaled)}; their score is 0 whether or not they matter. Measure the loss with "
            f"them removed."
        )
    if zero:
        lines.append(f"{ZERO.format(zero)}: there is nothing to remove.")
    if np.isnan(obs(tensors(one, NAMES), groups)[groups.used]).any():
        lines.append(
            "no minimum: without some group the loss has no minimum along the scales of the others (D2 is not positive "
            "definite), so that OBS is NaN there. Use OBD."
        )
    lines.append(_far(one, names))
    slope = np.abs(tensor(one, "D1"))
    if np.nansum(slope) > np.nansum(np.abs(np.diagonal(tensor(one, "D2")))):
        lines.append(
            "first order: D1 is larger than D2's diagonal, so that removal to second order is a long way to go."
        )
    told = "; compare with the loss measured after removal" if schema.CHANGE_REMOVED not in one else ""
    return "\n".join(filter(None, lines)) or f"ok: scores to second order{told}."


def _far(one: xr.Dataset, names: Array) -> str:
    """Groups whose OBD misses the measured change by more than half of it, beyond the errors of both."""
    if schema.CHANGE_REMOVED not in one:
        return ""
    measured, score = tensor(one, schema.CHANGE_REMOVED), obd(tensors(one, NAMES))
    miss, se = np.abs(score - measured), schema.error_of(schema.CHANGE_REMOVED)
    noise = np.hypot(standard_error(one, NAMES, obd), tensor(one, se) if se in one else np.nan)
    far = names[miss > np.maximum(np.abs(measured) / 2, CLEAR * np.nan_to_num(noise))]
    if not len(far):
        return ""
    return f"far: OBD misses the measured change by more than half of it for {listed(far)}; rank by what was measured."
