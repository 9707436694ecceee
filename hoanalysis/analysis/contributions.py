"""What each group, pair and triple adds to the predicted change of the loss over a step u (eta = 1 for every group).

    L(theta + u) - L(theta) = sum_s D1_s + sum_s D2_ss/2 + sum_{s<t} D2_st + sum_s D3_sss/6 + sum_{s!=t} D3_sst/2
                              + sum_{s<t<v} D3_stv + .. + what is left unexplained

In general a set of groups with multiplicities m_1, m_2, .. that add up to d has the term D^(d) / (m_1! m_2! ..): every
entry of the symmetric tensor is counted, so that the terms sum to the prediction. A positive term raises the loss.
"""

from collections.abc import Mapping
from itertools import combinations_with_replacement
from math import factorial

import numpy as np
import pandas as pd
import xarray as xr

from hoanalysis import schema
from hoanalysis.analysis.arrays import Array, kept_blocks, tensor, tensors
from hoanalysis.analysis.errorbars import error_of_mean
from hoanalysis.analysis.taylor import highest_order

TIMES = " \N{MULTIPLICATION SIGN} "


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


def shares_of(t: Mapping[str, Array]) -> Array:
    """The share of each group, shape (S,): sum_d (1/d!) sum_{t..} D^(d)[s,t,..] over D1, D2, .. of one checkpoint."""
    names = [schema.derivative(d) for d in range(1, len(t) + 1)]
    return np.sum([t[n].reshape(len(t[n]), -1).sum(1) / factorial(d) for d, n in enumerate(names, 1)], axis=0)


def shares(one: xr.Dataset, order: int | None = None) -> pd.DataFrame:
    """What each group adds to the predicted change: sum_d (1/d!) sum_{t..} D^(d)[s,t,..], d = 1..order, which sums to
    the prediction of that order (by default the highest). It is the Aumann-Shapley value of the group: the integral
    over t in 0..1 of U^s . gradient(theta + t u).

    Columns ``group, share, share_se, slope, curvature, overshoot``; the group that raises the loss most first.
    """
    names = [schema.derivative(d) for d in range(1, (order or highest_order(one)) + 1)]
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
