"""How curved, how badly conditioned and how negative the loss is within the span of the directions.

Of the eigenvalues lambda_1 >= .. >= lambda_n of the compressed Hessian (`spectra`), which lie within the Hessian's:

    ratio = lambda_1 / lambda_n,   condition = max |lambda| / min |lambda|,
    negative share = sum over lambda < 0 of |lambda| / sum of |lambda|

and the condition number of the equilibrated H-bar, C_st = H-bar_st / sqrt|H-bar_ss H-bar_tt|, which no rescaling of
groups changes: the one that says how well the learning rates are determined.
"""

from collections.abc import Callable

import numpy as np
import xarray as xr

from hoanalysis.analysis.arrays import Array, Tensors, error_attrs, labelled, over_checkpoints, require, tensors
from hoanalysis.analysis.errorbars import standard_error, why_none
from hoanalysis.analysis.groups import System, rounding, system
from hoanalysis.analysis.linear import condition
from hoanalysis.analysis.spectra import eigenvalues, lengths
from hoanalysis.errors import SchemaError

NAMES = ["D1", "D2"]
CLEAR = 2.0  # standard errors from 0 at which an eigenvalue is told from 0
MEASURES = {
    "largest": ("largest eigenvalue of the compressed Hessian", "loss/parameter^2"),
    "smallest": ("smallest eigenvalue of the compressed Hessian", "loss/parameter^2"),
    "ratio": ("largest over smallest eigenvalue of the compressed Hessian", "1"),
    "condition": ("condition number of the compressed Hessian", "1"),
    "condition_scale_free": ("condition number of the equilibrated H-bar", "1"),
    "negative_share": ("share of negative eigenvalues in the sum of their sizes", "1"),
}


def curvature(ds: xr.Dataset) -> xr.Dataset:
    """Numbers about the spectrum of the Hessian compressed to the directions, each with its error.

    Returns
    -------
    Dataset
        ``largest`` and ``smallest`` eigenvalue in loss/parameter^2, ``ratio`` = largest/smallest (negative where the
        loss curves both ways), ``condition`` = max |lambda| / min |lambda|, ``condition_scale_free`` that of the
        equilibrated H-bar, and ``negative_share`` in 0..1; ``<name>_se`` by the delete-one jackknife over the kept
        blocks. ``negative``: how many eigenvalues are negative beyond rounding; ``negative_clear``: how many of these
        lie more than 2 standard errors below 0 (-1 where there are no errors). ``status``, advice. The largest
        eigenvalue is a lower bound on the Hessian's, the smallest an upper bound. Groups without effect are left out.

    Raises `SchemaError` where D1, D2 or the coordinate ``direction_norm`` is missing.
    """
    require(ds, *NAMES)
    if "direction_norm" not in ds.coords:
        raise SchemaError("the curvature needs the coordinate direction_norm", do="recompute the summaries")
    parts = over_checkpoints(ds, _measures_and_errors)
    found = {}
    for i, (name, (title, units)) in enumerate(MEASURES.items()):
        found[name] = labelled(ds, parts[..., 0, i], (), name, title, units)
        error = labelled(ds, parts[..., 1, i], (), f"{name}_se", "", units)
        found[f"{name}_se"] = error.assign_attrs(error_attrs(ds, title, units, why_none(ds, ["D2"])))
    counts = over_checkpoints(ds, lambda one: np.array(_negative(one)))
    titles = {"negative": "number of negative eigenvalues", "negative_clear": "number of those that are told from 0"}
    for i, (name, title) in enumerate(titles.items()):
        found[name] = labelled(ds, counts[..., i], (), name, title, "")
    words = over_checkpoints(ds, _status)
    found["status"] = labelled(ds, words, (), "status", "advice on the curvature", "")
    return xr.Dataset(found)


def _measures_and_errors(one: xr.Dataset) -> Array:
    measure = _measures(one)
    with np.errstate(invalid="ignore"):  # an infinite ratio or condition has no error
        return np.stack([measure(tensors(one, ["D2"])), standard_error(one, ["D2"], measure)])


def _measures(one: xr.Dataset) -> Callable[[Tensors], Array]:
    """The six numbers in the order of `MEASURES`, as a function of D2; NaN where nothing is computed."""
    norm, groups = lengths(one), system(one)

    def measure(t: Tensors) -> Array:
        values = eigenvalues(t["D2"], norm)
        values = values[np.isfinite(values)]
        if not len(values):
            return np.full(len(MEASURES), np.nan)
        c = equilibrated(t["D2"], groups)
        scale_free = condition(np.linalg.eigvalsh(c)) if len(c) and np.isfinite(c).all() else np.nan
        ratio = values[0] / values[-1] if values[-1] else np.inf
        share = np.abs(values[values < 0]).sum() / (np.abs(values).sum() or 1.0)
        return np.array([values[0], values[-1], ratio, condition(values), scale_free, share])

    return measure


def equilibrated(d2: Array, groups: System) -> Array:
    """C_st = H-bar_st / sqrt|H-bar_ss H-bar_tt| over the used groups, by the diagonal of this D2 where it has one."""
    size = groups.scale_in(d2)
    return d2[np.ix_(groups.used, groups.used)] / np.outer(size, size)


def _spectrum(one: xr.Dataset) -> tuple[Array, Array]:
    norm = lengths(one)
    value = eigenvalues(tensors(one, ["D2"])["D2"], norm)
    error = standard_error(one, ["D2"], lambda t: eigenvalues(t["D2"], norm))
    return value[np.isfinite(value)], error[np.isfinite(value)]


def _negative(one: xr.Dataset) -> tuple[int, int]:
    values, errors = _spectrum(one)
    below = values < -8 * rounding(one) * np.max(np.abs(values), initial=0.0)
    clear = int((below & (values < -CLEAR * errors)).sum()) if np.isfinite(errors).any() else -1
    return int(below.sum()), clear


def _status(one: xr.Dataset) -> str:
    values, errors = _spectrum(one)
    if not len(values):
        return "not computed: entries of D2 are missing at this checkpoint."
    negative, clear = _negative(one)
    told = {-1: "without standard errors", 0: "none of them told from 0"}.get(clear, f"{clear} of them told from 0")
    lines = [f"negative curvature: {negative} of {len(values)} eigenvalues are negative, {told}."] if negative else []
    number = _measures(one)(tensors(one, ["D2"]))[list(MEASURES).index("condition_scale_free")]
    if number * rounding(one) > 1e-3:
        moved = min(number * rounding(one), 1)
        lines.append(
            f"ill-conditioned: the equilibrated condition number is {number:.1e}, so that rounding alone moves the "
            f"smallest eigenvalues by about {moved:.0%}. Compute the summaries in float64 or merge groups."
        )
    if (np.abs(values) < CLEAR * errors).any():
        lines.append(
            "not told from 0: an eigenvalue is within 2 standard errors of 0, so that ratio and condition have no "
            "upper limit. More batches would tell."
        )
    return (
        "\n".join(lines) or f"ok: all eigenvalues are positive{' and told from 0' * bool(np.isfinite(errors).all())}."
    )
