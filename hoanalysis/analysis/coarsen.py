"""Which groups to merge: the coarser partition that keeps most of what one step on the quadratic model gains.

With one learning rate per group, the model gains G = g-bar' H-bar^-1 g-bar / 2 (`learning_rates`). Merging a and b asks
them for one rate, c.eta = 0 with c = e_a - e_b, which costs

    (eta_a - eta_b)^2 / (2 (P_aa + P_bb - 2 P_ab)),    P = H-bar^-1, eta = P g-bar

and leaves P - P c c'P / c'P c and eta - P c (c.eta) / c'P c, whose rows a and b are then equal: dropping one gives the
inverse and the rates of the merged system, so that each merge takes O(S^2) and all of them O(S^3). The cheapest pair is
merged until n groups are left; greedy, so not always the best partition into n groups (Ward 1963 clusters in this way).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import xarray as xr

from hoanalysis import schema
from hoanalysis.analysis.arrays import Array, Tensors, checkpoints, number, require, tensors
from hoanalysis.analysis.errorbars import standard_error
from hoanalysis.analysis.groups import System, rounding, system
from hoanalysis.analysis.linear import solve
from hoanalysis.analysis.merge import By, groups_of
from hoanalysis.analysis.ward import Model, equilibrated, merge_cheapest
from hoanalysis.errors import ArgumentError, listed, nearest


@dataclass(frozen=True, eq=False)
class Suggestion(Mapping[str, list[str]]):
    """``{new group: [old groups]}``, as `merge` and `Partition.merge` take it, and what it keeps.

    ``kept`` is the share of g-bar' H-bar^-1 g-bar / 2 that one rate per new group still gains, in 0..1 (of a series:
    the mean over its checkpoints), and ``kept_se`` its standard error from the kept blocks for this partition held
    fixed (of a series: the mean of theirs, an upper bound, because they share their data). ``path`` has a row for every
    number of groups on the way: ``groups``, ``kept``, and the two that were ``merged`` (each named by its first
    member). ``epsilon`` is what was added to H-bar, as ``learning_rates("ridge", epsilon)`` adds it, 0 where H-bar is
    positive definite. ``status`` advises.
    """

    groups: dict[str, list[str]]
    kept: float
    kept_se: float
    path: pd.DataFrame = field(repr=False)
    epsilon: float
    status: str

    def __getitem__(self, new: str) -> list[str]:
        return self.groups[new]

    def __iter__(self) -> Iterator[str]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)


def suggest_partition(ds: xr.Dataset, n: int, *, within: str | None = None, epsilon: float | None = None) -> Suggestion:
    """The greedy merging into ``n`` groups that loses least of g-bar' H-bar^-1 g-bar / 2.

    Parameters
    ----------
    n
        The number of groups to keep.
    within
        A coordinate on ``group`` such as ``"kind"`` or ``"layer"``: only groups with the same value are merged.
    epsilon
        What to add to H-bar, epsilon Diag(|H-bar_ss|), without unit. By default nothing where H-bar is positive
        definite on the groups that have an effect, and otherwise twice the most negative eigenvalue of the equilibrated
        H-bar (the largest over a series), which makes it so.

    Returns
    -------
    Suggestion
        A mapping for `merge`. Groups without effect cost nothing and join a group of their layer, so that fewer than
        ``n`` may come out. Groups whose entries are missing, or that have a slope and no curvature, stay alone. In a
        series the sum over the computed
        checkpoints of the shares lost is what decides, so that one partition serves the whole run.

    Raises
    ------
    ArgumentError
        ``n`` is out of range, or cannot be reached ``within``.
    SchemaError
        D1 or D2 is missing.

    >>> from hoanalysis.analysis.example import example
    >>> from hoanalysis.analysis.merge import merge
    >>> merge(example(), suggest_partition(example(), 2)).sizes["group"]
    2
    """
    ones, systems = _computed(ds)
    labels, used = schema.labels(ds), _used(systems)
    null = np.logical_and.reduce([s.null for s in systems]) & used.any()
    alone = ~(used | null)
    _check(n, len(labels), fewest(ds))
    strength = _epsilon(ones, systems, used) if epsilon is None else _strength(epsilon)
    models = [Model.of(one, s, used, strength) for one, s in zip(ones, systems, strict=True)]
    members: list[list[int]] = [[int(s)] for s in np.flatnonzero(used)]
    path = merge_cheapest(models, members, _values(ds, within), n - int(alone.sum()), labels)
    _join_null(members, np.flatnonzero(null), ds)
    groups = _named(sorted([*members, *([int(s)] for s in np.flatnonzero(alone))]), labels)
    path["groups"] += int(alone.sum())
    kept, error = _kept(ones, systems, used, members, strength)
    return Suggestion(groups, kept, error, path, strength, _status(labels, null, alone, strength, epsilon is None))


def fewest(ds: xr.Dataset) -> int:
    """The smallest number of groups that `suggest_partition` can reach: those that stay alone, and one more."""
    _, systems = _computed(ds)
    used = _used(systems)
    null = np.logical_and.reduce([s.null for s in systems]) & used.any()
    return int((~(used | null)).sum()) + int(used.any())


def kept_share(ds: xr.Dataset, by: By, *, epsilon: float | None = None) -> tuple[float, float]:
    """The share of g-bar' H-bar^-1 g-bar / 2 that one rate per group of the partition ``by`` keeps, and its error.

    ``by`` is what `merge` takes: ``"layer"``, ``"kind"``, a number or a mapping.
    """
    ones, systems = _computed(ds)
    used = _used(systems)
    strength = _epsilon(ones, systems, used) if epsilon is None else _strength(epsilon)
    return _kept(ones, systems, used, [m for m in groups_of(ds, by).values() if used[m].any()], strength)


def _computed(ds: xr.Dataset) -> tuple[list[xr.Dataset], list[System]]:
    require(ds, "D1", "D2")
    ones = [one for one in checkpoints(ds) if np.isfinite(one["D1"].values).any()]
    if not ones:
        raise ArgumentError("no partition can be suggested: D1 and D2 are not computed", do="run the study first")
    return ones, [system(one) for one in ones]


def _strength(epsilon: float) -> float:
    value = number(epsilon, "epsilon")
    if not (np.isfinite(value) and value >= 0):
        raise ArgumentError(f"epsilon must be 0 or more, and finite, not {epsilon!r}", do="leave it out")
    return value


def _used(systems: list[System]) -> Array:
    """Groups that have an effect and a scale at every computed checkpoint."""
    return np.logical_and.reduce([s.used for s in systems])


def _check(n: int, size: int, least: int) -> None:
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or not least <= n <= size:
        raise ArgumentError(
            f"cannot merge {size} groups into {n!r}",
            why=f"{least - 1} of them cannot be merged" if least > 1 else "",
            do=f"give a number from {least} to {size}",
        )


def _epsilon(ones: list[xr.Dataset], systems: list[System], used: Array) -> float:
    """0 where the equilibrated H-bar is positive definite beyond rounding, twice its most negative eigenvalue else."""
    strength = 0.0
    for one, groups in zip(ones, systems, strict=True):
        c, _ = equilibrated(tensors(one, ["D1", "D2"]), groups, used)
        values = np.linalg.eigvalsh(c) if np.isfinite(c).all() else np.zeros(0)
        floor = 8 * rounding(one) * len(values) * np.max(np.abs(values), initial=0.0)
        if len(values) and values[0] <= floor:
            strength = max(strength, 2 * max(-float(values[0]), float(floor)))
    return strength


def _values(ds: xr.Dataset, within: str | None) -> Array:
    if within is None:
        return np.zeros(ds.sizes[schema.GROUP], dtype=int)
    fitting = [str(c) for c in ds.coords if ds[c].dims == (schema.GROUP,) and c != schema.GROUP]
    if within not in fitting:
        raise ArgumentError(f"groups have no coordinate {within!r}", where="within", do=nearest(str(within), fitting))
    return ds[within].values.astype(str)


def _join_null(members: list[list[int]], null: Array, ds: xr.Dataset) -> None:
    """Each group without effect joins a group of its layer, else the one before it: neither costs anything."""
    layers = ds["layer"].values.astype(str) if "layer" in ds.coords else np.array(schema.labels(ds))
    for s in map(int, null):
        near = [m for m in members if any(layers[i] == layers[s] for i in m)]
        host = near[0] if near else max(members, key=lambda m: (max(i for i in [*m, -1] if i < s or i < 0), -m[0]))
        host.append(s)
        host.sort()


def _named(groups: list[list[int]], labels: list[str]) -> dict[str, list[str]]:
    """Two or three members by all their names, more by the first; apart from the labels that exist."""
    found: dict[str, list[str]] = {}
    for group in groups:
        members = [labels[i] for i in group]
        name = " + ".join(members) if len(members) <= 3 else f"{members[0]} + {len(members) - 1} more"
        while len(members) > 1 and (name in labels or name in found):
            name += " (merged)"
        found[name] = members
    return found


def _kept(
    ones: list[xr.Dataset], systems: list[System], used: Array, members: list[list[int]], strength: float
) -> tuple[float, float]:
    """The share of the gain that the merged system keeps, solved anew, and its error; the mean over checkpoints."""
    place = np.cumsum(used) - 1
    onto = np.zeros((int(used.sum()), len(members)))
    for k, group in enumerate(members):
        onto[[place[s] for s in group if used[s]], k] = 1.0
    shares, errors = [], []
    for one, groups in zip(ones, systems, strict=True):

        def share(t: Tensors, groups: System = groups) -> Array:
            c, b = equilibrated(t, groups, used)
            c = c + strength * np.diag(np.abs(np.diagonal(c)))
            whole = onto * groups.scale[used][:, None]  # H-bar' = onto' H-bar onto, with H-bar = scale C scale
            merged, slope = whole.T @ c @ whole, whole.T @ b
            return np.asarray(_gain(merged, slope) / _gain(c, b)) if len(b) else np.asarray(1.0)

        shares.append(float(share(tensors(one, ["D1", "D2"]))))
        errors.append(float(standard_error(one, ["D1", "D2"], share)))
    return float(np.mean(shares)), float(np.mean(errors))


def _gain(h: Array, g: Array) -> float:
    size = np.sqrt(np.abs(np.diagonal(h)))
    size = np.where(size > 0, size, 1.0)
    return float(g / size @ solve(h / np.outer(size, size), g / size))


def _status(labels: list[str], null: Array, alone: Array, strength: float, chosen: bool) -> str:
    names, lines = np.array(labels, dtype=object), []
    if null.any():
        lines.append(f"null groups: {listed(names[null])} have no effect and join others at no cost.")
    if alone.any():
        lines.append(
            f"alone: {listed(names[alone])} have missing entries, or a slope and no curvature, at some checkpoint, and "
            f"are not merged."
        )
    if strength and chosen:
        lines.append(
            f"indefinite: H-bar is not positive definite, so that its gain has no maximum; epsilon = {strength:.3g} of "
            f"its diagonal was added before judging. Give epsilon= to choose another."
        )
    return "\n".join(lines) or "ok: H-bar is positive definite on the groups that have an effect."
