"""Where a run broke, and who did it: the signatures of faults in the summaries of its single steps.

| fault | signature | shown by |
|---|---|---|
| a group does not move | direction_norm exactly 0 while others move and its gradient is not 0 | to:next, gradient |
| a group's learning rate | the rate that its steps show is far from that of all others, which agree | update rule |
| momentum | the momentum that the steps show is over 1: steps grow without end | update rule |
| weight decay | most of a step is a pull towards 0 that halves the weights within the run | norms |
| the data | the loss climbs at first order: the steps do not go down the loss of the given data | D1 |
| overshoot | the loss climbs at the orders 2 and up: the steps are too long | D1, D2, D3 |

The first four need no rise of the loss. The last two are the two ways in which a loss can rise, and are told where the
run broke. Thresholds are the constants below, each with its reason; `benchmarks/postmortem.py` measures how often they
are right.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from math import factorial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr

from hoanalysis import schema
from hoanalysis.analysis.arrays import Array, Tensors, kept_blocks, step_labels, tensor, tensors
from hoanalysis.analysis.contributions import PATH, Shares, what_groups_did
from hoanalysis.analysis.errorbars import error_of_mean, standard_error
from hoanalysis.analysis.prediction import prediction
from hoanalysis.analysis.taylor import highest_order
from hoanalysis.analysis.training_log import used_at
from hoanalysis.analysis.update_rule import PAIRS, Chain, chains, update_rule

CLEAR = 2.0  # standard errors at which a number is told from another: the usual 95 %
#: Of the progress made until then (or of the lowest loss where that is more): a climb that large is not the noise of
#: batches, which moves the loss by a small share of what is left of it.
BREAK = 0.25
#: Steps of training after which a loss that came back below where it climbed from was a spike and no break: as many as
#: a momentum of 0.9 remembers. One step that is too long at the very start of training is none either.
SPIKE = 10
FIRST = 0.1  # of the climb: the first step that took this much is where it began
#: Between a group's learning rate and that of the others. The estimate is low by the sampling noise of the gradient, by
#: up to 2 and differently by group, and its own error is some 30 %; 5 is beyond both, and less than what breaks a run.
RATE_RATIO = 5.0
#: Of the groups, which lie within RATE_RATIO of the median and of each other: otherwise the optimizer has no rate in
#: common (Adam divides by the size of each gradient).
AGREE = 0.75
UNSTABLE = 1.0  # momentum: above it the steps grow without end, whatever the loss
PULL = 0.5  # of a step's squared length along -theta: more than half of the step forgets and less than half learns
MANY = 20  # parameters in a group, below which a step is along theta or against it by chance (1/P of its square)
HALF = 0.5  # of the climb of the loss that the first order accounts for, for the data to be the cause


class Suspect(NamedTuple):
    """One thing that could be wrong; see `suspects`."""

    kind: str
    groups: tuple[str, ...]
    step: Any
    score: float
    alarm: bool
    statement: str


@dataclass(frozen=True)
class Break:
    """From the checkpoint at ``position`` (``step``) on, the loss climbed from ``before`` to ``after`` at ``to_step``.

    ``climbs`` are the positions of the single steps of training from there to where the loss is highest, as far as they
    follow each other; there are none where the first step of the climb, to ``next_step``, is not a single one.
    """

    position: int
    step: Any
    next_step: Any
    to_step: Any
    before: float
    after: float
    climbs: tuple[int, ...]

    @property
    def single(self) -> bool:
        return bool(self.climbs)


# ---- where it broke -------------------------------------------------------------------------------------------------


def losses(ds: xr.Dataset, gradient: xr.Dataset | None = None) -> tuple[Array, Array]:
    """The loss of each checkpoint and its error; the last one's, which has no next step, from ``gradient``."""
    se = schema.error_of(schema.LOSS)
    value = ds[schema.LOSS].values.astype(float)
    error = ds[se].values.astype(float) if se in ds else np.full_like(value, np.nan)
    if gradient is not None:
        other = gradient.reindex({schema.STEP: step_labels(ds)})
        value = np.where(np.isfinite(value), value, other[schema.LOSS].values)
        error = np.where(np.isfinite(error), error, other[se].values) if se in other else error
    return value, error


