"""The paper's claims, measured: statistics of summaries, and their verdicts by the thresholds of claims.toml.

Every statistic is a function of one checkpoint's H-bar through the scale-free matrix

    C = A_st / sqrt|A_ss A_tt|,    A = H-bar or its inverse, over the groups that have an effect,

which no rescaling of a tensor changes. Errors are the delete-one jackknife over the kept blocks of batches, conditional
on u; intervals are value +- t se, t of Student's distribution at 95 % with (blocks - 1) degrees of freedom. Numpy and
xarray only: the verdicts are rebuilt from stored summaries.
"""

import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from scipy.stats import t as student

from hoanalysis.analysis.arrays import Array, Tensors, kept_blocks, tensors
from hoanalysis.analysis.errorbars import standard_error
from hoanalysis.analysis.groups import system
from hoanalysis.analysis.linear import inverse_of

CLAIMS = Path(__file__).with_name("claims.toml")
STEPS_PER_EPOCH = 400
DENSE = 0.05  # a scale-free entry below this is called zero
VERDICTS = ("holds", "in part", "does not")


def claims() -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    """The claims in the order of the file, and the cases that their short names stand for."""
    table = tomllib.loads(CLAIMS.read_text(encoding="utf-8"))
    return table["claim"], table["cases"]


# ---- statistics of one checkpoint ---------------------------------------------------------------------------------


class Checkpoint:
    """One checkpoint's groups, what lies between layers, and its matrix C from any D2."""

    def __init__(self, one: xr.Dataset, matrix: str) -> None:
        self.one, self.matrix = one, matrix
        self.groups = system(one)
        self.layers = one["layer"].values.astype(str)
        self.kinds = one["kind"].values.astype(str)
        self.order = list(dict.fromkeys(self.layers))
        self.apart = self.layers[:, None] != self.layers[None, :]

    def size(self, t: Tensors) -> Array:
        """|C|, shape (S, S); NaN for groups without effect."""
        used, scale = self.groups.used, self.groups.scale[self.groups.used]
        c = t["D2"][np.ix_(used, used)] / np.outer(scale, scale)
        a = inverse_of(c) if self.matrix == "inverse" else c
        diagonal = np.sqrt(np.abs(np.diagonal(a)))
        return self.groups.spread(np.abs(a) / np.outer(diagonal, diagonal))

    def weights_of(self, layer: str) -> int:
        """The position of a layer's weight."""
        (found,) = np.flatnonzero((self.layers == layer) & (self.kinds == "weight"))
        return int(found)


def off_block(at: Checkpoint, t: Tensors) -> float:
    """sum of |C_st| between layers / sum of |C_st|"""
    size = at.size(t)
    return float(np.nansum(size[at.apart]) / np.nansum(size))


def off_block_ratio(at: Checkpoint, t: Tensors) -> float:
    """off-block share of the inverse / off-block share of H-bar"""
    return off_block(Checkpoint(at.one, "inverse"), t) / off_block(Checkpoint(at.one, "H"), t)


def density(at: Checkpoint, t: Tensors) -> float:
    """share of the pairs s < t with |C_st| >= 0.05 and |H_st| > 2 se; the second part is that of the full data"""
    upper = np.triu_indices(len(at.layers), 1)
    size = at.size(t)[upper]
    sure = np.abs(at.one["D2"].values[upper]) > 2 * at.one["D2_se"].values[upper]
    known = np.isfinite(size)
    return float(((size >= DENSE) & sure)[known].mean())


def last_five(at: Checkpoint, t: Tensors) -> float:
    """mean |C_st| between two of the last five layers / mean |C_st| of all other pairs between layers"""
    last = np.isin(at.layers, at.order[-5:])
    inside = at.apart & np.outer(last, last)
    size = at.size(t)
    return float(np.nanmean(size[inside]) / np.nanmean(size[at.apart & ~inside]))


def _with_last(at: Checkpoint, t: Tensors, layer: str) -> float:
    size = at.size(t)
    pair = size[at.weights_of(layer), at.weights_of(at.order[-1])]
    return float(pair / np.nanmean(size[at.apart]))


