"""Merging the cheapest pair of groups again and again, on quadratic models: the loop behind `coarsen`."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr

from hoanalysis.analysis.arrays import Array, Tensors, tensors
from hoanalysis.analysis.groups import System
from hoanalysis.analysis.linear import inverse_of
from hoanalysis.errors import ArgumentError


def equilibrated(t: Tensors, groups: System, used: Array) -> tuple[Array, Array]:
    """C and the equilibrated D1 over the ``used`` groups, shapes (m, m) and (m,)."""
    scale = groups.scale[used]
    return t["D2"][np.ix_(used, used)] / np.outer(scale, scale), t["D1"][used] / scale


@dataclass
class Model:
    """P = H-bar^-1 and eta = P g-bar over the groups that are left, and g-bar' P g-bar at the start."""

    inverse: Array
    rates: Array
    gain: float

    @classmethod
    def of(cls, one: xr.Dataset, groups: System, used: Array, strength: float) -> "Model":
        c, b = equilibrated(tensors(one, ["D1", "D2"]), groups, used)
        if not np.isfinite(c).all():
            raise ArgumentError(
                "no partition can be suggested: some entries of D2 are not numbers",
                do="drop the checkpoint or the groups that have them",
            )
        inverted = inverse_of(c + strength * np.diag(np.abs(np.diagonal(c))))
        scale = groups.scale[used]
        return cls(inverted / np.outer(scale, scale), inverted @ b / scale, float(b @ inverted @ b))

    def cost(self) -> Array:
        """The share of the gain that merging each pair loses, shape (m, m)."""
        size = np.diagonal(self.inverse)
        spread = self.inverse * -2.0
        spread += size[:, None]
        spread += size[None, :]
        np.maximum(spread, np.finfo(float).tiny, out=spread)  # 0 for two groups that are one and the same
        cost = np.subtract.outer(self.rates, self.rates)
        np.square(cost, out=cost)
        cost /= spread
        return cost / self.gain if self.gain > 0 else cost

    def merge(self, a: int, b: int) -> None:
        """One rate for a and b: the rank-one update of `coarsen`, with b's place taken by the last group."""
        column = self.inverse[:, a] - self.inverse[:, b]
        spread = column[a] - column[b]
        if spread > 0:
            self.rates -= column * ((self.rates[a] - self.rates[b]) / spread)
            self.inverse -= np.outer(column, column / spread)
        last = len(self.rates) - 1
        self.rates[b] = self.rates[last]
        self.inverse[b, :] = self.inverse[last, :]
        self.inverse[:, b] = self.inverse[:, last]
        self.rates, self.inverse = self.rates[:last], self.inverse[:last, :last]


def merge_cheapest(
    models: list[Model], members: list[list[int]], values: Array, n: int, labels: list[str]
) -> pd.DataFrame:
    """Merge in ``members``, the cheapest pair first, until ``n`` are left; the path that this takes."""
    value = np.array([values[m[0]] for m in members], dtype=object)
    kept = 1.0
    path: list[tuple[int, float, str]] = [(len(members), kept, "")]
    while len(members) > max(n, 1):
        cost = sum((model.cost() for model in models[1:]), models[0].cost()) / len(models)
        np.fill_diagonal(cost, np.inf)
        cost[value[:, None] != value[None, :]] = np.inf
        a, b = sorted(int(i) for i in np.unravel_index(np.argmin(cost), cost.shape))
        if not np.isfinite(cost[a, b]):
            raise ArgumentError(
                f"no two of the {len(members)} groups left may be merged", do="give a larger n, or leave out within="
            )
        for model in models:
            model.merge(a, b)
        kept -= float(cost[a, b])
        path.append((len(members) - 1, kept, " + ".join(labels[members[i][0]] for i in (a, b))))
        members[a] = sorted(members[a] + members[b])
        members[b], value[b] = members[-1], value[-1]
        members.pop()
        value = value[:-1]
    return pd.DataFrame(path, columns=["groups", "kept", "merged"])
