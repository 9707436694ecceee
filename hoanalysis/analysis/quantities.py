"""The quantities that two checkpoints are compared in: what each is computed from, and how."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from hoanalysis import schema
from hoanalysis.analysis.arrays import Array, Tensors
from hoanalysis.analysis.groups import system
from hoanalysis.analysis.interactions import SHARES, shares_of
from hoanalysis.analysis.inverse import scale_free_of
from hoanalysis.analysis.regularized import Solver

Estimate = Callable[[Tensors], Array]


@dataclass(frozen=True)
class Quantity:
    """``estimate(checkpoint)`` is the function of the tensors ``needs`` whose value has ``order`` group dims."""

    name: str
    title: str
    units: str
    order: int
    needs: tuple[str, ...]
    estimate: Callable[[xr.Dataset], Estimate]

    @property
    def stored(self) -> bool:
        """Whether the Dataset holds the quantity itself, and not only what it is computed from."""
        return self.needs == (self.name,)


def quantities(held: Sequence[str], orders: Sequence[int]) -> list[Quantity]:
    """What can be computed from the variables ``held``: the summaries first, then what rescaling leaves unchanged."""
    found = [_stored(schema.LOSS, "loss", 0)]
    found += [_stored(schema.derivative(d), schema.derivative(d), d) for d in orders]
    found += [_stored(schema.diagonal(d), f"diagonal of D{d}", 1) for d in range(1, 5)]
    found.append(_stored(schema.CHANGE_REMOVED, "change of the loss when the group moves by its whole direction", 1))
    matrix = ("D1", "D2")
    found.append(Quantity("scale_free", "scale-free H-bar", "1", 2, matrix, _scale_free))
    found.append(Quantity("learning_rates", "learning rate (no regularization)", "1", 1, matrix, _rates))
    found += [
        Quantity(name, SHARES[name], "1", 0, matrix, _share(i)) for i, name in enumerate(("off_diagonal", "off_block"))
    ]
    return [q for q in found if set(q.needs) <= set(held)]


def _stored(name: str, title: str, order: int) -> Quantity:
    return Quantity(name, title, "loss", order, (name,), lambda one: lambda t: t[name])


def _scale_free(one: xr.Dataset) -> Estimate:
    groups = system(one)
    return lambda t: scale_free_of(groups, t["D2"])


def _rates(one: xr.Dataset) -> Estimate:
    return Solver.of(one, None, 1.0)


def _share(i: int) -> Callable[[xr.Dataset], Estimate]:
    def of(one: xr.Dataset) -> Estimate:
        groups = system(one)
        layers = one["layer"].values.astype(str) if "layer" in one.coords else one[schema.GROUP].values.astype(str)
        apart = layers[:, None] != layers[None, :]
        return lambda t: np.asarray(shares_of(groups, t["D2"], apart)[i])

    return of
