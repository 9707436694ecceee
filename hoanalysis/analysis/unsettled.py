"""Which signs are not settled, and how many more batches would settle them.

An entry x with standard error se has a settled sign where |x| >= 2 se. Errors of means over batches fall like
1/sqrt(number of batches), so that an entry that stays where it is needs

    k = (2 se / x)^2         times as many batches.

That is an expectation: x itself is known to se only, so that for |x| << se the number says no more than "very many".
It takes batches of the same distribution; where the summaries already use all of the data, more data. Along the
gradient of the same data with conditional errors k is too small, by about the square of what these leave out: 4 and
more for D1, 16 to 50 for D2 (docs/errors.md); ``says`` warns of it.
"""

from itertools import combinations_with_replacement

import numpy as np
import pandas as pd
import xarray as xr

from hoanalysis import schema
from hoanalysis.analysis.arrays import Array, checkpoints, require, require_top, step_labels, tensor
from hoanalysis.analysis.errorbars import moves_with_the_data
from hoanalysis.analysis.groups import system
from hoanalysis.analysis.steps import learning_rates
from hoanalysis.errors import SchemaError

CLEAR = 2.0
TOO_SMALL = " The errors leave out what the data do through u, so that it takes more."
RATES = "learning_rates"


def unsettled(ds: xr.Dataset, top: int | None = None) -> pd.DataFrame:
    """Entries of D1, D2, .. and learning rates whose sign is not settled, the nearest to being settled first.

    Parameters
    ----------
    top
        How many of each quantity at every step; all by default.

    Returns
    -------
    DataFrame
        ``step``, ``quantity``, ``group``, ``group2``, .. (empty where the quantity has fewer), ``value``, ``se``,
        ``times`` = k, ``batches`` = k times the batches that were used (NaN where their number is not held), and
        ``says``, a sentence. One row for entries that differ by the order of their groups. Entries without an error are
        left out, and so are groups without effect: their entries are rounding, which no batch settles.

    Raises `SchemaError` where the Dataset holds no standard errors.
    """
    require(ds, "D1", "D2")
    require_top(top)
    held = [schema.derivative(d) for d in schema.orders(ds) if schema.error_of(schema.derivative(d)) in ds]
    held += [schema.diagonal(d) for d in range(1, 5) if schema.error_of(schema.diagonal(d)) in ds]
    if not held:
        raise SchemaError("the Dataset holds no standard errors", do="summarize over two batches or more")
    rows = []
    for one, step in zip(checkpoints(ds), step_labels(ds), strict=True):
        entries = [(name, tensor(one, name), tensor(one, schema.error_of(name))) for name in held]
        rates = learning_rates(one)
        entries.append((RATES, rates[RATES].values, rates[f"{RATES}_se"].values))
        frames = [_of_one(one, step, *entry) for entry in entries]
        rows += [frame if top is None else frame.head(top) for frame in frames]
    found = pd.concat(rows, ignore_index=True)
    groups = [c for c in found.columns if str(c).startswith(schema.GROUP)]
    found[groups] = found[groups].fillna("")
    return found[["step", "quantity", *sorted(groups), "value", "se", "times", "batches", "says"]]


def _of_one(one: xr.Dataset, step: object, name: str, value: Array, error: Array) -> pd.DataFrame:
    at = _entries(value.shape)
    null, labels = system(one).null, np.array(schema.labels(one), dtype=object)
    x, se = value[at], error[at]
    times = np.square(CLEAR * np.divide(se, np.abs(x), out=np.full_like(x, np.inf), where=x != 0))
    open_ = (np.abs(x) < CLEAR * se) & np.isfinite(se) & ~np.any([null[i] for i in at], axis=0)
    columns: dict[str, object] = {"step": step, "quantity": name}
    columns |= {schema.group_dim(k): labels[i[open_]] for k, i in enumerate(at)}
    columns |= {"value": x[open_], "se": se[open_], "times": times[open_]}
    columns["batches"] = times[open_] * float(one["n_batches"].item() if "n_batches" in one.coords else np.nan)
    frame = pd.DataFrame(columns).sort_values("times", kind="stable", ignore_index=True)
    groups = [schema.group_dim(k) for k in range(len(at))]
    more = TOO_SMALL if moves_with_the_data(one) else ""
    rows = frame[["times", "batches", *groups]].itertuples(index=False)
    frame["says"] = [f"{_sentence(name, *row)}{more}" for row in rows]
    return frame


def _entries(shape: tuple[int, ...]) -> tuple[Array, ...]:
    """One position of each set that permutation maps onto each other, as an array per axis."""
    chosen = list(combinations_with_replacement(range(shape[0]), len(shape)))
    return tuple(np.array(chosen, dtype=int).reshape(-1, len(shape)).T)


def _sentence(name: str, times: float, batches: float, *groups: str) -> str:
    named = ", ".join(repr(str(g)) for g in groups)
    where = f"{name.replace('_', ' ')} of {named if len(groups) == 1 else f'({named})'}"
    if not np.isfinite(times):
        return f"no number of batches settles the sign of {where}: it is 0."
    total = f" ({np.ceil(batches):,.0f} in all)" if np.isfinite(batches) else ""
    factor = f"{times:.2f}" if times < 10 else f"{times:,.0f}"
    return f"needs about {factor} times as many batches{total} to settle the sign of {where}."
