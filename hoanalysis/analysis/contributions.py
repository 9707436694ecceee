"""What each group, pair and triple adds to the change of the loss over a step u (eta = 1 for every group).

    L(theta + u) - L(theta) = sum_s D1_s + sum_s D2_ss/2 + sum_{s<t} D2_st + sum_s D3_sss/6 + sum_{s!=t} D3_sst/2
                              + sum_{s<t<v} D3_stv + .. + what is left unexplained

In general a set of groups with multiplicities m_1, m_2, .. that add up to d has the term D^(d) / (m_1! m_2! ..): every
entry of the symmetric tensor is counted, so that the terms sum to the prediction. A positive term raises the loss.

What a *group* added is told in two ways (`shares`): by the integral of its measured slope along the step, which leaves
nothing out, or by the terms, each split equally among its indices, which leaves out what the polynomial does.
"""

from dataclasses import dataclass
from itertools import combinations_with_replacement
from math import factorial

import numpy as np
import pandas as pd
import xarray as xr

from hoanalysis import quadrature, schema
from hoanalysis.analysis.arrays import Array, Tensors, kept_blocks, tensor, tensors
from hoanalysis.analysis.errorbars import error_of_mean, standard_error
from hoanalysis.analysis.path import contribution_blocks, stored
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


PATH, POLYNOMIAL = "path", "polynomial"


@dataclass(frozen=True)
class Shares:
    """What each of S groups added to the change of the loss.

    ``value`` (S,); ``blocks`` (B, S) with ``weight`` (B,), the same by kept block, None without them; ``left_out``
    (S,), how far the values may be off whatever the data: by the quadrature of a "path", by what the "polynomial" of
    ``order`` leaves out.
    """

    value: Array
    blocks: Array | None
    weight: Array | None
    left_out: Array
    source: str
    order: int

    @property
    def se(self) -> Array:
        """Of the sample, (S,); NaN without blocks."""
        if self.blocks is None or self.weight is None:
            return np.full(len(self.value), np.nan)
        return error_of_mean(self.blocks, self.weight)

    @property
    def error(self) -> Array:
        """Of both kinds, (S,)."""
        return np.hypot(np.nan_to_num(self.se), self.left_out)

    def difference_error(self, s: int, t: int) -> float:
        """The error of value_s - value_t: the sample's is that of paired differences."""
        sample = 0.0
        if self.blocks is not None and self.weight is not None:
            sample = float(error_of_mean(self.blocks[:, s] - self.blocks[:, t], self.weight))
        return float(np.sqrt(sample**2 + self.left_out[s] ** 2 + self.left_out[t] ** 2))


def shares_of(t: Tensors) -> Array:
    """The share of each group, shape (S,): sum_d (1/d!) sum_{t..} D^(d)[s,t,..] over D1, D2, .. of one checkpoint."""
    return np.sum(_by_order(t), axis=0)


def _by_order(t: Tensors) -> Array:
    """(1/d!) sum_{t..} D^(d)[s,t,..], shape (d, S)."""
    names = [schema.derivative(d) for d in range(1, len(t) + 1)]
    return np.stack([t[n].reshape(len(t[n]), -1).sum(1) / factorial(d) for d, n in enumerate(names, 1)])


def along_path(one: xr.Dataset) -> Shares:
    """The integral of the measured slope of each group: `analysis.path`."""
    slopes, blocks = tensor(one, schema.SLOPE_PATH), contribution_blocks(one)
    means, weight = (None, None) if blocks is None else blocks
    return Shares(
        quadrature.integral(slopes), means, weight, quadrature.integral_error(slopes), PATH, highest_order(one)
    )


def of_polynomial(one: xr.Dataset, order: int | None = None, unexplained: float = np.nan) -> Shares:
    """sum_d (1/d!) sum_{t..} D^(d)[s,t,..], d = 1..order (by default the highest): the integral of the polynomial's
    slope. What that leaves out is not known by group; ``left_out`` is the largest of what all groups together leave
    ``unexplained``, and the terms of the group beyond ``order`` that are stored, or its last one where none is.
    """
    top = highest_order(one)
    order = order or top
    names = [schema.derivative(d) for d in range(1, top + 1)]
    terms, blocks = _by_order(tensors(one, names)), kept_blocks(one, names[:order])
    means = weight = None
    if blocks is not None:
        split = {n: blocks.means(n) for n in names[:order]}
        means = np.stack([shares_of({n: m[b] for n, m in split.items()}) for b in range(len(blocks))])
        weight = blocks.weight
    beyond = np.abs(terms[order:] if order < top else terms[-1:]).max(axis=0)
    left_out = np.fmax(beyond, abs(unexplained))
    return Shares(terms[:order].sum(axis=0), means, weight, left_out, POLYNOMIAL, order)


def what_groups_did(one: xr.Dataset, order: int | None = None, unexplained: float = np.nan) -> Shares:
    """`along_path` where the slopes were measured, else `of_polynomial`."""
    if stored(one) and np.isfinite(tensor(one, schema.SLOPE_PATH)).all():
        return along_path(one)
    return of_polynomial(one, order, unexplained)


def shares(one: xr.Dataset, order: int | None = None, unexplained: float = np.nan) -> pd.DataFrame:
    """What each group added to the change of the loss; the group that raised it most first.

    Columns: ``group``; ``share``, by the path where it is stored and by the polynomial otherwise, with ``share_se``
    (the sample) and ``left_out`` (the quadrature, or what the polynomial leaves out); ``polynomial``, the share by the
    Taylor polynomial of ``order`` in either case, with ``polynomial_se``; ``slope`` = D1_s, ``curvature`` = D2_ss, and
    ``overshoot`` = -D2_ss / D1_s with ``overshoot_se``: over 2 the group would have raised the loss even alone.
    """
    did, cut = what_groups_did(one, order, unexplained), of_polynomial(one, order, unexplained)
    names = ["D1", "D2"]
    frame = pd.DataFrame(
        {
            "group": schema.labels(one),
            "share": did.value,
            "share_se": did.se,
            "left_out": did.left_out,
            "polynomial": cut.value,
            "polynomial_se": cut.se,
            "slope": tensor(one, "D1"),
            "curvature": np.diagonal(tensor(one, "D2")),
            "overshoot": _overshoot(tensors(one, names)),
            "overshoot_se": standard_error(one, names, _overshoot),
        }
    )
    return frame.sort_values("share", ascending=False, kind="stable").reset_index(drop=True)


def _overshoot(t: Tensors) -> Array:
    slope = t["D1"]
    return np.divide(-np.diagonal(t["D2"]), slope, out=np.full(len(slope), np.nan), where=slope != 0)