def break_of(ds: xr.Dataset, gradient: xr.Dataset | None = None) -> Break | None:
    """The first climb of the loss, from its lowest value so far, that takes back a quarter of the progress and does not
    come back within 10 steps; or None."""
    loss, error = losses(ds, gradient)
    known, steps = np.flatnonzero(~np.isnan(loss)), np.asarray(step_labels(ds), float)
    for n, i in enumerate(known):
        so_far = known[: n + 1]
        low = so_far[int(np.argmin(loss[so_far]))]
        climb = loss[i] - loss[low]
        noise = CLEAR * np.nan_to_num(np.hypot(error[i], error[low]))
        if climb > BREAK * max(loss[known[0]] - loss[low], loss[low]) and climb > noise:
            path = [(int(a), int(b)) for a, b in itertools.pairwise(so_far[so_far >= low])]
            steepest = max(path, key=lambda p: loss[p[1]] - loss[p[0]])
            start, following = next((p for p in path if loss[p[1]] - loss[p[0]] >= FIRST * climb), steepest)
            soon = (steps > steps[start]) & (steps <= steps[start] + SPIKE)
            if not (loss[soon] <= loss[start]).any():
                return _broken(ds, loss, start, following, int(i))
    return None


def _broken(ds: xr.Dataset, loss: Array, start: int, following: int, seen: int) -> Break:
    labels = step_labels(ds)
    chain = next((c.positions for c in chains(ds) if start in c.positions), ())
    ahead = [i for i in chain if i >= start and np.isfinite(loss[i + 1])]
    top = max((i + 1 for i in ahead), key=lambda k: loss[k], default=seen)
    climbs = tuple(i for i in ahead if i < top)
    return Break(start, labels[start], labels[following], labels[top], float(loss[start]), float(loss[top]), climbs)


# ---- who did it -----------------------------------------------------------------------------------------------------