def fifth_last_with_last(at: Checkpoint, t: Tensors) -> float:
    """|C| of the weights of the fifth-last and the last layer / mean |C_st| of all pairs between layers"""
    return _with_last(at, t, at.order[-5])


def first_with_last(at: Checkpoint, t: Tensors) -> float:
    """|C| of the weights of the first and the last layer / mean |C_st| of all pairs between layers"""
    return _with_last(at, t, at.order[0])


STATISTICS: dict[str, Callable[[Checkpoint, Tensors], float]] = {
    f.__name__: f for f in (off_block, off_block_ratio, density, last_five, fifth_last_with_last, first_with_last)
}


def measured(one: xr.Dataset, statistic: str, matrix: str) -> tuple[float, float, float]:
    """The value, its standard error and the half width of its 95 % interval; NaN without kept blocks."""
    at, of = Checkpoint(one, matrix), STATISTICS[statistic]
    value = of(at, tensors(one, ["D2"]))
    error = float(standard_error(one, ["D2"], lambda t: np.asarray(of(at, t))))
    blocks = kept_blocks(one, ["D2"])
    return value, error, error * quantile(len(blocks) if blocks is not None else 0)


def quantile(pieces: int) -> float:
    """t of a 95 % interval from the spread of so many pieces."""
    return float(student.ppf(0.975, pieces - 1)) if pieces > 1 else float("nan")


# ---- verdicts -----------------------------------------------------------------------------------------------------


def verdict(value: float, half: float, holds: float, fails: float) -> str:
    """The verdict on one case; ``half`` NaN is taken as 0.

    >>> [verdict(v, 0.1, 0.5, 0.25) for v in (0.7, 0.55, 0.4, 0.2, 0.1)]
    ['holds', 'in part', 'in part', 'in part', 'does not']
    """
    if not np.isfinite(value):
        return "not measured"
    half = half if np.isfinite(half) else 0.0
    sign = 1.0 if holds > fails else -1.0
    low, high = sign * value - half, sign * value + half
    if low >= sign * holds:
        return "holds"
    return "does not" if high < sign * fails else "in part"


def together(verdicts: list[str]) -> str:
    """The verdict on a claim from those on its cases.

    >>> together(["holds", "does not"]), together(["holds", "holds"])
    ('in part', 'holds')
    """
    return verdicts[0] if len(set(verdicts)) == 1 else "in part"


def at_epoch(ds: xr.Dataset, epoch: int) -> xr.Dataset:
    """The summaries of a run after so many epochs."""
    return ds.sel(step=epoch * STEPS_PER_EPOCH)


