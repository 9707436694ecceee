"""What the summaries say about a run, in sentences: the top of a report. Plain text; ± is one standard error."""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import pandas as pd
import xarray as xr

from hoanalysis import schema
from hoanalysis.analysis.arrays import Array, checkpoints, require, require_order, step_labels, tensor
from hoanalysis.analysis.autopsy import Autopsy, autopsy
from hoanalysis.analysis.groups import system
from hoanalysis.analysis.interactions import interactions, shares
from hoanalysis.analysis.merge import merge
from hoanalysis.analysis.prediction import NEXT, prediction, single_steps
from hoanalysis.analysis.regularizer import third
from hoanalysis.analysis.spectra import spectrum
from hoanalysis.analysis.steps import learning_rates
from hoanalysis.analysis.training_log import used_at
from hoanalysis.analysis.verdict import Break, best_multiple
from hoanalysis.errors import SchemaError, listed

CLEAR = 2.0  # standard errors from 0 at which an entry is told from 0
UPHILL = ("gradient", "momentum", "adam")  # a training step is minus a learning rate times one of these


def findings(
    ds: xr.Dataset, log: pd.DataFrame | None = None, others: Mapping[str, xr.Dataset] | None = None
) -> list[str]:
    """Sentences about the run, most general first: numbers with their standard errors, names as the model gives them.

    Parameters
    ----------
    ds
        Summaries of one checkpoint or of a series; checkpoints not computed yet are counted and left out.
    log
        The training log, with columns ``step`` and ``learning_rate``, where the rates that the run used are known.
    others
        The same checkpoints along other directions, by direction: with ``to:next`` the steps that training took are
        judged, with ``gradient`` and ``weights`` beside it the learning rates, momentum and weight decay they show.

    Returns
    -------
    list of str
        Plain text, not escaped: what the run did; where it broke and who did it, and whether its steps were predicted;
        the strongest pair of layers; how much of H-bar lies off its diagonal and off its layers; the learning rates
        beside the one used; groups without effect, with r = 0, or not told from 0; negative curvature; how good the
        numbers are.
    """
    require(ds, schema.LOSS)
    require_order(ds)
    log = log if log is not None and "learning_rate" in log else None
    labels, done = step_labels(ds), _done(ds)
    if not done:
        return [f"None of {len(labels)} checkpoint{'s' * (len(labels) != 1)} is computed yet."]
    first, last = (_at(ds, labels, i) for i in (done[0], done[-1]))
    ends = [first] if done[0] == done[-1] else [first, last]
    said: Iterable[str] = [
        _run(ds, labels, done),
        *_steps({str(ds.attrs.get("direction")): ds, **(others or {})}, log),
        _strongest_pair(*last),
        _off_diagonal(ends),
        *[_rates(*end, log) for end in ends if ds.attrs.get("direction") in UPHILL],
        _null(*last),
        _without_r(*last),
        _not_told_from_zero(*last),
        _curvature(*last),
        _quality(ds, labels, done),
    ]
    return [sentence for sentence in said if sentence]


Place = tuple[str, xr.Dataset]


def _done(ds: xr.Dataset) -> list[int]:
    held = [n for n in (schema.LOSS, "D1", "D2") if n in ds]
    return [i for i, one in enumerate(checkpoints(ds)) if all(np.isfinite(one[n].values).any() for n in held)]


def _at(ds: xr.Dataset, labels: list, i: int) -> Place:
    one = checkpoints(ds)[i]
    return (f"At step {labels[i]}" if schema.STEP in ds.coords else "At this checkpoint"), one


def pm(value: float, error: float, percent: bool = False, sign: bool = False) -> str:
    """A number with its standard error, to two digits of the error.

    >>> pm(2.34567, 0.0123)
    '2.346 ± 0.012'
    >>> pm(0.4567, 0.0123, percent=True)
    '45.7 ± 1.2 %'
    >>> pm(2.5, float("nan"))
    '2.5 (no standard error)'
    """
    unit, plus = " %" if percent else "", "+" if sign else ""
    value, error = (100 * value, 100 * error) if percent else (value, error)
    if not np.isfinite(error):
        return f"{value:{plus}.3g}{unit} (no standard error)"
    if error == 0 or not np.isfinite(value):
        return f"{value:{plus}.4g} ± {error:.2g}{unit}"
    digits = 1 - int(np.floor(np.log10(error)))
    if not -1 <= digits <= 5:
        return f"{value:{plus}.3g} ± {error:.2g}{unit}"
    return f"{value:{plus}.{max(digits, 0)}f} ± {error:.{max(digits, 0)}f}{unit}"