def suspects(
    ds: xr.Dataset,
    gradient: xr.Dataset | None = None,
    weights: xr.Dataset | None = None,
    broke: Break | None = None,
    log: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """What could be wrong with the run, the likeliest first: causes before the overshoot that they lead to.

    Columns: ``kind`` ("does not move", "learning rate", "momentum", "weight decay", "data", "overshoot"), ``groups``
    (labels, empty where it is the whole run), ``step`` (since when it is seen), ``score`` (the number over its
    threshold), ``alarm`` (whether it is beyond the threshold and told from it) and ``statement``. Needs a series along
    ``to:next``; what ``gradient`` and ``weights`` are for is left out without them.
    """
    pulls, paces = _decay(ds, chains(ds, log)), []
    found = [*_still(ds, gradient), *pulls]
    if gradient is not None:
        rule = update_rule(ds, gradient, weights, log)
        found += _rates(rule)
        paces = _momentum(rule)
    found += _told_apart(_ways(ds, broke), paces, pulls)
    found.sort(key=lambda s: (not s.alarm, s.kind == "overshoot", -s.score))
    return pd.DataFrame(found, columns=Suspect._fields)


def _still(ds: xr.Dataset, gradient: xr.Dataset | None) -> list[Suspect]:
    """Groups whose step is exactly 0, to the end, wherever another group moves: no rate but 0 leaves every entry."""
    norm = ds["direction_norm"].transpose(schema.STEP, schema.GROUP).values
    moving = np.flatnonzero((norm > 0).any(axis=1))
    labels, out = step_labels(ds), []
    for s, name in enumerate(schema.labels(ds)):
        still = moving[norm[moving, s] == 0]
        if not len(still) or (norm[moving[moving >= still[0]], s] > 0).any():
            continue
        start = labels[int(still[0])]
        size = np.nan if gradient is None else _gradient_norm(gradient, [labels[i] for i in still], s)
        if not size > 0:
            why = "has no gradient" if size == 0 else "whether it has a gradient was not computed"
            text = f"{name!r} does not move from step {start} on, and {why}."
            out.append(Suspect("does not move", (name,), start, 1.0, False, text))
            continue
        although = f", although its gradient is not 0 (norm {size:.2g})"
        text = f"{name!r} does not move at all from step {start} on{although}: its learning rate is 0."
        out.append(Suspect("does not move", (name,), start, np.inf, True, text))
    return out


def _gradient_norm(gradient: xr.Dataset, steps: list, s: int) -> float:
    return float(np.nanmedian(gradient["direction_norm"].isel(group=s).reindex({schema.STEP: steps}).values))


def _rates(rule: xr.Dataset) -> list[Suspect]:
    """Each group's rate beside the median of all; nothing where most do not agree."""
    found: dict[str, list[Suspect]] = {}
    for c in range(rule.sizes["chain"]):
        one = rule.isel(chain=c)
        rate, error = one["learning_rates"].values, one["learning_rates_se"].values
        moving = np.isfinite(rate) & (rate != 0)
        if not moving.any() or not float(one["learning_rate"]) > CLEAR * float(one["learning_rate_se"]):
            continue
        middle = float(np.median(rate[moving]))
        near = rate[moving & (rate < RATE_RATIO * middle) & (rate > middle / RATE_RATIO)]
        if middle <= 0 or len(near) < AGREE * moving.sum() or near.max() > RATE_RATIO * near.min():
            continue
        for s, name in enumerate(rule[schema.GROUP].values.astype(str)):
            if moving[s]:
                found.setdefault(str(name), []).append(_rate(str(name), rate[s], error[s], middle, one))
    return [_earliest(seen) for seen in found.values()]


def _earliest(found: list[Suspect]) -> Suspect:
    """Of several chains the first with an alarm, which says since when; else the nearest to one."""
    return next((s for s in found if s.alarm), max(found, key=lambda s: s.score))


def _rate(name: str, rate: float, error: float, middle: float, one: xr.Dataset) -> Suspect:
    score = float(abs(np.log(rate / middle)) / np.log(RATE_RATIO)) if rate > 0 else 0.0
    far = rate - CLEAR * error > RATE_RATIO * middle or rate + CLEAR * error < middle / RATE_RATIO
    first, last = one["first"].item(), one["last"].item()
    text = (
        f"From step {first} to {last} {name!r} moves with the learning rate {_pm(rate, error)}, {rate / middle:.2g} "
        f"times the {middle:.2g} of the others."
    )
    return Suspect("learning rate", (name,), first, score, bool(far), text)


def _pm(value: float, error: float, digits: str = ".2g") -> str:
    known = f"± {error:{digits if digits.endswith('f') else '.1g'}}" if np.isfinite(error) else "(no standard error)"
    return f"{value:{digits}} {known}"


def _momentum(rule: xr.Dataset) -> list[Suspect]:
    """One for each chain."""
    out = []
    for c in range(rule.sizes["chain"]):
        one = rule.isel(chain=c)
        value, error, first = float(one["momentum"]), float(one["momentum_se"]), one["first"].item()
        if np.isfinite(value):
            low = value - CLEAR * error
            text = f"From step {first} to {one['last'].item()} the steps show a momentum of {_pm(value, error, '.3f')}"
            text += ": over 1, so that they grow without end." if low > UNSTABLE else "."
            out.append(Suspect("momentum", (), first, low / UNSTABLE, low > UNSTABLE, text))
    return out


def _decay(ds: xr.Dataset, parts: Sequence[Chain]) -> list[Suspect]:
    """How much of the steps pulls the weights towards 0, and in how many steps that halves them: norms alone.

    In as many dimensions as a group has parameters, neither noise nor a gradient is that near to -theta; what pulls
    the weights of a network without gradients is slow beside the run. Groups of a few parameters are left out.
    """
    labels = step_labels(ds)
    size, move = (ds[n].transpose(schema.STEP, schema.GROUP).values ** 2 for n in ("parameter_norm", "direction_norm"))
    if "numel" in ds.coords:
        size = np.where(ds["numel"].values >= MANY, size, np.nan)
    out = []
    for chain in parts:
        pull, rate = _pull(chain, size, move)
        halving = np.log(2) / rate if rate > 0 else np.inf
        score = float(min(pull / PULL, (labels[-1] - labels[0]) / halving))
        first, last = labels[chain.positions[0]], labels[chain.positions[-1]] + 1
        text = f"From step {first} to {last} {pull:.0%} of the steps' squared length is a pull of the weights towards 0"
        text += f", which halves them in {halving:.0f} steps." if score > 1 else "."
        out.append(Suspect("weight decay", (), first, score, bool(score > 1), text))
    return [_earliest(out)] if out else []


def _pull(chain: Chain, size: Array, move: Array) -> tuple[float, float]:
    """Over the groups and steps of a chain, where theta.u < 0: sum (theta.u)^2 / |theta|^2 over sum |u|^2, and the mean
    over steps of sum |theta.u| / sum |theta|^2, the rate at which the norm of all weights shrinks."""
    along, total, rates = 0.0, 0.0, []
    for i in chain.positions:
        outward = (size[i + 1] - size[i] - move[i]) / 2
        known = np.isfinite(outward) & (size[i] > 0)
        inward = np.minimum(outward[known], 0.0)
        along += float((inward**2 / size[i][known]).sum())
        total += float(move[i].sum())
        rates.append(float(-inward.sum() / size[i][known].sum()) if known.any() else 0.0)
    return (along / total if total > 0 else 0.0), float(np.mean(rates))


# ---- the two ways in which a loss rises -----------------------------------------------------------------------------


def _ways(ds: xr.Dataset, broke: Break | None) -> list[Suspect]:
    """Whether the climb of a break is of first order (the data) or of higher orders (overshoot)."""
    if broke is None:
        return []
    if not broke.single:
        text = (
            f"The loss climbed between steps {broke.step} and {broke.next_step}, where no single steps were kept: who "
            f"did it is not seen."
        )
        return [Suspect("overshoot", (), broke.step, 0.0, False, text)]
    first, error = _first_order(ds, broke.climbs)
    climb, slopes = broke.after - broke.before, _slopes(ds, broke.climbs)
    share = first / (HALF * climb)
    data = bool(len(broke.climbs) >= PAIRS and share > 1 and first > CLEAR * np.nan_to_num(error))
    text = (
        f"From step {broke.step} to {broke.to_step} the first order adds {_pm(first, error, '+.3g')} of the "
        f"{climb:+.3g} by which the loss climbed, uphill in {int((slopes > 0).sum())} of {len(slopes)} groups"
    )
    text += ": the steps follow other data or labels than these." if data else "."
    guilty, how = _overshoot(ds, broke)
    beyond = (climb - first) / (HALF * climb)
    return [
        Suspect("data", (), broke.step, float(share), data, text),
        Suspect("overshoot", guilty, broke.step, float(beyond), bool(beyond > 1), how),
    ]


def _sums(t: Tensors) -> Array:
    """D^(d)[1_S,..,1_S] / d!, d = 1.. : the terms of the whole step."""
    return np.array([t[schema.derivative(d)].sum() / factorial(d) for d in range(1, len(t) + 1)])


def _derivatives(one: xr.Dataset) -> list[str]:
    return [schema.derivative(d) for d in range(1, highest_order(one) + 1)]


def _first_order(ds: xr.Dataset, steps: Sequence[int]) -> tuple[float, float]:
    """The slopes of all groups summed over several steps, and the error of the sum (the same blocks at every step)."""
    blocks = [kept_blocks(ds.isel(step=i), ["D1"]) for i in steps]
    total = float(_slopes(ds, steps).sum())
    kept = [b for b in blocks if b is not None]
    if len(kept) < len(blocks) or len({len(b) for b in kept}) > 1:
        return total, np.nan
    return total, float(error_of_mean(sum(b.means("D1").sum(1) for b in kept), kept[0].weight))


def _slopes(ds: xr.Dataset, steps: Sequence[int]) -> Array:
    return np.sum([tensor(ds.isel(step=i), "D1") for i in steps], axis=0)


def _overshoot(ds: xr.Dataset, broke: Break) -> tuple[tuple[str, ...], str]:
    """The groups that make half of what raised the loss at the step where it broke, and how long it had to be."""
    one, told = ds.isel(step=broke.position), prediction(ds).isel(step=broke.position)
    did = blamed(one, told)
    guilty, tied = guilty_of(did)
    names, error = np.array(schema.labels(one), dtype=object), did.error
    listed = [f"{names[s]!r} ({did.value[s]:+.2g} ± {error[s]:.1g})" for s in guilty[:4]]
    terms, sure = _sums(tensors(one, _derivatives(one))), standard_error(one, _derivatives(one), _sums)
    start = "starts downhill" if terms[0] < 0 else "already starts uphill, carried by the steps before,"
    text = (
        f"The step from {broke.step} to {broke.next_step} {start} (first order "
        f"{_pm(terms[0], sure[0], '+.3g')}, second {_pm(terms[1], sure[1], '+.3g')}); "
        f"{', '.join(listed) or 'no group'} raised the loss most{_doubt(did, names, tied)}."
    )
    best, best_se = best_multiple(one), best_multiple_error(one)
    return tuple(names[guilty]), text + (
        f" {_pm(best, best_se)} of the step would have been best." if np.isfinite(best) else ""
    )


def _doubt(did: Shares, names: Array, tied: Sequence[int]) -> str:
    """How far the blame can be trusted."""
    near = f", not told from {', '.join(repr(names[s]) for s in tied[:4])}" if tied else ""
    if did.source == PATH:
        return f"{near}, by the slopes measured along the step"
    return (
        f"{near}, by the Taylor polynomial of order {did.order}, whose errors here count what it leaves out; "
        "measure=['path'] tells without it"
    )


def blamed(one: xr.Dataset, told: xr.Dataset) -> Shares:
    """What the groups did in one step: by the path, else by the polynomial of the order that predicts it best."""
    order = best_order(told)
    return what_groups_did(one, order, float(told["unexplained"].sel(order=order)))


def guilty_of(did: Shares) -> tuple[list[int], list[int]]:
    """The groups, the first one first, that together make half of what raised the loss; and those behind them that
    are within 2 standard errors of the last of these."""
    ranked = [int(s) for s in np.argsort(-did.value, kind="stable") if did.value[s] > 0]
    so_far = np.cumsum(did.value[ranked])
    count = int((so_far - did.value[ranked] < HALF * so_far[-1]).sum()) if ranked else 0
    guilty, rest = ranked[:count], ranked[count:]
    if not guilty:
        return [], []
    last = guilty[-1]
    return guilty, [s for s in rest if did.value[last] - did.value[s] < CLEAR * did.difference_error(last, s)]


def best_order(told: xr.Dataset) -> int:
    """The order, from 2 on, whose prediction of one step is nearest to what was measured: beyond the reach of the
    Taylor polynomial its last term outgrows the others, and groups would be blamed for what it does not explain."""
    left = np.abs(told["unexplained"].values[1:])
    return int(told["order"].values[-1] if np.isnan(left).any() or not len(left) else 2 + np.argmin(left))


def best_multiple(one: xr.Dataset) -> float:
    """The smallest tau > 0 where the Taylor polynomial of L(theta + tau u) has a minimum; NaN where it starts uphill or
    has none ahead. Times the learning rate that was used, it is the one that was needed along this step."""
    return float(_turn(_sums(tensors(one, _derivatives(one)))))


def best_multiple_error(one: xr.Dataset) -> float:
    """The standard error of `best_multiple` over the kept blocks (NaN without them), with how far the polynomial of one
    order less turns elsewhere."""
    names = _derivatives(one)
    sample = float(standard_error(one, names, lambda t: _turn(_sums(t))))
    terms = _sums(tensors(one, names))
    return float(np.hypot(sample, _turn(terms) - _turn(terms[:-1]))) if len(terms) > 2 else sample


def _turn(terms: Array) -> Array:
    if not terms[0] < 0:
        return np.array(np.nan)
    roots = np.asarray(np.polynomial.Polynomial([d * float(t) for d, t in enumerate(terms, 1)]).roots())
    ahead = [float(r.real) for r in roots if abs(r.imag) <= 1e-12 * abs(r) and r.real > 0]
    return np.array(min(ahead, default=np.nan))


def _told_apart(ways: list[Suspect], paces: list[Suspect], pulls: list[Suspect]) -> list[Suspect]:
    """Momentum over 1 carries the steps uphill at first order, as other data do: where all groups show the same
    momentum over 1 it is the cause (`update_rule` counts their disagreement in its error). So does a weight decay
    that makes most of the steps."""
    if any(p.alarm for p in (*paces, *pulls)):
        ways = [w._replace(alarm=False) if w.kind == "data" else w for w in ways]
    return ways + ([_earliest(paces)] if paces else [])


SOUND = "No step broke the run, and its steps show no fault."
CLEARED = "No learning rate is to blame."
UNREAD = (
    "Learning rates and momentum were not read from its steps: that takes the gradient, and single steps of one rate."
)


# ---- in words -------------------------------------------------------------------------------------------------------


def verdict(ranking: pd.DataFrame, broke: Break | None, log: pd.DataFrame | None = None) -> list[str]:
    """The sentences of a report: where the run broke, and the statements of the alarms; that there is none."""
    said = []
    if broke is not None:
        said.append(
            f"The run broke at step {broke.step}: the loss climbed from {broke.before:.3g} to {broke.after:.3g} at "
            f"step {broke.to_step}.{_changed(broke, log)}"
        )
    read = "momentum" in set(ranking["kind"])
    alarms = ranking[ranking["alarm"]]
    said += [
        f"{row.statement} {CLEARED if read else UNREAD}" if row.kind == "data" else str(row.statement)
        for row in alarms.itertuples()
    ]
    if broke is not None and alarms.empty:
        said += list(ranking.loc[ranking["kind"].isin(("data", "overshoot")), "statement"])
    return said or [f"No step broke the run. {UNREAD}" if not read else SOUND]


def _changed(broke: Break, log: pd.DataFrame | None) -> str:
    if log is None:
        return ""
    earlier = log.dropna(subset=["learning_rate"]).query("step < @broke.step")["step"]
    before, now = used_at(log, earlier.max()) if len(earlier) else None, used_at(log, broke.step)
    if before is None or now is None or before == now:
        return ""
    return f" The log changes the learning rate there, from {before:.3g} to {now:.3g}."
