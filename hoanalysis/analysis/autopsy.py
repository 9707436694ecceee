"""The autopsy of one step: which groups, pairs and triples, at which order, make the predicted change of the loss.

With it comes what the whole series says of where the run broke, and who did it. The terms are those of
`analysis.contributions`, the signatures of faults those of `analysis.verdict`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from hoanalysis import schema
from hoanalysis.analysis.arrays import require, step_labels
from hoanalysis.analysis.contributions import shares, terms
from hoanalysis.analysis.prediction import NEXT, prediction, single_steps
from hoanalysis.analysis.verdict import Break, best_order, blamed, break_of, suspects, verdict
from hoanalysis.errors import ArgumentError, SchemaError, listed

NUMBERS = ("predicted", "predicted_se", "measured", "measured_se", "unexplained", "unexplained_se")


@dataclass(frozen=True)
class Autopsy:
    """What is known of one step. Changes are in loss, ``<name>_se`` their standard errors (NaN without kept blocks).

    ``terms`` has a row per term, the largest first: ``order``, ``groups`` (a tuple of labels, sorted as in the
    Dataset, repeated as the index is), ``term`` (its name), ``value``, ``se``. Their sum is ``predicted``, and
    ``measured`` = ``predicted`` + ``unexplained``. ``shares`` has a row per group, the one that raised the loss most
    first; see `contributions.shares`. ``shares_by`` is "path" where the slopes along the step were measured, so that
    the shares sum to the measured change, and "polynomial" elsewhere: then they are those of ``shares_order``, the
    order whose prediction is nearest to what was measured, and ``left_out`` says how far they may be off. ``suspects``
    and ``verdict`` are those of `analysis.verdict`, about the whole series.
    """

    step: Any
    to_step: Any
    terms: pd.DataFrame
    shares: pd.DataFrame
    shares_order: int
    shares_by: str
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
        The training log, with columns ``step`` and ``learning_rate``; one without the rate says nothing here.

    Raises
    ------
    SchemaError
        D1 or D2 is missing, or ``ds`` is not a series along ``to:next``.
    ArgumentError
        There is no checkpoint at ``step``, or it is not computed.

    Source: the Taylor expansion of arXiv 2312.03885, Section 3.1, term by term.
    """
    require(ds, schema.LOSS, "D1", "D2")
    if schema.STEP not in ds.dims or ds.attrs.get("direction") != NEXT:
        raise SchemaError(
            "an autopsy needs a series of checkpoints along the steps that training took",
            why=f"the direction is {ds.attrs.get('direction')!r}",
            do="summarize the run with direction='to:next'",
        )
    log = log if log is not None and "learning_rate" in log else None
    told = prediction(ds)
    broke = break_of(ds, gradient)
    at = _position(ds, step, broke, told)
    one, found = ds.isel(step=at), told.isel(step=at, order=-1)
    numbers = {str(n): float(found[n]) for n in NUMBERS}
    here = told.isel(step=at)
    did, order = blamed(one, here), best_order(here)
    ranking = suspects(ds, gradient, weights, broke, log)
    labels = step_labels(ds)
    following = labels[at] + float(found["steps"]) if np.isfinite(found["steps"]) else np.nan
    return Autopsy(
        step=labels[at],
        to_step=following,
        terms=terms(one),
        shares=shares(one, order, float(here["unexplained"].sel(order=order))),
        shares_order=order,
        shares_by=did.source,
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
