"""The autopsy of one step: which groups, pairs and triples, at which order, make the predicted change of the loss.

    L(theta + u) - L(theta) = sum_s D1_s + sum_s D2_ss/2 + sum_{s<t} D2_st + sum_s D3_sss/6 + sum_{s!=t} D3_sst/2
                              + sum_{s<t<v} D3_stv + what is left unexplained

for the step u that training took (eta = 1 for every group). In general a set of groups with multiplicities m_1, m_2, ..
that add up to d has the term D^(d) / (m_1! m_2! ..): every entry of the symmetric tensor is counted, so that the terms
sum to the prediction. A positive term raises the loss.
"""

from dataclasses import dataclass
from itertools import combinations_with_replacement
from math import factorial
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from hoanalysis import schema
from hoanalysis.analysis.arrays import Array, kept_blocks, require, step_labels, tensor, tensors
from hoanalysis.analysis.errorbars import error_of_mean
from hoanalysis.analysis.prediction import prediction, single_steps
from hoanalysis.analysis.taylor import highest_order
from hoanalysis.analysis.verdict import Break, break_of, shares_of, suspects, verdict
from hoanalysis.errors import ArgumentError, SchemaError, listed

NUMBERS = ("predicted", "predicted_se", "measured", "measured_se", "unexplained", "unexplained_se")
TIMES = " \N{MULTIPLICATION SIGN} "


@dataclass(frozen=True)
class Autopsy:
    """What is known of one step. Changes are in loss, ``<name>_se`` their standard errors (NaN without kept blocks).

    ``terms`` has a row per term, the largest first: ``order``, ``groups`` (a tuple of labels, sorted as in the
    Dataset, repeated as the index is), ``term`` (its name), ``value``, ``se``. Their sum is ``predicted``, and
    ``measured`` = ``predicted`` + ``unexplained``. ``shares`` has a row per group, the one that raised the loss most
    first: ``share`` (each term split equally among its indices; the shares sum to ``predicted``), ``share_se``,
    ``slope`` = D1_s, ``curvature`` = D2_ss and ``overshoot`` = -D2_ss / D1_s: over 2 the group would have raised the
    loss even alone. ``suspects`` and ``verdict`` are those of `analysis.verdict`, about the whole series.
    """

    step: Any
    to_step: Any
    terms: pd.DataFrame
    shares: pd.DataFrame
    predicted: float
    predicted_se: float
    measured: float
    measured_se: float
    unexplained: float
    unexplained_se: float
    broke: Break | None
    suspects: pd.DataFrame
    verdict: list[str]


def autopsy(
    ds: xr.Dataset,
    step: Any = None,
    *,
    gradient: xr.Dataset | None = None,
    weights: xr.Dataset | None = None,
    log: pd.DataFrame | None = None,
) -> Autopsy:
    """The terms of one real step, and what the whole series says about who broke the run.

    Parameters
    ----------
    ds
        A series along ``to:next``, best of order 3, with consecutive single-step checkpoints where it matters.
    step
        The step to look into. None: the step where the run broke, where that is a single step of training; otherwise
        the single step whose loss rose most.
    gradient, weights
        The same checkpoints along these directions: with them the verdict knows the learning rates, the momentum and
        the weight decay that the checkpoints show.
    log
        The training log, with columns ``step`` and ``learning_rate``.

    Raises
    ------
    SchemaError
        D1 or D2 is missing, or ``ds`` is not a series along ``to:next``.
    ArgumentError
        There is no checkpoint at ``step``, or it is not computed.

    Source: the Taylor expansion of arXiv 2312.03885, Section 3.1, term by term.
    """
    require(ds, schema.LOSS, "D1", "D2")
    if schema.STEP not in ds.dims or ds.attrs.get("direction") != "to:next":
        raise SchemaError(
            "an autopsy needs a series of checkpoints along the steps that training took",
            why=f"the direction is {ds.attrs.get('direction')!r}",
            do="summarize the run with direction='to:next'",
        )
    told = prediction(ds)
    broke = break_of(ds, gradient)
    at = _position(ds, step, broke, told)
    one, found = ds.isel(step=at), told.isel(step=at, order=-1)
    numbers = {str(n): float(found[n]) for n in NUMBERS}
    ranking = suspects(ds, gradient, weights, broke)
    labels = step_labels(ds)
    following = labels[at] + float(found["steps"]) if np.isfinite(found["steps"]) else np.nan
    return Autopsy(
        step=labels[at],
        to_step=following,
        terms=terms(one),
        shares=shares(one),
        broke=broke,
        suspects=ranking,
        verdict=verdict(ranking, broke, log),
        **numbers,
    )


