"""The numbers behind each figure, as tidy frames or labelled arrays: pure functions of the Dataset."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from hoanalysis import schema
from hoanalysis.analysis.arrays import checkpoints, require, step_labels, tensor
from hoanalysis.analysis.coarsen import fewest, kept_share, suggest_partition
from hoanalysis.analysis.compare import compare
from hoanalysis.analysis.compare import differences as rows_of
from hoanalysis.analysis.contributions import TIMES
from hoanalysis.analysis.curvature import curvature
from hoanalysis.analysis.errorbars import moves_with_the_data
from hoanalysis.analysis.flatness import flatness
from hoanalysis.analysis.inverse import Which, matrix
from hoanalysis.analysis.laplace import laplace
from hoanalysis.analysis.pruning import saliency
from hoanalysis.analysis.regularized import Regularization
from hoanalysis.analysis.regularizer import regularizer
from hoanalysis.analysis.reinitialization import reinitialization
from hoanalysis.analysis.spectra import spectrum
from hoanalysis.analysis.steps import learning_rates
from hoanalysis.analysis.taylor import highest_order, taylor
from hoanalysis.analysis.taylor_step import taylor_step
from hoanalysis.analysis.training_log import Used as Used
from hoanalysis.analysis.training_log import used_at as used_at
from hoanalysis.analysis.triples import strongest_slice, third_slice
from hoanalysis.analysis.unsettled import unsettled
from hoanalysis.errors import ArgumentError, listed, nearest

Step = Regularization | Literal["taylor"]


def at_step(ds: xr.Dataset, step: Any = None) -> xr.Dataset:
    """The Dataset of one checkpoint: ``"first"``, ``"last"`` (computed ones; the default is the last), or its step."""
    if schema.STEP not in ds.dims:
        return ds
    labels = step_labels(ds)
    if step in (None, "first", "last"):
        done = [i for i, one in enumerate(checkpoints(ds)) if np.isfinite(one[schema.LOSS].values).all()] or [0]
        return ds.isel({schema.STEP: done[0] if step == "first" else done[-1]})
    if step not in labels:
        raise ArgumentError(f"there is no checkpoint at step {step!r}", do=f"use one of {listed(labels)}")
    return ds.isel({schema.STEP: labels.index(step)})


def first_and_last(ds: xr.Dataset) -> list[xr.Dataset]:
    """The first and the last computed checkpoint, or the only one."""
    first, last = at_step(ds, "first"), at_step(ds, "last")
    return [first] if step_labels(first) == step_labels(last) else [first, last]


def step_of(one: xr.Dataset) -> Any:
    """The step of the Dataset of one checkpoint, or None."""
    return one[schema.STEP].item() if schema.STEP in one.coords else None


def errors_told(ds: xr.Dataset) -> str:
    """What the standard errors along the gradient are of, for the words beside marks; empty along other directions."""
    if ds.attrs.get("direction") != "gradient":
        return ""
    if moves_with_the_data(ds):
        return "errors with u held fixed, too small along the gradient"
    return "unconditional errors, with what the data do through u"


def matrix_at(
    ds: xr.Dataset, which: Which, step: Any = None, regularization: Regularization = None, epsilon: float = 1.0
) -> xr.DataArray:
    """H-bar, its inverse or the scale-free H-bar at one checkpoint, (S, S), with its error as a coordinate."""
    return matrix(at_step(ds, step), which, regularization, epsilon)


def third_at(ds: xr.Dataset, group: str | None, step: Any, scale_free: bool) -> xr.DataArray | None:
    """D3[:, :, group] at one checkpoint, (S, S), raw or scale-free, with its error; None without the full D3.

    By default the group whose scale-free slice has the largest sum of sizes.
    """
    if "D3" not in ds or not {"D1", "D2"} <= set(ds.data_vars):
        return None
    one = at_step(ds, step)
    labels = schema.labels(one)
    if group is not None and group not in labels:
        raise ArgumentError(f"no group is called {group!r}", where="group", do=nearest(str(group), labels))
    return third_slice(one, labels.index(group) if group is not None else strongest_slice(one), scale_free)


ALONE = "one checkpoint: give other=, a Dataset to compare it with"


def compared(ds: xr.Dataset, other: xr.Dataset | None, step: Any) -> xr.Dataset | None:
    """`compare` with another Dataset at the last step of both, or of the first with the last step; None of one step."""
    if other is None and ds.sizes.get(schema.STEP, 1) < 2:
        return None
    both = (ds, ds) if other is None else (ds, other)
    return compare(*both, step if step is not None else ("first", "last") if other is None else "last")


def place(found: xr.Dataset, side: str) -> str:
    """What `compare` calls ``"a"`` or ``"b"``: its step, where it has one."""
    return f"step {found[f'step_{side}'].item()}" if f"step_{side}" in found.coords else side


def differences(found: xr.Dataset, top: int) -> pd.DataFrame:
    """``label, quantity, value`` of the most significant differences b - a, in standard errors of each."""
    frame = rows_of(found)
    frame = frame[np.isfinite(frame["significance"])].head(top)
    columns = {"label": labels_of(frame), "quantity": frame["quantity"], "value": frame["difference"] / frame["se"]}
    return pd.DataFrame(columns).reset_index(drop=True)


def labels_of(frame: pd.DataFrame) -> list[str]:
    """``D2 of a x b`` for rows with ``quantity``, ``group``, ``group2``, ..: how figures name entries."""
    groups = frame[[c for c in frame.columns if str(c).startswith(schema.GROUP)]].to_numpy(object)
    named = [TIMES.join(g for g in map(str, row) if g) for row in groups]
    quantities = frame["quantity"].str.replace("_", " ")
    return [f"{q} of {names}" if names else q for q, names in zip(quantities, named, strict=True)]


def open_signs(ds: xr.Dataset, step: Any, top: int) -> pd.DataFrame:
    """``label, quantity, times`` of the entries of D1, D2 and the rates whose sign is open, the nearest first."""
    frame = unsettled(at_step(ds, step))
    frame = frame[frame["quantity"].isin(("D1", "D2", "learning_rates"))]
    frame = frame[np.isfinite(frame["times"])].sort_values("times", kind="stable").head(top)
    columns = {"label": labels_of(frame), "quantity": frame["quantity"], "times": frame["times"]}
    return pd.DataFrame(columns).reset_index(drop=True)


def put_back(ds: xr.Dataset, step: Any = None) -> pd.DataFrame:
    """Re-initialised groups at one checkpoint: ``step, group, quantity, value, se``; predictions by order, measured."""
    one = at_step(ds, step)
    found = reinitialization(one)
    orders = [found.sel(order=d) for d in found["order"].values]
    parts = [by_group(one, f"predicted, order {f['order'].item()}", f["predicted"], f["predicted_se"]) for f in orders]
    if "measured" in found:
        parts.append(by_group(one, "measured", found["measured"], found["measured_se"]))
    return pd.concat(parts, ignore_index=True)


def changed(ds: xr.Dataset, other: xr.Dataset | None, step: Any, quantity: str) -> tuple[xr.DataArray | None, str]:
    """The difference of a matrix with its error and a title; or None, and why there is none."""
    if quantity not in ("scale_free", "D2"):
        raise ArgumentError(f"no matrix {quantity!r} is compared", do=nearest(quantity, ["scale_free", "D2"]))
    found = compared(ds, other, step)
    if found is None:
        return None, ALONE
    if quantity not in found:
        return None, "D1 or D2 is not held by both"
    when = [place(found, x) for x in "ab"]
    array = found[quantity].assign_coords({f"{quantity}_se": found[f"{quantity}_se"]})
    title = str(array.attrs["long_name"])
    return array, f"{title[0].upper()}{title[1:]}, from {when[0]} to {when[1]}"


def removal(ds: xr.Dataset, step: Any = None) -> pd.DataFrame:
    """OBD, OBS and measured changes of the groups at one checkpoint: ``step, group, quantity, value, se``."""
    one = at_step(ds, step)
    found = saliency(one)
    names = {"obd": "removed alone (OBD)", "measured": "removed alone, measured", "obs": "others rescaled (OBS)"}
    parts = [by_group(one, text, found[n], found[f"{n}_se"]) for n, text in names.items() if n in found]
    some = [part for part in parts if part["value"].notna().any()]  # OBS has no minimum to go to, say: the status tells
    return pd.concat(some or parts, ignore_index=True)


def sharpness(ds: xr.Dataset) -> pd.DataFrame:
    """The curvature along the scale of each group, first and last checkpoint: ``step, group, quantity, value, se``."""
    parts = []
    for one in first_and_last(ds):
        found = flatness(one)
        parts.append(by_group(one, "sharpness", found.sharpness, found.sharpness_se))
    return pd.concat(parts, ignore_index=True)


def posterior(ds: xr.Dataset, step: Any = None, prior_precision: float = 1.0) -> pd.DataFrame:
    """The posterior standard deviation of each group's scale, by Laplace, all layers and layers independent.

    ``step, group, quantity, value, se``; the error of sd = sqrt(v) is se(v) / (2 sd).
    """
    one = at_step(ds, step)
    found = laplace(one, prior_precision)
    parts = []
    for name, text in (("covariance", "all layers"), ("block_diagonal", "layers independent")):
        sd = np.sqrt(np.diagonal(found[name].values))
        error = np.diagonal(found[f"{name}_se"].values) / (2 * sd)
        dims = (schema.GROUP,)
        parts.append(by_group(one, text, xr.DataArray(sd, dims=dims), xr.DataArray(error, dims=dims)))
    return pd.concat(parts, ignore_index=True)


def merging(ds: xr.Dataset) -> pd.DataFrame:
    """``groups, kept, se, name``: the greedy partitions of every size, then those by layer and by kind."""
    path = suggest_partition(ds, fewest(ds)).path.assign(se=np.nan, name="")
    rows = []
    for by in ("layer", "kind"):
        if by in ds.coords and len(set(ds[by].values.tolist())) < ds.sizes[schema.GROUP]:
            kept, error = kept_share(ds, by)
            rows.append({"groups": len(set(ds[by].values.tolist())), "kept": kept, "se": error, "name": by})
    return pd.concat([path, pd.DataFrame(rows)], ignore_index=True) if rows else path


def relative_errors(ds: xr.Dataset, step: Any = None) -> xr.DataArray:
    """se(D2_st) / |D2_st| at one checkpoint, (S, S), without unit."""
    one = at_step(ds, step)
    require(one, "D2", "D2_se")
    value, error = np.abs(tensor(one, "D2")), tensor(one, "D2_se")
    ratio = np.divide(error, value, out=np.full_like(value, np.nan), where=value > 0)
    array = matrix(one, "H").copy(data=ratio)
    return array.assign_attrs(long_name="relative standard error of H-bar", units="1")


def by_group(ds: xr.Dataset, name: str, value: xr.DataArray, error: xr.DataArray) -> pd.DataFrame:
    """``step, group, value, se`` of a quantity over groups; ``name`` is recorded in ``quantity``."""
    rows = []
    for step, v, e in zip(step_labels(ds), *(np.atleast_2d(a.values) for a in (value, error)), strict=True):
        rows.append(pd.DataFrame({"step": step, "group": schema.labels(ds), "quantity": name, "value": v, "se": e}))
    return pd.concat(rows, ignore_index=True)


def rates_of(one: xr.Dataset, regularization: Step = None, epsilon: float = 1.0) -> xr.Dataset:
    """`learning_rates`, or for ``"taylor"`` `taylor_step`."""
    return taylor_step(one) if regularization == "taylor" else learning_rates(one, regularization, epsilon)


def rates(ds: xr.Dataset, regularization: Step = None, epsilon: float = 1.0) -> pd.DataFrame:
    """The learning rates of the first and last checkpoint: ``step, group, quantity, value, se``."""
    parts = []
    for one in first_and_last(ds):
        found = rates_of(one, regularization, epsilon)
        parts.append(by_group(one, "learning rate", found.learning_rates, found.learning_rates_se))
    return pd.concat(parts, ignore_index=True)


def regularizers(ds: xr.Dataset) -> pd.DataFrame:
    """r of the first and last checkpoint: ``step, group, quantity, value, se``."""
    parts = []
    for one in first_and_last(ds):
        r = regularizer(one)
        parts.append(by_group(one, "r", r, r.regularizer_se))
    return pd.concat(parts, ignore_index=True)


def losses(ds: xr.Dataset) -> pd.DataFrame:
    """``step, value, se`` of the loss."""
    se = schema.error_of(schema.LOSS)
    error = ds[se].values if se in ds else np.full(np.shape(ds[schema.LOSS].values), np.nan)
    values = {"value": np.atleast_1d(ds[schema.LOSS].values), "se": np.atleast_1d(error)}
    return pd.DataFrame({"step": step_labels(ds), **values})


def slopes(ds: xr.Dataset, top: int = 8) -> pd.DataFrame:
    """D1 of the ``top`` groups where it is largest at any step: ``step, group, quantity, value, se``."""
    require(ds, "D1")
    error = ds["D1_se"] if "D1_se" in ds else ds["D1"] * np.nan
    frame = by_group(ds, "D1", ds["D1"], error)
    kept = frame.groupby("group", sort=False)["value"].agg(lambda x: x.abs().max()).nlargest(top).index
    return frame[frame["group"].isin(kept)].reset_index(drop=True)


def eigenvalues(ds: xr.Dataset) -> pd.DataFrame:
    """``step, rank, value, se`` of the compressed Hessian's eigenvalues."""
    found = spectrum(ds)
    values, errors = np.atleast_2d(found.values), np.atleast_2d(found.spectrum_se.values)
    ranks = np.arange(1, values.shape[1] + 1)
    rows = [
        pd.DataFrame({"step": step, "rank": ranks, "value": v, "se": e})
        for step, v, e in zip(step_labels(ds), values, errors, strict=True)
    ]
    return pd.concat(rows, ignore_index=True)


