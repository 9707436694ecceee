"""The numbers behind the explorer's picture at one checkpoint: merged exactly, with their errors, numpy alone.

What is shown of D^(d) is a vector (d = 1) or a matrix over pairs of groups: H-bar, its inverse, the scale-free H-bar,
or for d >= 3 the slice D^(d)[:, :, u, ..] at fixed further groups, raw or scale-free,

    A_stu.. = D^(d)[s,t,u,..] / sqrt|H_ss H_tt H_uu ..|                                loss^(1 - d/2)

Merging groups sums the slices of the stored tensors first (`analysis.merge`); the third and further indices are summed
over the members of u alone, so that the merged D^(d) is never made. Errors of what is linear in the tensors are the
stored ones, or those of the summed blocks; all others are the delete-one jackknife over the kept blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import factorial
from typing import Any

import numpy as np
import xarray as xr

from hoanalysis import schema
from hoanalysis.analysis.arrays import Array, Blocks, Tensors, kept_blocks, require, stored, tensor, tensors
from hoanalysis.analysis.compare import INDEPENDENT, PAIRED
from hoanalysis.analysis.errorbars import error_of_mean, jackknife
from hoanalysis.analysis.groups import System, system
from hoanalysis.analysis.inverse import scale_free_of
from hoanalysis.analysis.linear import inverse_of
from hoanalysis.analysis.matching import common_groups, comparable, same_data
from hoanalysis.analysis.merge import By, groups_of, merge
from hoanalysis.analysis.regularized import Regularization, Solver, check, needed
from hoanalysis.analysis.taylor import highest_order

SLICE = "slice"


@dataclass(frozen=True)
class Estimate:
    """A function of the tensors of one checkpoint, with what it is applied to."""

    labels: tuple[str, ...]
    tensors: Tensors
    blocks: Blocks | None
    function: Callable[[Tensors], Array]
    stored_error: Array | None
    title: str
    units: str

    def value(self) -> Array:
        """Shape (S,) or (S, S)."""
        return np.asarray(self.function(self.tensors), dtype=float)

    def error(self) -> Array:
        """Its standard error; NaN where no blocks are kept."""
        if self.stored_error is not None:
            return self.stored_error
        if self.blocks is None:
            return np.full(np.shape(self.value()), np.nan)
        return jackknife(self.function, self.blocks)


@dataclass(frozen=True)
class Shown:
    """What is drawn: labels of both sides, values and errors of shape (S,) or (S, S), title and unit.

    ``how`` is empty, or says how the error of a difference was found.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: Array
    errors: Array
    title: str
    units: str
    how: str = ""

    @property
    def settled(self) -> Array:
        """Where an entry is told from 0 by two standard errors; unknown errors count as settled."""
        return ~(np.abs(self.values) < 2 * self.errors)


