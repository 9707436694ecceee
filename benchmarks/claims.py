"""The paper's claims, measured: statistics of summaries, and their verdicts by the thresholds of claims.toml.

Every statistic is a function of one checkpoint's H-bar through the scale-free matrix

    C = A_st / sqrt|A_ss A_tt|,    A = H-bar or its inverse, over the groups that have an effect,

which no rescaling of a tensor changes. Errors are the delete-one jackknife over the kept blocks of batches,
conditional on u; intervals are value +- t se, t of Student's distribution at 95 % with (blocks - 1) degrees of
freedom. A count has no jackknife: the interval of the density reaches from the count with none to that with all of
the pairs that are within two errors of its threshold. A number without any error has half width NaN, and its verdict
is that of the value alone. Numpy and xarray only: the verdicts are rebuilt from stored summaries.
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
DECIDED = ("decided", "'holds' is excluded", "not decided by the data", "value alone, no error")
TITLES = {"lenet5-cifar10": "LeNet-5", "vgg11-cifar10": "VGG-11'"}
RANDOM = 400  # random matrices behind a baseline
#: Rules of claims.toml under which the other network is judged as well, asked for after the numbers were known.
POST_HOC = {
    "inverse-blocks-rough-lenet": ("inverse-blocks-rough-vgg", "lenet", "LeNet-5 by the rule of VGG-11'"),
    "inverse-blocks-better-vgg": ("inverse-blocks-better-lenet", "vgg", "VGG-11' by the rule of LeNet-5"),
}


def claims() -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    """The claims in the order of the file, and the cases that their short names stand for."""
    table = tomllib.loads(CLAIMS.read_text(encoding="utf-8"))
    return table["claim"], table["cases"]


def post_hoc() -> list[dict[str, Any]]:
    """The claims of `POST_HOC`, each with the statistic and the thresholds of the rule that it borrows."""
    by_name = {claim["name"]: claim for claim in claims()[0]}
    told = {"off_block": "the inverse is rough too", "off_block_ratio": "the inverse is more reasonable"}
    return [
        by_name[rule] | {"name": name, "cases": [cases], "claim": f"{whose}: {told[by_name[rule]['statistic']]}"}
        for name, (rule, cases, whose) in POST_HOC.items()
    ]


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
    size, sure = at.size(t)[upper], _sure(at)
    known = np.isfinite(size)
    return float(((size >= DENSE) & sure)[known].mean())


def _sure(at: Checkpoint) -> Array:
    """Pairs s < t with |H_st| > 2 se."""
    upper = np.triu_indices(len(at.layers), 1)
    return np.abs(at.one["D2"].values[upper]) > 2 * at.one["D2_se"].values[upper]


def counted(one: xr.Dataset, matrix: str) -> tuple[int, int, int, int]:
    """The pairs s < t with a value, those that are dense, and the fewest and the most that could be.

    The fewest are those with |C_st| >= 0.05 + 2 se(C) and |H_st| > 2 se, the most those with |C_st| >= 0.05 - 2 se(C).
    """
    at, upper = Checkpoint(one, matrix), np.triu_indices(one.sizes["group"], 1)
    size = at.size(tensors(one, ["D2"]))[upper]
    error = np.asarray(standard_error(one, ["D2"], at.size))[upper]
    known, sure = np.isfinite(size), _sure(at)
    dense, least, most = (size >= DENSE) & sure, (size >= DENSE + 2 * error) & sure, size >= DENSE - 2 * error
    return int(known.sum()), int(dense.sum()), int(least.sum()), int((most | dense).sum())


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
    """The value, its standard error and the half width of its 95 % interval; NaN without kept blocks.

    The density has no standard error, and the half width that its borderline pairs leave.
    """
    at, of = Checkpoint(one, matrix), STATISTICS[statistic]
    value = of(at, tensors(one, ["D2"]))
    blocks = kept_blocks(one, ["D2"])
    if statistic == "density":
        pairs, dense, least, most = counted(one, matrix)
        half = max(dense - least, most - dense) / pairs if blocks is not None else float("nan")
        return value, float("nan"), half
    error = float(standard_error(one, ["D2"], lambda t: np.asarray(of(at, t))))
    return value, error, error * quantile(len(blocks) if blocks is not None else 0)


def quantile(pieces: int) -> float:
    """t of a 95 % interval from the spread of so many pieces."""
    return float(student.ppf(0.975, pieces - 1)) if pieces > 1 else float("nan")


def baselines(one: xr.Dataset, statistic: str, matrix: str) -> tuple[float, float, float, float]:
    """What the statistic is without any structure, for these layers: where all |C_st| = 1, and the mean and the 2.5 and
    97.5 percentiles over random Wishart matrices X X^T, X of shape (S, S) with standard normal entries (seed 0).
    """
    s = one.sizes["group"]
    blank = one.assign(D1=("group", np.ones(s)), D2=(("group", "group2"), np.ones((s, s))))
    blank["D2_se"] = xr.zeros_like(blank["D2"])
    blank = blank.assign_coords(direction_norm=("group", np.ones(s)))
    of, rng = STATISTICS[statistic], np.random.default_rng(0)
    equal = float("nan") if statistic == "off_block_ratio" else of(Checkpoint(blank, "H"), {"D2": np.ones((s, s))})
    at, roots = Checkpoint(blank, matrix), rng.normal(size=(RANDOM, s, s))
    values = np.array([of(at, {"D2": root @ root.T}) for root in roots])
    return equal, float(values.mean()), *map(float, np.percentile(values, [2.5, 97.5]))


def least_eigenvalue(one: xr.Dataset) -> tuple[float, float]:
    """The smallest eigenvalue of H_st / sqrt|H_ss H_tt|, and its standard error."""
    groups = system(one)

    def least(t: Tensors) -> Array:
        scale = groups.scale_in(t["D2"])
        c = t["D2"][np.ix_(groups.used, groups.used)] / np.outer(scale, scale)
        return np.asarray(np.linalg.eigvalsh((c + c.T) / 2)[0])

    return float(least(tensors(one, ["D2"]))), float(standard_error(one, ["D2"], least))


# ---- verdicts -----------------------------------------------------------------------------------------------------


def verdict(value: float, half: float, holds: float, fails: float) -> str:
    """The verdict on one case; that of the value alone where ``half`` is NaN, which `decided` says.

    >>> [verdict(v, 0.1, 0.5, 0.25) for v in (0.7, 0.55, 0.4, 0.2, 0.1)]
    ['holds', 'in part', 'in part', 'in part', 'does not']
    """
    if not np.isfinite(value):
        return "not measured"
    sign, reach = (1.0 if holds > fails else -1.0), (half if np.isfinite(half) else 0.0)
    low, high = sign * value - reach, sign * value + reach
    if low >= sign * holds:
        return "holds"
    return "does not" if high < sign * fails else "in part"


def decided(value: float, half: float, holds: float, fails: float) -> str:
    """Whether the 95 % interval decides; "in part" is two outcomes, one of which excludes that the claim holds.

    >>> [decided(v, 0.1, 0.5, 0.25) for v in (0.7, 0.55, 0.39, 0.2, 0.1)]
    ['decided', 'not decided by the data', "'holds' is excluded", "'holds' is excluded", 'decided']
    >>> decided(0.4, float("nan"), 0.5, 0.25)
    'value alone, no error'
    """
    if not np.isfinite(half):
        return DECIDED[3]
    if verdict(value, half, holds, fails) != "in part":
        return DECIDED[0]
    sign = 1.0 if holds > fails else -1.0
    return DECIDED[1] if sign * value + half < sign * holds else DECIDED[2]


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
    late = post_hoc() if substitute is None else []
    for claim in [*listed, *late]:
        for case in [case for name in claim["cases"] for case in names.get(name, [name])]:
            run, _, epoch = case.partition("@")
            if substitute is not None and run not in substitute:
                continue
            run = (substitute or {}).get(run, run)
            if epoch:
                found = _judged(claim, at_epoch(runs[run], int(epoch)))
            elif properties is not None:
                found = _row(claim, *_property(properties, claim["statistic"]))
            else:
                continue
            rows.append(found | {"case": f"{run}@{epoch}" if epoch else "property", "post hoc": claim in late})
    return pd.DataFrame(rows)


def _judged(claim: Mapping[str, Any], one: xr.Dataset) -> dict[str, Any]:
    """The row of one claim at one checkpoint, with the pairs that a count counts."""
    row = _row(claim, *measured(one, claim["statistic"], claim["matrix"]))
    if claim["statistic"] == "density":
        pairs, dense, least, most = counted(one, claim["matrix"])
        row["written"] = f"{dense / pairs:.3f}: {dense} of {pairs} pairs, {most - least} of them undecided"
    return row


def _row(claim: Mapping[str, Any], value: float, error: float, half: float) -> dict[str, Any]:
    row = {k: claim[k] for k in ("name", "claim", "statistic", "formula", "holds", "fails")}
    row |= {"matrix": claim.get("matrix", ""), "value": value, "se": error, "half": half}
    judged = (value, half, claim["holds"], claim["fails"])
    return row | {"written": written(value, half), "verdict": verdict(*judged), "decided": decided(*judged)}


def _property(properties: xr.Dataset, statistic: str) -> tuple[float, float, float]:
    value = float(properties[statistic])
    error = float(properties[f"{statistic}_se"]) if f"{statistic}_se" in properties else float("nan")
    return value, error, error * quantile(int(properties.attrs["repeats"]))


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a claim, in order: its verdict, how many cases hold, hold in part or do not, and what the data decide."""
    grouped = rows.groupby("name", sort=False)
    out = grouped.agg(claim=("claim", "first"), verdict=("verdict", lambda v: together(list(v))))
    for v in VERDICTS:
        out[v] = grouped["verdict"].agg(lambda column, v=v: int((column == v).sum()))
    out["decided"] = grouped["decided"].agg(_numbered)
    out["post hoc"] = grouped["post hoc"].first()
    return out