def hessian_of(ds: xr.Dataset, hessian: xr.Dataset | None = None) -> xr.Dataset | None:
    """What `hoanalysis.curvature` returned: as given, or as a study stored it; None without either."""
    if hessian is not None:
        return hessian
    stored = {str(n): str(n).removeprefix(schema.HESSIAN) for n in ds.data_vars if str(n).startswith(schema.HESSIAN)}
    if not stored:
        return None
    own = ds[list(stored)]  # without the coordinates of the summaries, whose names it may share: n_batches
    return own.drop_vars([c for c in own.coords if c != schema.STEP]).rename(stored)


def extremes(ds: xr.Dataset, hessian: xr.Dataset | None = None) -> pd.DataFrame:
    """``step, quantity, value, se``: the extreme eigenvalues of the full Hessian, where known, and along the groups."""
    parts = []
    full, own = hessian_of(ds, hessian), curvature(ds)
    for source, names, text in (
        (full, ("largest", "lowest"), "of the Hessian"),
        (own, ("largest", "smallest"), "along the groups"),
    ):
        if source is None:
            continue
        steps = step_labels(source) if schema.STEP in source.coords else step_labels(ds)
        for name, title in zip(names, ("largest", "lowest"), strict=True):
            value, se = (np.atleast_1d(source[n].values).astype(float) for n in (name, f"{name}_se"))
            parts.append(pd.DataFrame({"step": steps, "quantity": f"{title}, {text}", "value": value, "se": se}))
    return pd.concat(parts, ignore_index=True)


