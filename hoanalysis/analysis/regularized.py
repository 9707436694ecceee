"""H-bar_reg, equilibrated, and the solve with it: shared by learning rates, inverses and the advice about them."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import xarray as xr

from hoanalysis.analysis.arrays import Array, Tensors, number, require
from hoanalysis.analysis.cubic import cubic_step
from hoanalysis.analysis.groups import System, rounding, system
from hoanalysis.analysis.linear import solve
from hoanalysis.analysis.regularizer import r_of, third
from hoanalysis.errors import ArgumentError, nearest

Regularization = Literal["ridge", "r", "cubic"] | None
REGULARIZATIONS: tuple[Regularization, ...] = (None, "ridge", "r", "cubic")
#: What ``epsilon`` is measured in.
EPSILON_UNITS = {None: "", "ridge": "1", "r": "loss^(1/3)", "cubic": "1"}


def check(regularization: Regularization, epsilon: float) -> None:
    """Raise `ArgumentError` on an unknown regularization or an epsilon that is not positive and finite."""
    if regularization not in REGULARIZATIONS:
        names = [str(name) for name in REGULARIZATIONS]
        raise ArgumentError(f"unknown regularization {regularization!r}", do=nearest(str(regularization), names))
    number(epsilon, "epsilon")
    if regularization is not None and not (np.isfinite(epsilon) and epsilon > 0):
        raise ArgumentError(
            f"epsilon must be positive and finite, not {epsilon!r}",
            do="use 1.0, or regularization=None for none at all",
        )


def needed(ds: xr.Dataset, regularization: Regularization) -> list[str]:
    """The variables that a solve with this regularization reads; `SchemaError` where one is missing."""
    require(ds, "D1", "D2")
    return ["D1", "D2"] + ([third(ds)] if regularization in ("r", "cubic") else [])


@dataclass(frozen=True)
class Solved:
    """Over the n used groups: ``rates`` (n,) in units of the equilibrated problem, ``matrix`` (n, n) = C_reg."""

    rates: Array
    matrix: Array
    hard: bool = False


@dataclass(frozen=True)
class Solver:
    """Solves H-bar_reg eta = g-bar for any tensors, with the groups and scales of one point held fixed.

    ``third`` is the name of the tensor that holds D3[s,s,s]; ``limit`` the share of the largest r below which r is 0.
    """

    groups: System
    regularization: Regularization
    epsilon: float
    third: str
    limit: float

    @classmethod
    def of(cls, one: xr.Dataset, regularization: Regularization, epsilon: float) -> "Solver":
        """The solver of one checkpoint."""
        name = third(one) if regularization in ("r", "cubic") else ""
        return cls(system(one), regularization, epsilon, name, rounding(one) ** (2 / 3))

    def __call__(self, t: Tensors) -> Array:
        """eta, shape (S,), NaN for the groups left out."""
        return self.groups.spread(self.equilibrated(t).rates / self.groups.scale[self.groups.used])

    def equilibrated(self, t: Tensors) -> Solved:
        """The solve in equilibrated form; NaN where an entry is missing."""
        c, b = self.groups.equilibrated(t)
        rho = self._rho(t, len(b))
        if not (len(b) and np.isfinite(c).all() and np.isfinite(rho).all()):
            return Solved(np.full_like(b, np.nan), np.full_like(c, np.nan))
        if self.regularization == "cubic":
            step = cubic_step(c, b, rho, self.epsilon, zero=negligible(rho, self.limit))
            return Solved(step.eta, c + step.sigma * np.diag(rho), step.hard)
        matrix = c + self._addition(c, rho)
        return Solved(solve(matrix, b), matrix)

    def _rho(self, t: Tensors, n: int) -> Array:
        """r_s / |H_ss|, which no rescaling changes."""
        used = self.groups.used
        return r_of(t, self.third)[used] / self.groups.scale[used] ** 2 if self.third else np.zeros(n)

    def _addition(self, c: Array, rho: Array) -> Array:
        if self.regularization is None:
            return np.zeros_like(c)
        return self.epsilon * np.diag(np.abs(np.diagonal(c)) if self.regularization == "ridge" else rho)


def negligible(rho: Array, limit: float) -> Array:
    """Where r is 0, or rounding noise: rho_s <= eps^(2/3) max rho, because D3[s,s,s] carries a relative error eps."""
    return rho <= limit * np.max(rho, initial=0.0)