def _error(one: xr.Dataset, name: str) -> Array:
    se = schema.error_of(name)
    return tensor(one, se) if se in one else np.full(one[name].shape, np.nan)


def _run(ds: xr.Dataset, labels: list, done: list[int]) -> str:
    loss = np.atleast_1d(ds[schema.LOSS].values)
    errors = np.atleast_1d(_error(ds, schema.LOSS))
    told = {i: pm(loss[i], errors[i]) for i in (done[0], done[-1])}
    if len(done) == 1:
        where = f" at step {labels[done[0]]}" if schema.STEP in ds.coords else ""
        return f"The loss{where} is {told[done[0]]}.{_missing(ds, labels, done)}"
    best = done[int(np.nanargmin(loss[done]))]
    lowest = "" if best == done[-1] else f"; it was lowest at step {labels[best]}, {pm(loss[best], errors[best])}"
    return (
        f"From step {labels[done[0]]} to step {labels[done[-1]]} ({len(done)} checkpoints) the loss went from "
        f"{told[done[0]]} to {told[done[-1]]}{lowest}.{_missing(ds, labels, done)}"
    )


def _steps(series: Mapping[str, xr.Dataset], log: pd.DataFrame | None) -> list[str]:
    """What the series along ``to:next`` says of the steps that training took; nothing without one."""
    ds = series.get(NEXT)
    if ds is None or schema.STEP not in ds.dims or not {"D1", "D2"} <= set(ds.data_vars) or not single_steps(ds):
        return []
    found = autopsy(ds, gradient=series.get("gradient"), weights=series.get("weights"), log=log)
    return [*found.verdict, _worst(found), *_predicted(ds, found.broke), *_best(ds, log)]


def _worst(found: Autopsy) -> str:
    rows = found.terms.head(3)
    sizes = [pm(value, se, sign=True) for value, se in rows[["value", "se"]].to_numpy(float)]
    named = zip(rows["term"], sizes, rows["order"], strict=True)
    largest = ", ".join(f"{term} {size} (order {order})" for term, size, order in named)
    return (
        f"The step from {found.step:g} to {found.to_step:g} changed the loss by {pm(found.measured, found.measured_se)}"
        f"; the summaries predict {pm(found.predicted, found.predicted_se)} and leave "
        f"{pm(found.unexplained, found.unexplained_se)} unexplained. Their largest terms are {largest}."
    )


def _predicted(ds: xr.Dataset, broke: Break | None) -> list[str]:
    """How well the steps were predicted: before the break and from it on, where there is one."""
    told, steps = prediction(ds), np.array(single_steps(ds))
    cut = None if broke is None else broke.position
    parts = (
        [("", steps)]
        if cut is None
        else [(" before the break", steps[steps < cut]), (" from the break on", steps[steps >= cut])]
    )
    return [text for when, part in parts if (text := _predicted_of(told.isel(step=part), when))]


def _predicted_of(told: xr.Dataset, when: str) -> str:
    known = np.isfinite(told["measured"].values)
    if not known.any():
        return ""
    within = told["within"].transpose("order", "step").values[:, known].mean(axis=1)
    shares = ", ".join(f"{share:.0%}" for share in within)
    error = np.abs(told["unexplained"].transpose("order", "step").values[:, known])
    better = f"; the last order is nearer than the one before in {(error[-1] < error[-2]).mean():.0%}"
    what = "single step" if (told["steps"].values == 1).all() else "move from checkpoint to checkpoint"
    what = what if known.sum() == 1 else what.replace("step", "steps").replace("move", "moves")
    return (
        f"Of {known.sum()} {what}{when}, the Taylor prediction comes within 10 % of the measured change of the loss in "
        f"{shares} at the orders 1 to {len(within)}{better if len(within) > 1 else ''}.{_reach(told)}"
    )


def _reach(told: xr.Dataset) -> str:
    reach = told["reach"].transpose("order", "step").values
    if not np.isfinite(reach).any():
        return ""
    low, high = (told[n].transpose("order", "step").values for n in ("reach_low", "reach_high"))
    each = ", ".join(_between(*map(_median, row)) for row in zip(reach, low, high, strict=True))
    return f" It does so up to {each} times the step in the median (in brackets: within 2 standard errors)."


def _median(values: Array) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else float("nan")


def _between(value: float, low: float, high: float) -> str:
    return f"{value:.2g} ({low:.2g} to {high:.2g})" if np.isfinite([low, high]).all() else f"{value:.2g}"