def edge(steps: Sequence[Any], used: Used, momentum: Used = None) -> NDArray[np.float64] | None:
    """Where gradient descent with the rate ``used`` becomes unstable: 2 (1 + momentum) / rate at each step.

    For the heavy ball of momentum mu; None where a rate is not known. Either is a number or the training log.
    """
    rates = [used_at(used, step) for step in steps]
    if None in rates:
        return None
    mu = [used_at(momentum, step, "momentum") or 0.0 for step in steps]
    return 2 * (1 + np.array(mu)) / np.array([float(rate or np.nan) for rate in rates])


def along_step(
    ds: xr.Dataset,
    step: Any = None,
    eta: xr.DataArray | None = None,
    points: int = 41,
    regularization: Step = None,
) -> pd.DataFrame:
    """``tau, order, value, se``: the predicted change of the loss at tau times the move, for tau in 0..2, by order.

    The move is minus the learning rates of the checkpoint, with this regularization, unless ``eta`` is given.
    """
    one = at_step(ds, step)
    move = -rates_of(one, regularization).learning_rates if eta is None else eta
    tau = xr.DataArray(np.linspace(0, 2, points), dims="tau")
    rows = []
    for order in range(1, highest_order(one) + 1):
        change = taylor(one, tau * move.reset_coords(drop=True), order)
        columns = {"tau": tau.values, "order": order, "value": change.values, "se": change["taylor_se"].values}
        rows.append(pd.DataFrame(columns))
    return pd.concat(rows, ignore_index=True)