class Checkpoint:
    """One checkpoint under one grouping. ``by`` is what `merge` takes, or None for the groups as stored."""

    def __init__(self, one: xr.Dataset, by: By | None) -> None:
        require(one, "D1")
        self.one = one
        self.groups = groups_of(one, by) if by is not None else {g: [i] for i, g in enumerate(schema.labels(one))}
        self.merges = any(len(m) > 1 for m in self.groups.values())
        light = one[[n for n in _light_names(one) if n in one]]
        self.light = light if by is None else merge(light, by)
        if "D3" in one:
            self.light = self.light.assign(_diagonal(one, list(self.groups.values())))
        self.labels = tuple(self.groups)

    # ---- what is drawn ---------------------------------------------------------------------------------------------

    def slope(self) -> Estimate:
        """D1, shape (S,)."""
        return self._stored("D1", "pseudo-gradient D1")

    def matrix(self, which: str, regularization: Regularization = None, epsilon: float = 1.0) -> Estimate:
        """H-bar, its inverse or the scale-free H-bar, shape (S, S)."""
        require(self.light, "D1", "D2")
        if which == "H":
            return self._stored("D2", "pseudo-Hessian")
        if which == "scale_free":
            groups = system(self.light)
            return self._derived(["D2"], lambda t: scale_free_of(groups, t["D2"]), "scale-free pseudo-Hessian", "1")
        check(regularization, epsilon)
        names = needed(self.light, regularization)
        solver = Solver.of(self.light, regularization, epsilon)

        def inverse(t: Tensors) -> Array:
            scale = solver.groups.scale[solver.groups.used]
            return solver.groups.spread(inverse_of(solver.equilibrated(t).matrix) / np.outer(scale, scale))

        return self._derived(names, inverse, "inverse of the pseudo-Hessian", "1/loss")

    def slice(self, order: int, at: Sequence[str], scale_free: bool) -> Estimate:
        """D^(order)[:, :, at..], shape (S, S)."""
        name = schema.derivative(order)
        require(self.one, name)
        members = [self.groups[g] for g in at]
        values = self._cut(stored(self.one, name), members)
        blocks = self._blocks_of_slice(name, members, ["D1", "D2", SLICE] if scale_free else [SLICE])
        words = " x ".join(at)
        if scale_free:
            groups, place = system(self.light), [self.labels.index(g) for g in at]
            function = _scale_free_slice(groups, place)
            title, units = f"scale-free D{order}, slice of {words}", f"loss^({2 - order}/2)"
            return Estimate(self.labels, {"D2": self._d2(), SLICE: values}, blocks, function, None, title, units)
        error = None
        if not self.merges and schema.error_of(name) in self.one:
            error = self._cut(stored(self.one, schema.error_of(name)), members)
        elif blocks is not None:
            error = error_of_mean(blocks.means(SLICE), blocks.weight)
        title = f"D{order}, slice of {words}"
        return Estimate(self.labels, {SLICE: values}, blocks, lambda t: t[SLICE], error, title, "loss")

    def strongest_slice(self, order: int) -> tuple[str, ...]:
        """The groups u, .. whose slice of the scale-free D^(order) has the largest sum of sizes."""
        size = np.sqrt(np.abs(np.diagonal(self._d2())))
        used = system(self.light).used
        weight = np.divide(1.0, size, out=np.zeros_like(size), where=used & (size > 0))
        best: list[int] = []
        full = np.nan_to_num(tensor(self.one, schema.derivative(order)))
        owner = np.empty(self.one.sizes[schema.GROUP], dtype=int)
        for k, members in enumerate(self.groups.values()):
            owner[members] = k
        for _ in range(order - 2):  # the strongest last index, then the strongest within its slice
            sizes = np.abs(full)
            for _ in range(full.ndim - 1):
                sizes = weight[owner] @ sizes
            per_group = np.bincount(owner, weights=sizes, minlength=len(self.groups)) * weight
            best.append(int(np.argmax(per_group)))
            full = full[..., self.groups[self.labels[best[-1]]]].sum(-1)
        return tuple(self.labels[i] for i in best)

    def rates(self, regularization: Regularization, epsilon: float) -> Estimate:
        """The learning rates of theta - sum eta U, shape (S,); see `analysis.steps`."""
        check(regularization, epsilon)
        names = needed(self.light, regularization)
        solver = Solver.of(self.light, regularization, epsilon)
        return self._derived(names, solver, f"learning rates, {regularization or 'no'} regularization", "1")

    def along(self, rates: Array, taus: Array) -> tuple[Array, Array]:
        """The predicted change of the loss at theta - tau sum eta U by order, and its error, shape (orders, taus).

        f(tau) = sum_d (-tau)^d D^(d)[eta, .., eta] / d!, on the stored groups: each takes the rate of its merged one.
        """
        eta = np.zeros(self.one.sizes[schema.GROUP])
        for rate, members in zip(np.nan_to_num(rates), self.groups.values(), strict=True):
            eta[members] = rate
        names = [schema.derivative(d) for d in range(1, highest_order(self.one) + 1)]
        powers = np.stack([(-taus) ** d / factorial(d) for d in range(1, len(names) + 1)])
        if not np.isfinite(rates).any():
            return np.full_like(powers, np.nan), np.full_like(powers, np.nan)
        terms = np.array([_contracted(tensor(self.one, n), eta, 0) for n in names])
        values = np.cumsum(terms[:, None] * powers, axis=0)
        blocks = kept_blocks(self.one, names)
        if blocks is None:
            return values, np.full_like(values, np.nan)
        sums = np.stack([_contracted(blocks.sums[n], eta, 1) for n in names], axis=1)  # (B, orders)
        means = np.cumsum((sums / blocks.weight[:, None])[:, :, None] * powers, axis=1)
        return values, error_of_mean(means, blocks.weight)

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _d2(self) -> Array:
        require(self.light, "D1", "D2")
        return tensor(self.light, "D2")

    def _stored(self, name: str, title: str) -> Estimate:
        require(self.light, name)
        se = schema.error_of(name)
        shape = (len(self.labels),) * int(name[1:])
        error = tensor(self.light, se) if se in self.light else np.full(shape, np.nan)
        blocks = kept_blocks(self.light, [name])
        return Estimate(self.labels, tensors(self.light, [name]), blocks, lambda t: t[name], error, title, "loss")

    def _derived(self, names: list[str], function: Callable[[Tensors], Array], title: str, units: str) -> Estimate:
        blocks = kept_blocks(self.light, names)
        return Estimate(self.labels, tensors(self.light, names), blocks, function, None, title, units)

    def _cut(self, values: Array, members: Sequence[list[int]], lead: int = 0) -> Array:
        """Sum the trailing axes over the members of each u, then the two that remain over the groups; float64."""
        for m in reversed(members):
            values = values[..., m].astype(np.float64).sum(-1)
        if self.merges:
            for axis in (lead, lead + 1):
                values = np.stack([values.take(m, axis).sum(axis) for m in self.groups.values()], axis)
        return values

    def _blocks_of_slice(self, name: str, members: Sequence[list[int]], names: Sequence[str]) -> Blocks | None:
        """The kept blocks of what the slice is computed from: those that are filled in all of ``names``."""
        if (blocks := schema.blocks_of(name)) not in self.one:
            return None
        cut = self._cut(stored(self.one, blocks), members, lead=1)
        return kept_blocks(
            self.light.assign({schema.blocks_of(SLICE): ((schema.BATCH, *schema.group_dims(2)), cut)}), names
        )


