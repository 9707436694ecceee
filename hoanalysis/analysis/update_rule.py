"""The update rule that consecutive checkpoints show: learning rates, momentum and weight decay, from summaries alone.

SGD moves group s by u'_s = mu u_s - lr_s (g_batch + wd theta_s), u the step before. Projected on the gradient g_s of
the given data and on theta_s, both at the start of the step, every product is in the summaries of three directions:

    g.u'      = D1[s] of the next step                         (to:next)
    g.u       = the slope at the end of the step u             (to:next: slope_path at its last node where it is stored,
                                                                else D1[s] + sum_t D2[s,t] + sum_tu D3[s,t,u] / 2)
    g.g       = |g_s|^2                                        (gradient: direction_norm)
    theta.g   = -D1[s]                                         (weights)
    theta.u', theta.u, theta.theta                             (parameter_norm and direction_norm of neighbours)

    g.u'      = mu g.u     - lr_s g.g     - k theta.g          k = lr wd, one for all groups
    theta.u'  = mu theta.u - lr_s theta.g - k theta.theta

Least squares over the pairs of neighbouring steps of a chain gives mu, lr_s and k >= 0. The batch's own noise has mean
zero in both lines, so that it widens the errors: a delete-one jackknife over the pairs, to which mu adds how far the
groups disagree on it. Where k is at its bound 0, its error is that of the fit without bounds, as a bound that holds in
every replicate leaves nothing to spread. lr_s comes out low, by the share of |g_s|^2 that is the sampling noise of the
given data, which no error here counts: on LeNet-5 by up to 2 with 512 images, and by more with fewer (the attribute
``status`` says so). For another optimizer than SGD, lr_s still is the rate at which the group follows its gradient.

Where the log has the rate a_j of each step, what is fitted is lr_s as a multiple of a_j, and with it mu as PyTorch
defines it, u' = -a' v' with v' = mu v + g: a schedule that changes the rate a little at every step is divided out. A
change by more than a quarter at once is no schedule but an event, and cuts the chain.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr
from scipy.optimize import lsq_linear

from hoanalysis import schema
from hoanalysis.analysis.arrays import Array, step_labels
from hoanalysis.analysis.prediction import prediction
from hoanalysis.analysis.training_log import used_at
from hoanalysis.errors import ArgumentError

Equations = tuple[Array, Array]

PAIRS = 3  # of neighbouring steps, the fewest that are fitted: two equations a group each for S + 2 unknowns
CUT = 1.25  # between the rates of two steps in the log: above it a chain is cut, below it they are divided out
FEW = 512  # images, up to which the rates are low by a factor of 2 or more
TRUSTED = 0.5  # of the measured change: a step whose prediction is further off does not give its slope at the end


@dataclass(frozen=True)
class Chain:
    """Positions of checkpoints that follow each other in single steps; the step of each is computed."""

    positions: tuple[int, ...]

    @property
    def pairs(self) -> list[int]:
        """The positions of steps that have a step after them."""
        return list(self.positions[:-1])


def chains(ds: xr.Dataset, log: pd.DataFrame | None = None) -> list[Chain]:
    """The longest runs of consecutive single steps of a series along ``to:next``, cut where the rate in ``log`` changes
    by more than a quarter at once: one rule for each."""
    labels = np.asarray(step_labels(ds), float)
    done = np.isfinite(ds["D1"].transpose(schema.STEP, ...).values).all(axis=1)
    single = done & (np.append(np.diff(labels), np.nan) == 1)
    rate = logged_rates(log, labels)
    cut = np.append(True, np.abs(np.log(rate[1:] / rate[:-1])) > np.log(CUT))
    starts = np.flatnonzero(single & (~np.append(False, single[:-1]) | cut))
    ends = np.flatnonzero(single & (~np.append(single[1:], False) | np.append(cut[1:], True)))
    return [Chain(tuple(range(a, b + 1))) for a, b in zip(starts, ends, strict=True)]


def logged_rates(log: pd.DataFrame | None, steps: Sequence[float] | Array) -> Array:
    """The rate of each step in the log, 1 where there is none or it is not positive."""
    found = np.array([used_at(log, step) or 1.0 for step in steps], dtype=float)
    return np.where(np.isfinite(found) & (found > 0), found, 1.0)


def update_rule(
    ds: xr.Dataset, gradient: xr.Dataset, weights: xr.Dataset | None = None, log: pd.DataFrame | None = None
) -> xr.Dataset:
    """What consecutive checkpoints show of the optimizer, chain by chain of single steps.

    Parameters
    ----------
    ds
        Summaries along ``to:next``, of order 2 or more.
    gradient, weights
        Summaries of the same checkpoints along these directions. Without ``weights``, ``decay`` is NaN.
    log
        The training log, with columns ``step`` and ``learning_rate``: its changes are divided out, and cut chains where
        they are large.

    Returns
    -------
    Dataset
        Over ``chain`` (coordinates ``first`` and ``last``, the steps of its ends): ``learning_rates`` (group),
        ``learning_rate`` (one for all groups), ``momentum``, ``decay`` = lr wd per step, each with ``<name>_se``;
        ``pairs``, how many pairs of steps they come from; rates that the log changes within a chain are those at its
        mean. NaN where fewer than 3 pairs can be used: those whose first step is predicted within half of its measured
        change, all where the slope at its end was measured. A group that does not move has the rate 0. The attribute
        ``status`` advises.

    Raises
    ------
    ArgumentError
        The Datasets are not series over the same groups along these directions.
    """
    parts = _Parts(ds, gradient, weights, logged_rates(log, step_labels(ds)))
    found = chains(ds, log)
    s = ds.sizes[schema.GROUP]
    values = np.full((len(found), 2, s + 3), np.nan)
    counts = []
    for i, chain in enumerate(found):
        equations = [e for e in map(parts.equations, chain.pairs) if e is not None]
        counts.append(len(equations))
        if len(equations) >= PAIRS:
            values[i] = _fitted(equations, s) * parts.unit(chain, s)
    if weights is None:
        values[:, :, 2] = np.nan
    labels = step_labels(ds)
    data: dict = {"pairs": ("chain", np.array(counts, dtype=int), {"long_name": "pairs of steps", "units": "1"})}
    for row, suffix, title in ((0, "", "{}"), (1, "_se", "standard error of {}")):
        for k, name in enumerate(("learning_rate", "momentum", "decay")):
            data[name + suffix] = ("chain", values[:, row, k], _attrs(title, name))
        data["learning_rates" + suffix] = (("chain", schema.GROUP), values[:, row, 3:], _attrs(title, "learning_rates"))
    coords = {
        schema.GROUP: ds[schema.GROUP].values,
        "first": ("chain", np.array([labels[c.positions[0]] for c in found])),
        "last": ("chain", np.array([labels[c.positions[-1]] + 1 for c in found])),
    }
    return xr.Dataset(data, coords, {"status": _status(gradient)})


def _status(gradient: xr.Dataset) -> str:
    n = float(gradient.attrs.get("n_samples", np.nan))
    if not n <= FEW:
        return ""
    return (
        f"low rates: the gradient is over {n:g} samples, and the noise in it makes the rates come out low, by up to 2 "
        f"with {FEW} images of MNIST, by more with fewer and differently by group. Summarize on more data."
    )


def _attrs(title: str, name: str) -> dict[str, str]:
    return {"long_name": title.format(TITLES[name]), "units": "1"}


TITLES = {
    "learning_rates": "learning rate that the steps of the group show",
    "learning_rate": "learning rate that all steps show",
    "momentum": "momentum that the steps show",
    "decay": "learning rate times weight decay that the steps show",
}


class _Parts:
    """The products of all neighbouring steps, position by position."""

    def __init__(
        self, ds: xr.Dataset, gradient: xr.Dataset, weights: xr.Dataset | None, rates: Array | None = None
    ) -> None:
        self.rates = np.ones(ds.sizes[schema.STEP] if schema.STEP in ds.dims else 1) if rates is None else rates
        for name, other in (("gradient", gradient), ("weights", weights)):
            _refuse_other(ds, other, name)
        labels = list(step_labels(ds))
        gradient = gradient.sel({schema.STEP: labels})
        self.slope = _by_step(ds, "D1")
        self.end = self.slope + ds["D2"].transpose(schema.STEP, *schema.group_dims(2)).values.sum(-1)
        if "D3" in ds:
            self.end = self.end + ds["D3"].transpose(schema.STEP, *schema.group_dims(3)).values.sum((-1, -2)) / 2
        self.length = _by_step(ds, "direction_norm") ** 2
        self.gradient = _by_step(gradient, "direction_norm") ** 2
        self.size = _by_step(gradient, "parameter_norm") ** 2
        self.pull = None if weights is None else -_by_step(weights.sel({schema.STEP: labels}), "D1")
        told = prediction(ds)
        left = np.abs(told["unexplained"].transpose(schema.STEP, "order").values[:, -1])
        self.trusted = left <= TRUSTED * np.abs(told["measured"].values)
        if schema.SLOPE_PATH in ds:
            end = ds[schema.SLOPE_PATH].transpose(schema.STEP, schema.NODE, schema.GROUP).values[:, -1]
            measured = np.isfinite(end).all(axis=1)
            self.end, self.trusted = np.where(measured[:, None], end, self.end), self.trusted | measured

    def unit(self, chain: Chain, s: int) -> Array:
        """What (lr, mu, k, lr_1..lr_S) of a chain are multiples of: the mean rate of its steps in the log, mu of 1."""
        out = np.full(3 + s, self.rates[list(chain.positions)].mean())
        out[1] = 1.0
        return out

    def equations(self, i: int) -> Equations | None:
        """The equations of the steps i and i+1: coefficients (n, 2 + S) of (mu, k, lr_1..lr_S) and right sides (n,)."""
        if not self.trusted[i]:
            return None
        j = i + 1
        move, grad = np.sqrt(self.length[j]), np.sqrt(self.gradient[j])
        pull = np.zeros(len(move)) if self.pull is None else self.pull[j]
        rate, carried = self.rates[j], self.rates[j] / self.rates[i]
        along_g = _lines(self.slope[j], carried * self.end[i], rate * pull, rate * self.gradient[j], move * grad)
        if self.pull is None or j + 1 == len(self.size):
            return along_g
        before, now, after = self.size[i], self.size[j], self.size[j + 1]
        outward, kept = (after - now - self.length[j]) / 2, (now - before + self.length[i]) / 2
        along_theta = _lines(outward, carried * kept, rate * now, rate * pull, move * np.sqrt(now))
        return np.concatenate([along_g[0], along_theta[0]]), np.concatenate([along_g[1], along_theta[1]])


def _lines(value: Array, carried: Array, decayed: Array, followed: Array, scale: Array) -> Equations:
    """value_s = mu carried_s - k decayed_s - lr_s followed_s for each group s, over scale_s: the length of the step
    times that of what it is projected on, so that every group counts alike. Groups of scale 0 are left out."""
    n = len(value)
    left = np.zeros((n, 2 + n))
    left[:, 0], left[:, 1], left[np.arange(n), 2 + np.arange(n)] = carried, -decayed, -followed
    use = (scale > 0) & np.isfinite(left).all(axis=1) & np.isfinite(value)
    return left[use] / scale[use, None], value[use] / scale[use]


def _by_step(ds: xr.Dataset, name: str) -> Array:
    return np.asarray(ds[name].transpose(schema.STEP, schema.GROUP).values, float)


def _refuse_other(ds: xr.Dataset, other: xr.Dataset | None, name: str) -> None:
    if other is None:
        return
    if schema.STEP not in ds.dims or schema.STEP not in other.dims:
        raise ArgumentError("the update rule needs a series of checkpoints", do="summarize the run")
    if other.attrs.get("direction") != name:
        along = other.attrs.get("direction")
        raise ArgumentError(f"{name}= is a Dataset along {along!r}", do=f"summarize along {name!r}")
    if schema.labels(ds) != schema.labels(other) or set(step_labels(ds)) - set(step_labels(other)):
        raise ArgumentError(f"{name}= is over other groups or checkpoints", do="use the same run and partition")


def _fitted(equations: Sequence[Equations], s: int) -> Array:
    """Shape (2, 3 + S): (lr, mu, k, lr_1..lr_S) and their errors: the jackknife over pairs; of mu, which is one number
    for all groups, with the spread of what the groups show alone."""
    value, error = _jackknife(equations, s)
    if value[2] == 0:
        error[2] = _jackknife(equations, s, lowest=-np.inf)[1][2]
    error[1] = np.hypot(error[1], _disagreement(equations, s, decay=value[2]))
    return np.stack([value, error])


def _jackknife(equations: Sequence[Equations], s: int, lowest: float = 0.0) -> tuple[Array, Array]:
    value, n = _solved(equations, s, lowest), len(equations)
    without = np.array([_solved([e for j, e in enumerate(equations) if j != i], s, lowest) for i in range(n)])
    return value, np.sqrt((n - 1) / n * ((without - value) ** 2).sum(0))


def _disagreement(equations: Sequence[Equations], s: int, decay: float) -> float:
    """The standard error of the mean over groups of the mu that each shows alone; 0 for one group.

    A force that is not in the rule (other data, which push the same way again and again) looks like momentum, but like
    another one in every group; the momentum of the optimizer is the same in all.
    """
    left, right = (np.concatenate(parts) for parts in zip(*equations, strict=True))
    right = right - decay * left[:, 1]  # of one group alone, mu and k could not be told apart
    own = [left[:, 2 + g] != 0 for g in range(s)]
    alone = [np.linalg.lstsq(left[m][:, [0, 2 + g]], right[m])[0][0] for g, m in enumerate(own) if m.any()]
    return float(np.std(alone, ddof=1) / np.sqrt(len(alone))) if len(alone) > 1 else 0.0


def _solved(equations: Sequence[Equations], s: int, lowest: float = 0.0) -> Array:
    left, right = (np.concatenate(parts) for parts in zip(*equations, strict=True))
    own = _bounded(left, right, lowest)
    shared = _bounded(np.column_stack([left[:, :2], left[:, 2:].sum(1)]), right, lowest)
    return np.concatenate([shared[2:], own[:2], own[2:]])


def _bounded(left: Array, right: Array, lowest: float = 0.0) -> Array:
    """Least squares with mu and k at least ``lowest``; those that no equation has (groups that do not move) are 0."""
    has = np.abs(left).sum(0) > 0
    out = np.zeros(left.shape[1])
    lower = np.full(left.shape[1], -np.inf)
    lower[:2] = lowest
    if len(right) and has.any():
        scale = np.sqrt((left[:, has] ** 2).sum(0))
        out[has] = lsq_linear(left[:, has] / scale, right, (lower[has], np.inf), method="bvls").x / scale
    return out