def table(
    runs: Mapping[str, xr.Dataset],
    properties: xr.Dataset | None = None,
    substitute: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """One row a claim and case: name, claim, case, value, se, half width of the interval, thresholds and verdict.

    Parameters
    ----------
    runs
        Name -> the summaries of the run, over ``step``.
    properties
        What benchmarks/properties.py stored: a variable per statistic, and ``<statistic>_se`` where it has one.
    substitute
        Run -> another one in its place (another seed, another activation). Claims about other runs are left out then.
    """
    rows, (listed, names) = [], claims()
    for claim in listed:
        cases = [case for name in claim["cases"] for case in names.get(name, [name])]
        for case in cases:
            run, _, epoch = case.partition("@")
            if substitute is not None and run not in substitute:
                continue
            run = (substitute or {}).get(run, run)
            if epoch:
                one = at_epoch(runs[run], int(epoch))
                value, error, half = measured(one, claim["statistic"], claim["matrix"])
            elif properties is not None:
                value, error, half = _property(properties, claim["statistic"])
            else:
                continue
            row = {k: claim[k] for k in ("name", "claim", "formula", "holds", "fails")}
            row |= {"matrix": claim.get("matrix", ""), "case": f"{run}@{epoch}" if epoch else "property"}
            row |= {"value": value, "se": error, "half": half}
            rows.append(row | {"verdict": verdict(value, half, claim["holds"], claim["fails"])})
    return pd.DataFrame(rows)


def _property(properties: xr.Dataset, statistic: str) -> tuple[float, float, float]:
    value = float(properties[statistic])
    error = float(properties[f"{statistic}_se"]) if f"{statistic}_se" in properties else float("nan")
    return value, error, error * quantile(int(properties.attrs["repeats"]))


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a claim, in order: its verdict and how many of its cases hold, hold in part or do not."""
    grouped = rows.groupby("name", sort=False)
    out = grouped.agg(claim=("claim", "first"), verdict=("verdict", lambda v: together(list(v))))
    for v in VERDICTS:
        out[v] = grouped["verdict"].agg(lambda column, v=v: int((column == v).sum()))
    return out


# ---- in words -----------------------------------------------------------------------------------------------------


def written(value: float, half: float) -> str:
    """A value with the half width of its interval, where it has one.

    >>> written(0.71294, 0.00123), written(3.3e-16, float("nan"))
    ('0.7129 ± 0.0012', '3.3e-16')
    """
    if not np.isfinite(half):
        return f"{value:.2g}"
    if half == 0:
        return f"{value:.3g} ± 0"
    digits = int(max(0, 1 - np.floor(np.log10(half))))
    return f"{value:.{digits}f} ± {half:.{digits}f}"


def threshold(holds: float, fails: float) -> str:
    """From where on a claim holds, and from where on it does not.

    >>> threshold(0.5, 0.25), threshold(1e-6, 1e-3)
    ('holds ≥ 0.5, does not < 0.25', 'holds ≤ 1e-06, does not > 0.001')
    """
    up, down = ("≥", "<") if holds > fails else ("≤", ">")
    return f"holds {up} {holds:g}, does not {down} {fails:g}"


def by_images(ds: xr.Dataset) -> pd.DataFrame:
    """The claims about LeNet-5 for every batch behind u: mean and standard deviation over draws, verdicts counted.

    ``ds`` is what benchmarks/behind_u.py stored, D1 and D2 over (step, images, draw).
    """
    rows, (listed, _) = [], claims()
    for claim in (c for c in listed if "lenet" in c["cases"]):
        for step in ds.step.values:
            for n in ds.images.values:
                ones = [ds.sel(step=step, images=n).isel(draw=d) for d in range(ds.sizes["draw"])]
                values = np.array([measured(one, claim["statistic"], claim["matrix"])[0] for one in ones])
                told = [verdict(v, 0.0, claim["holds"], claim["fails"]) for v in values]
                row = {"claim": claim["claim"], "epoch": int(step) // STEPS_PER_EPOCH, "images behind u": int(n)}
                row["mean ± sd"] = f"{values.mean():.3f} ± {values.std(ddof=1):.3f}"
                rows.append(row | {v: told.count(v) for v in VERDICTS})
    return pd.DataFrame(rows).set_index(["claim", "epoch", "images behind u"])


def by_run(runs: Mapping[str, xr.Dataset], names: Mapping[str, str]) -> tuple[pd.DataFrame, list[str]]:
    """The claims about LeNet-5 for several runs of it, a column a run, and the claims of which verdicts differ.

    ``names`` is what to call each run; the first one is that of claims.toml.
    """
    original, columns, told = next(iter(names)), [], []
    for name, title in names.items():
        rows = table(runs, substitute={original: name})
        rows["epoch"] = rows["case"].str.rpartition("@")[2].astype(int)
        rows = rows.set_index(["claim", "epoch"])
        words = [f"{written(v, h)}: {w}" for v, h, w in zip(rows["value"], rows["half"], rows["verdict"], strict=True)]
        columns.append(pd.Series(words, rows.index, name=title))
        told.append(rows["verdict"].rename(title))
    verdicts = pd.concat(told, axis=1)
    moved = verdicts.index[verdicts.ne(verdicts.iloc[:, 0], axis=0).any(axis=1)]
    return pd.concat(columns, axis=1), list(dict.fromkeys(moved.get_level_values("claim")))


def sentences(summed: pd.DataFrame, moved: list[str]) -> list[str]:
    """What holds, what holds in part, what does not, and what depends on the run."""
    lines = []
    for told in VERDICTS:
        found = summed["claim"][summed["verdict"] == told]
        if len(found):
            lines.append(f"**{told}** ({len(found)} of {len(summed)}): {'; '.join(found)}.")
    differ = f"change for: {'; '.join(moved)}" if moved else "stay the same"
    return [*lines, f"Over seeds and activations the verdicts on LeNet-5 {differ}."]