def difference(a: Estimate, b: Estimate, one: xr.Dataset, other: xr.Dataset) -> Shown:
    """a - b over the groups that both have. Paired over the blocks of data where both keep the same ones.

    ``one`` and ``other`` are the Datasets that they are of, under the grouping shown.
    """
    comparable(one, other)
    labels, i, j = common_groups(one, other)

    def of(estimate: Estimate, at: list[int]) -> Callable[[Tensors], Array]:
        def taken(t: Tensors) -> Array:
            values = np.asarray(estimate.function(t))
            return values[np.ix_(*[at] * values.ndim)]

        return taken

    left, right = of(a, i), of(b, j)
    values = left(a.tensors) - right(b.tensors)
    x, y = a.blocks, b.blocks
    if same_data(one, other) and x is not None and y is not None and np.array_equal(x.weight, y.weight):
        sums = {f"a {n}": v for n, v in x.sums.items()} | {f"b {n}": v for n, v in y.sums.items()}

        def both(t: Tensors) -> Array:
            return left({n: t[f"a {n}"] for n in x.sums}) - right({n: t[f"b {n}"] for n in y.sums})

        errors, how = jackknife(both, Blocks(sums, x.weight)), PAIRED
    else:
        errors = np.hypot(*(e.error()[np.ix_(*[at] * values.ndim)] for e, at in ((a, i), (b, j))))
        how = INDEPENDENT
    return Shown(tuple(labels), tuple(labels), values, errors, f"difference of the {a.title}", a.units, how)


def _light_names(one: xr.Dataset) -> list[str]:
    """The variables that every view but slices and Taylor terms needs; the rest can be large."""
    small = ["D1", "D2", *([schema.diagonal(3)] if schema.diagonal(3) in one else [])]
    return [schema.LOSS, schema.error_of(schema.LOSS), schema.WEIGHT] + [
        name for n in small for name in (n, schema.error_of(n), schema.blocks_of(n))
    ]


def _diagonal(one: xr.Dataset, members: list[list[int]]) -> Mapping[str, Any]:
    """D3[A,A,A] of the merged groups A, from the full D3, as the variables of a stored diagonal."""
    name, found = schema.diagonal(3), {}
    full = {name: "D3"} | ({schema.blocks_of(name): schema.blocks_of("D3")} if schema.blocks_of("D3") in one else {})
    for new, old in full.items():
        values = stored(one, old)
        lead = values.ndim - 3
        cubes: list[Any] = [(..., *np.ix_(m, m, m)) for m in members]
        parts = [values[cube].astype(np.float64).sum((-3, -2, -1)) for cube in cubes]
        found[new] = ((*[schema.BATCH] * lead, schema.GROUP), np.stack(parts, -1), {"units": "loss"})
    return found


def _scale_free_slice(groups: System, at: Sequence[int]) -> Callable[[Tensors], Array]:
    def function(t: Tensors) -> Array:
        size = np.sqrt(np.abs(np.diagonal(t["D2"])))
        scale = np.where(groups.used & (size > 0), size, np.nan)
        return t[SLICE] / np.outer(scale, scale) / np.prod(scale[list(at)])

    return function


def _contracted(values: Array, eta: Array, lead: int) -> Array:
    """Every axis from ``lead`` on with eta."""
    for _ in range(values.ndim - lead):
        values = values @ eta
    return values