def _position(ds: xr.Dataset, step: Any, broke: Break | None, told: xr.Dataset) -> int:
    labels = step_labels(ds)
    done = [i for i in range(len(labels)) if np.isfinite(ds["D1"].isel(step=i).values).all()]
    if not done:
        raise ArgumentError("no step of this series is computed", do="compute the summaries first")
    if step is None:
        if broke is not None and broke.single and broke.position in done:
            return broke.position
        rise = told["measured"].values
        return max(single_steps(ds), key=lambda i: rise[i] if np.isfinite(rise[i]) else -np.inf)
    if step not in labels or labels.index(step) not in done:
        known = [labels[i] for i in done]
        raise ArgumentError(f"there is no step that starts at {step!r}", do=f"use one of {listed(known)}")
    return labels.index(step)


def terms(one: xr.Dataset) -> pd.DataFrame:
    """The terms of the step of one checkpoint, the largest first: ``order, groups, term, value, se``."""
    names = np.array(schema.labels(one), dtype=object)
    parts = []
    for d in range(1, highest_order(one) + 1):
        index = np.array(list(combinations_with_replacement(range(len(names)), d)))
        divisor = np.array([_multiplicity(row) for row in index])
        value, se = _entries(one, d, index, divisor)
        parts.append(
            pd.DataFrame(
                {
                    "order": d,
                    "groups": [tuple(names[row]) for row in index],
                    "term": [TIMES.join(names[row]) for row in index],
                    "value": value,
                    "se": se,
                }
            )
        )
    frame = pd.concat(parts, ignore_index=True)
    order = frame["value"].abs().sort_values(ascending=False, kind="stable").index
    return frame.loc[order].reset_index(drop=True)


def _multiplicity(row: Array) -> int:
    """m_1! m_2! .. of the repeated indices."""
    return int(np.prod([factorial(int(n)) for n in np.unique(row, return_counts=True)[1]]))


def _entries(one: xr.Dataset, d: int, index: Array, divisor: Array) -> tuple[Array, Array]:
    name, at = schema.derivative(d), tuple(index.T)
    value = tensor(one, name)[at] / divisor
    blocks = kept_blocks(one, [name])
    if blocks is None:
        return value, np.full(len(value), np.nan)
    return value, error_of_mean(blocks.means(name)[(slice(None), *at)] / divisor, blocks.weight)


def shares(one: xr.Dataset) -> pd.DataFrame:
    """What each group adds to the predicted change: sum_d (1/d!) sum_{t..} D^(d)[s,t,..], which sums to the prediction.

    Columns ``group, share, share_se, slope, curvature, overshoot``; the group that raises the loss most first.
    """
    names = [schema.derivative(d) for d in range(1, highest_order(one) + 1)]
    share, blocks = shares_of(tensors(one, names)), kept_blocks(one, names)
    error = np.full(len(share), np.nan)
    if blocks is not None:
        means = {n: blocks.means(n) for n in names}
        split = np.stack([shares_of({n: m[b] for n, m in means.items()}) for b in range(len(blocks))])
        error = error_of_mean(split, blocks.weight)
    slope, curvature = tensor(one, "D1"), np.diagonal(tensor(one, "D2"))
    ratio = np.divide(-curvature, slope, out=np.full(len(slope), np.nan), where=slope != 0)
    frame = pd.DataFrame(
        {
            "group": schema.labels(one),
            "share": share,
            "share_se": error,
            "slope": slope,
            "curvature": curvature,
            "overshoot": ratio,
        }
    )
    return frame.sort_values("share", ascending=False, kind="stable").reset_index(drop=True)