def _numbered(values: pd.Series) -> str:
    """What each case says, with how many of them where they differ."""
    found = values.value_counts(sort=False)
    return next(iter(found.index)) if len(found) == 1 else ", ".join(f"{n} {word}" for word, n in found.items())


def against_baselines(rows: pd.DataFrame, runs: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """`baselines` of every row about a run: where all |C| = 1, and the mean and the 95 % of random matrices."""
    known: dict[tuple[str, str, str], tuple[float, ...]] = {}
    for row in rows.itertuples():
        run = str(row.case).partition("@")[0]
        if run in runs and (run, row.statistic, row.matrix) not in known:
            one = runs[run].isel(step=-1)
            known[run, row.statistic, row.matrix] = baselines(one, str(row.statistic), str(row.matrix))
    keys = [(str(r.case).partition("@")[0], r.statistic, r.matrix) for r in rows.itertuples()]
    columns = ["equal", "random", "random_low", "random_high"]
    return pd.DataFrame([known.get(k, (float("nan"),) * 4) for k in keys], rows.index, columns)


def elsewhere(
    runs: Mapping[str, xr.Dataset],
    others: Mapping[str, Mapping[str, xr.Dataset]],
    behind: xr.Dataset,
    starts: xr.Dataset,
) -> pd.DataFrame:
    """The verdicts where claims.toml does not ask for them: a row a claim and place, how many hold, in part, do not.

    Parameters
    ----------
    runs
        Name -> summaries of the runs of claims.toml; their other epochs are one place.
    others
        Place -> runs that stand in for the first one, at the epochs of claims.toml.
    behind
        What benchmarks/behind_u.py stored: that run with other batches behind u.
    starts
        What benchmarks/properties.py --starts stored: the invariance from several starts, with several dampings.
    """
    rows, (listed, names) = [], claims()
    first = next(iter(runs))
    for claim in (c for c in [*listed, *post_hoc()] if c["cases"] != ["property"]):
        cases = [case.split("@") for name in claim["cases"] for case in names[name]]
        for run in dict.fromkeys(name for name, _ in cases):
            asked = [int(epoch) * STEPS_PER_EPOCH for name, epoch in cases if name == run]
            ones = {"other epochs": [runs[run].sel(step=s) for s in runs[run].step.values if s not in asked]}
            if run == first:
                for place, found in others.items():
                    ones[place] = [ds.sel(step=s) for ds in found.values() for s in asked]
                ones["batches behind u"] = [
                    behind.sel(step=s, images=n).isel(draw=d)
                    for s in asked
                    for n in behind.images.values
                    for d in range(behind.sizes["draw"])
                ]
            for place, checkpoints in ones.items():
                told = [_judged(claim, one)["verdict"] for one in checkpoints]
                place = f"{place} of {TITLES[run]}" if place == "other epochs" else place
                rows.append({"name": claim["name"], "place": place} | {v: told.count(v) for v in VERDICTS})
    for claim in (c for c in listed if c["statistic"] in starts):
        told = [
            verdict(v, float("nan"), claim["holds"], claim["fails"]) for v in starts[claim["statistic"]].values.flat
        ]
        rows.append({"name": claim["name"], "place": "starts and dampings"} | {v: told.count(v) for v in VERDICTS})
    return pd.DataFrame(rows).set_index(["name", "place"])


def indefinite(ds: xr.Dataset) -> list[int]:
    """The epochs at which H-bar has a negative eigenvalue, beyond its 95 % interval."""
    out, half = [], quantile(ds.sizes["batch"])
    for step in ds.step.values:
        value, error = least_eigenvalue(ds.sel(step=step))
        if value + half * error < 0:
            out.append(int(step) // STEPS_PER_EPOCH)
    return out


# ---- in words -----------------------------------------------------------------------------------------------------


def written(value: float, half: float) -> str:
    """A value with the half width of its interval, where it has one.

    >>> written(0.71294, 0.00123), written(3.3e-16, float("nan"))
    ('0.7129 ± 0.0012', '3.3e-16, no error')
    """
    if not np.isfinite(half):
        return f"{value:.2g}, no error"
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

    ``ds`` is what benchmarks/behind_u.py stored, D1 and D2 over (step, images, draw), with the blocks from which every
    draw has the interval of the main table.
    """
    rows, (listed, _) = [], claims()
    for claim in (c for c in listed if "lenet" in c["cases"]):
        for step in ds.step.values:
            for n in ds.images.values:
                ones = [ds.sel(step=step, images=n).isel(draw=d) for d in range(ds.sizes["draw"])]
                judged = [_judged(claim, one) for one in ones]
                values, told = np.array([j["value"] for j in judged]), [j["verdict"] for j in judged]
                row = {"claim": claim["claim"], "epoch": int(step) // STEPS_PER_EPOCH, "images behind u": int(n)}
                row["mean ± sd"] = f"{values.mean():.3f} ± {values.std(ddof=1):.3f}"
                rows.append(row | {v: told.count(v) for v in VERDICTS})
    return pd.DataFrame(rows).set_index(["claim", "epoch", "images behind u"])


def behind_words(counts: pd.DataFrame, by_claim: Mapping[str, str]) -> list[str]:
    """For every claim of `by_images`, how many draws of each size give the verdict that the full gradient gives."""
    out = []
    for claim, found in counts.groupby(level="claim", sort=False):
        told = by_claim[str(claim)]
        sizes = found.groupby(level="images behind u")[list(VERDICTS)].sum()
        parts = [f"{row[told]} of {row.sum()} draws of {n:,} images" for n, row in sizes.iterrows()]
        out.append(f"{claim}: the verdict of the full gradient ({told}) in {', '.join(parts)}.")
    return out


def by_run(runs: Mapping[str, xr.Dataset], names: Mapping[str, str]) -> tuple[pd.DataFrame, list[str]]:
    """The claims about LeNet-5 for several runs of it, a column a run, and the claims of which verdicts differ.

    ``names`` is what to call each run; the first one is that of claims.toml.
    """
    original, columns, told = next(iter(names)), [], []
    for name, title in names.items():
        rows = table(runs, substitute={original: name})
        rows["epoch"] = rows["case"].str.rpartition("@")[2].astype(int)
        rows = rows.set_index(["claim", "epoch"])
        words = [f"{number}: {told}" for number, told in zip(rows["written"], rows["verdict"], strict=True)]
        columns.append(pd.Series(words, rows.index, name=title))
        told.append(rows["verdict"].rename(title))
    verdicts = pd.concat(told, axis=1)
    moved = verdicts.index[verdicts.ne(verdicts.iloc[:, 0], axis=0).any(axis=1)]
    return pd.concat(columns, axis=1), list(dict.fromkeys(moved.get_level_values("claim")))


def moves(name: str, told: str, places: pd.DataFrame) -> str:
    """Where else the verdict on a claim is the same, if it is another one somewhere; else an empty string."""
    if name not in places.index.get_level_values("name"):
        return ""
    found = places.loc[name]
    if (found[told] == found.sum(axis=1)).all():
        return ""
    return ", ".join(f"{place} {row[told]} of {row.sum()}" for place, row in found.iterrows())


def sentences(summed: pd.DataFrame, places: pd.DataFrame) -> list[str]:
    """What holds, what holds in part and whether the data decide it, what does not; and where a verdict is another one.

    A nested list in Markdown. ``places`` is `elsewhere`. The claims that are post hoc come after those of claims.toml.
    """
    lines = []
    for late, among in summed.groupby("post hoc"):
        for told in (v for v in VERDICTS if (among["verdict"] == v).any()):
            found = among[among["verdict"] == told]
            lines.append(f"- **{told}**{', post hoc' * bool(late)} ({len(found)} of {len(among)}):")
            for name, row in found.iterrows():
                decision = f" ({row['decided']})" if told == "in part" else ""
                moved = moves(str(name), told, places)
                where = f'; for seed 0 at the paper\'s epochs; "{told}" elsewhere: {moved}' if moved else ""
                lines.append(f"  - {row['claim']}{decision}{where}.")
    return lines


def over_epochs(ds: xr.Dataset, title: str) -> str:
    """In how many epochs the inverse is nearer to block-diagonal than H-bar, and where H-bar is indefinite."""
    found = [measured(ds.sel(step=s), "off_block_ratio", "inverse") for s in ds.step.values]
    less = sum(value + half < 1 for value, _, half in found)
    more = sum(value - half > 1 for value, _, half in found)
    epochs = indefinite(ds)
    every = "all of them" if len(epochs) == ds.sizes["step"] else f"{', '.join(map(str, epochs)) or 'none'}"
    return (
        f"{title}: the off-block share of the inverse is below that of H-bar, beyond the interval, at {less} of "
        f"{len(found)} epochs, above it at {more}, and not decided at {len(found) - less - more}. "
        f"Epochs at which H-bar is indefinite (a negative eigenvalue of C beyond its interval): {every}."
    )


def several_starts(ds: xr.Dataset) -> str:
    """The invariance over starts and dampings, as benchmarks/properties.py --starts stored it: median and largest."""
    limits = {c["statistic"]: c["holds"] for c in claims()[0]}
    parts = []
    for name, title in {"invariance": "H-bar", "invariance_r": "H-bar_reg"}.items():
        values = ds[name].values.ravel()
        within = int((values <= limits[name]).sum())
        parts.append(
            f"{title} has a median of {np.median(values):.0e} and a maximum of {values.max():.0e}, with {within} of "
            f"{values.size} at or below the threshold of {limits[name]:g}, and went up to "
            f"{ds[f'{name}_way'].max().item():.2g} times the size of the parameters"
        )
    epochs, dampings = (", ".join(f"{v:g}" for v in ds[name].values) for name in ("epoch", "damping"))
    return f"Over starts from the epochs {epochs} and the dampings {dampings}, {'; '.join(parts)}."


def contrast(rows: pd.DataFrame, random: pd.DataFrame) -> list[str]:
    """The two networks by the same rules, and beside random matrices. ``random`` is `against_baselines`."""
    lines, opposite, ordered = [], False, True
    titles = {"off_block": "Off-block share of the inverse", "off_block_ratio": "That share over the one of H-bar"}
    for statistic, title in titles.items():
        chosen = rows[(rows["statistic"] == statistic) & (rows["matrix"] == "inverse")]
        small, large = (chosen[chosen["case"].str.startswith(run)] for run in TITLES)
        words = [", ".join(f"{r.written} ({r.verdict})" for r in part.itertuples()) for part in (small, large)]
        means = [f"{random.loc[part.index[0], 'random']:.2f}" for part in (small, large)]
        low = random.loc[chosen.index, "random_low"]
        below, surely = (int((chosen["value"] + reach < low).sum()) for reach in (0.0, chosen["half"]))
        lines.append(
            f"{title}: LeNet-5 {words[0]}; VGG-11' {words[1]}. "
            f"Random matrices have {means[0]} and {means[1]} on average; {below} of the {len(chosen)} values lie below "
            f"95 % of those, {surely} of them with their whole interval."
        )
        far = zip(small["value"] + small["half"], large["value"] - large["half"], strict=True)
        ordered &= all(high < low for high, low in far)
        opposite |= {"holds", "does not"} <= {together(list(part["verdict"])) for part in (small, large)}
    lines.append(
        "LeNet-5's inverse is the nearer to block-diagonal, beyond the intervals, "
        f"{'by both rules' if ordered else 'but not by both rules'}; "
        f"{'one rule gives' if opposite else 'no one rule gives'} the networks opposite verdicts: "
        f"the contrast is one of {'kind' if opposite else 'degree'}."
    )
    return lines