def _best(ds: xr.Dataset, log: pd.DataFrame | None) -> list[str]:
    """The learning rate used against the one needed, along the steps that training took, rate by rate of the log."""
    steps = single_steps(ds)
    used = np.array([used_at(log, step_labels(ds)[i]) or np.nan for i in steps], dtype=float)
    best = np.array([best_multiple(ds.isel(step=i)) for i in steps])
    rates = list(dict.fromkeys(used.tolist()))
    if np.isnan(used).any() or len(rates) > REGIMES:
        return _best_of(best, None, len(rates) > REGIMES and not np.isnan(used).any())
    return [text for rate in rates for text in _best_of(best[used == rate], rate, False)]


REGIMES = 3  # rates in the log that are told one by one; more are a schedule


def _best_of(best: Array, rate: float | None, schedule: bool) -> list[str]:
    known = np.isfinite(best)
    if not known.any():
        return []
    at = "" if rate is None else f" at a learning rate of {rate:.2g}"
    middle, spread = np.median(best[known]), _error_of_median(best[known])
    text = (
        f"Of the {len(best)} steps taken{at}, {known.sum()} start downhill on the given data and {(best < 1).sum()} "
        f"are longer than what lowers its loss most: the best multiple is {pm(middle, spread)} in the median"
    )
    if rate is not None:
        return [f"{text}, a learning rate of {pm(rate * middle, rate * spread)}."]
    return [f"{text}, times the rate that the log has at each." if schedule else f"{text}."]


def _error_of_median(values: Array) -> float:
    """sqrt(pi/2) of the error of the mean, from the middle 68 %, over the steps."""
    if len(values) < 2:
        return float("nan")
    low, high = np.quantile(values, [0.1587, 0.8413])
    return float(np.sqrt(np.pi / 2 / len(values)) * (high - low) / 2)


def _missing(ds: xr.Dataset, labels: list, done: list[int]) -> str:
    """Checkpoints that are not there, but for those that cannot be: the last one has no next one."""
    gaps = np.atleast_1d(ds["gap"].values).astype(str) if "gap" in ds.coords else np.full(len(labels), "")
    gone = [labels[i] for i in range(len(labels)) if i not in done and not gaps[i]]
    return f" {len(gone)} of {len(labels)} checkpoints are not computed: steps {listed(gone, 5)}." if gone else ""


def _strongest_pair(where: str, one: xr.Dataset) -> str:
    if not {"D1", "D2"} <= set(one.data_vars) or "layer" not in one.coords:
        return ""
    pairs = interactions(merge(one, "layer"), top=1)
    if pairs.empty:
        return ""
    row = pairs.iloc[0]
    told = abs(row["scale_free"]) / row["scale_free_se"] if row["scale_free_se"] > 0 else np.nan
    doubt = " and is not told from 0" if told < CLEAR else f", {told:.0f} standard errors from 0" if told > 0 else ""
    return (
        f"{where} the layers {row['group']!r} and {row['group2']!r} interact most: their scale-free entry of the "
        f"pseudo-Hessian is {pm(row['scale_free'], row['scale_free_se'])}{doubt}, {row['share']:.0%} of the sum of all "
        "entries' sizes between and within layers."
    )


def _off_diagonal(ends: list[Place]) -> str:
    held = all({"D1", "D2"} <= set(one.data_vars) for _, one in ends)
    layers = ends[0][1]["layer"].values if "layer" in ends[0][1].coords else schema.labels(ends[0][1])
    if not held or len(set(layers)) < 2:
        return ""
    parts = []
    for where, one in ends:
        s = shares(one)
        off, apart = (pm(s[n].item(), s[f"{n}_se"].item(), True) for n in ("off_diagonal", "off_block"))
        parts.append(f"{off} lies off its diagonal and {apart} between different layers {where[0].lower()}{where[1:]}")
    return (
        f"Of the scale-free pseudo-Hessian (sizes of entries), {'; '.join(parts)}. A method that treats layers one by "
        f"one leaves out what lies between them."
    )


def _rates(where: str, one: xr.Dataset, log: pd.DataFrame | None) -> str:
    if not {"D1", "D2"} <= set(one.data_vars):
        return ""
    found = learning_rates(one)
    rates, errors = found.learning_rates.values, found.learning_rates_se.values
    known = np.isfinite(rates)
    status = "; ".join(line.split(":")[0] for line in found.status.item().split("\n"))
    if not known.any():
        return f"{where} no learning rate can be computed ({status})."
    middle = np.median(rates[known])
    negative = int((rates[known] < 0).sum())
    text = (
        f"{where} the learning rates that solve H-bar eta = g-bar run from {_extreme(rates, errors, np.nanargmin)} to "
        f"{_extreme(rates, errors, np.nanargmax)}, median {middle:.3g}; {negative} of {known.sum()} are negative "
        f"(status: {status})."
    )
    return text + _beside_used(
        rates[known], errors[known], used_at(log, one[schema.STEP].item() if schema.STEP in one.coords else None)
    )


def _extreme(rates: Array, errors: Array, pick: Callable[[Array], np.intp]) -> str:
    i = int(pick(rates))
    return pm(rates[i], errors[i])


def _beside_used(rates: Array, errors: Array, used: float | None) -> str:
    if used is None:
        return ""
    if not np.isfinite(errors).any():
        return f" The run used {used:.3g}: {int((rates > used).sum())} of {len(rates)} groups ask for more."
    above, below = rates - CLEAR * errors > used, rates + CLEAR * errors < used
    open_ = len(rates) - above.sum() - below.sum()
    return (
        f" The run used {used:.3g}: {above.sum()} groups ask for more and {below.sum()} for less by over {CLEAR:g} "
        f"standard errors, {open_} cannot be told apart from it."
    )


def _names(one: xr.Dataset, mask: Array) -> list[str]:
    return [g for g, yes in zip(schema.labels(one), mask, strict=True) if yes]


def _null(where: str, one: xr.Dataset) -> str:
    if not {"D1", "D2"} <= set(one.data_vars):
        return ""
    names = _names(one, system(one).null)
    return f"{where} {listed(names)} have no effect on the loss beyond rounding." if names else ""


def _without_r(where: str, one: xr.Dataset) -> str:
    try:
        r = tensor(one, third(one))
    except SchemaError:
        return ""
    names = _names(one, (np.einsum("sss->s", r) if r.ndim == 3 else r) == 0)
    return f"{where} the regularizer r is exactly 0 for {listed(names)}." if names else ""


def _not_told_from_zero(where: str, one: xr.Dataset) -> str:
    if not {"D1", "D2", "D2_se"} <= set(one.data_vars):
        return ""
    value, error = np.diagonal(tensor(one, "D2")), np.diagonal(tensor(one, "D2_se"))
    names = _names(one, system(one).used & (np.abs(value) < CLEAR * error))
    if not names:
        return ""
    return f"{where} the curvature along {listed(names)} is within {CLEAR:g} standard errors of 0."


def _curvature(where: str, one: xr.Dataset) -> str:
    if "D2" not in one or "direction_norm" not in one.coords:
        return ""
    found = spectrum(one)
    values, errors = (v[np.isfinite(found.values)] for v in (found.values, found.spectrum_se.values))
    if not len(values):
        return ""
    scale = np.abs(values).max()
    negative = int((values < -1e-10 * scale).sum())
    top = f"the largest is {pm(values[0], errors[0])} loss/parameter^2, a lower bound on the Hessian's"
    if not negative:
        return f"{where} all {len(values)} eigenvalues of the Hessian compressed to the directions are positive; {top}."
    told = "not told from 0" if -values[-1] < CLEAR * errors[-1] else "the loss curves downwards there"
    return (
        f"{where} {negative} of {len(values)} eigenvalues of the Hessian compressed to the directions "
        f"{'are' if negative > 1 else 'is'} negative, the lowest {pm(values[-1], errors[-1])}: {told}; {top}."
    )


def _quality(ds: xr.Dataset, labels: list, done: list[int]) -> str:
    parts = [_median_error(ds, name) for name in ("D1", "D2")]
    if "self_check" in ds.coords or "self_check" in ds:
        worst = np.nanmax(np.append(np.asarray(ds["self_check"].values, float), -np.inf))
        parts.append(f"the self-check of the derivatives differs by at most {worst:.1e}" if worst >= 0 else "")
    coverage = float(ds.attrs.get("coverage", np.nan))
    parts.append(f"coverage is {coverage:.0%}" if np.isfinite(coverage) else "")
    told = [p for p in parts if p]
    if not told:
        return "The Dataset holds no standard errors and no self-check: the quality of these numbers is unknown."
    errors = str(ds.attrs.get("standard_errors", "conditional on the direction"))
    return f"Quality: {'; '.join(told)}. Standard errors are {errors}."


def _median_error(ds: xr.Dataset, name: str) -> str:
    if name not in ds or schema.error_of(name) not in ds:
        return ""
    value, error = np.abs(tensor(ds, name)), tensor(ds, schema.error_of(name))
    known = (value > 0) & np.isfinite(error)
    return (
        f"the median relative standard error of {name} is {np.median(error[known] / value[known]):.1%}"
        if known.any()
        else ""
    )
