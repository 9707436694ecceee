"""From information to learning rates: the solve of `hoanalysis.analysis.steps` with what guards a training run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hoanalysis import schema
from hoanalysis.analysis.advice import HARD
from hoanalysis.analysis.arrays import Tensors
from hoanalysis.analysis.groups import System, system_of
from hoanalysis.analysis.regularized import Regularization, Solver
from hoanalysis.errors import listed
from hoanalysis.optim.information import Array, Known

Solution = Regularization | Literal["absolute"]
THIRD = {None: "", "ridge": "", "absolute": "", "r": schema.diagonal(3), "cubic": schema.diagonal(3)}

FLOOR = 0.1  # of the equilibrated curvature along any combination of groups, where that of one group is 1
SHARE = 0.3  # of the rates: momentum goes on along u for several steps. docs/optimizer.md: 0.2 to 0.6 were tried


@dataclass(frozen=True)
class Descent:
    """H-bar_reg eta = g-bar, and which of its solutions are taken.

    "absolute" takes the absolute value of H-bar, in equilibrated form C_st = H_st / sqrt|H_ss H_tt| = V Diag(w) V^T:

        C_reg = (epsilon / SHARE) V Diag(max(|w|, FLOOR)) V^T,     so that every rate goes down the second-order model

    (saddle-free Newton, Dauphin et al. 2014), and the S rates do not explode where groups act on the loss alike.

    ``negative``: "keep" negative rates, which climb along u^s because H-bar says that the other groups more than make
    up for it, or "clip" them at 0. ``trust``: rates that are not ``trust`` standard errors away from 0 are 0.
    """

    regularization: Solution
    epsilon: float
    negative: str
    trust: float
    eps: float  # rounding of the parameters' dtype
    labels: tuple[str, ...]

    def rates(self, known: Known) -> tuple[Array | None, list[str]]:
        """eta, shape (S,), without unit, 0 for groups that must not move; None where no rate makes sense, and why."""
        groups = system_of(dict(known.tensors), known.norms, self.eps)
        names, said = np.array(self.labels, dtype=object), _said(groups, self.labels)
        if not groups.used.any():
            return None, [*said, "no group has curvature, so that no finite rate is best for any"]
        solver, hard = self._solver(groups, known)
        solution = solver(known.tensors)
        if not np.isfinite(solution[groups.used]).all():
            return None, [*said, "the system of the rates has no finite solution"]
        eta = np.nan_to_num(solution, nan=0.0)
        if hard:
            said.append(HARD)
        if self.trust:
            unsure = np.abs(eta) < self.trust * self._error(solver, known)
            said += _about(names[unsure & groups.used], f"below {self.trust:g} standard errors, set to 0")
            eta[unsure] = 0.0
        if (negative := eta < 0).any():
            said += _about(names[negative], "negative, " + ("clipped" if self.negative == "clip" else "kept"))
            eta = np.maximum(eta, 0.0) if self.negative == "clip" else eta
        return eta, said

    def _solver(self, groups: System, known: Known) -> tuple[Callable[[Tensors], Array], bool]:
        """Tensors -> eta, NaN for the groups left out; and whether the system is the hard case of the cubic step."""
        if self.regularization == "absolute":
            return lambda t: absolute(groups, t, self.epsilon), False
        third = THIRD[self.regularization]
        solver = Solver(groups, self.regularization, self.epsilon, third, self.eps ** (2 / 3))
        return solver, self.regularization == "cubic" and solver.equilibrated(dict(known.tensors)).hard

    @staticmethod
    def _error(solver: Callable[[Tensors], Array], known: Known) -> Array:
        """The delete-one jackknife over the batches: sqrt( (n-1)/n sum_k (eta_(k) - mean)^2 ); NaN counts as unsure."""
        each = np.stack([solver(one) for one in known.without_one])
        n = len(each)
        error = np.sqrt((n - 1) / n * np.square(each - each.mean(0)).sum(0))
        return np.nan_to_num(error, nan=np.inf)


def absolute(groups: System, t: Tensors, epsilon: float) -> Array:
    """The rates by the absolute value of the equilibrated H-bar, shape (S,), NaN for the groups left out."""
    c, b = groups.equilibrated(t)
    if not (len(b) and np.isfinite(c).all()):
        return np.full(len(groups.used), np.nan)
    c[np.diag_indices_from(c)] = np.abs(np.diagonal(c))
    w, v = np.linalg.eigh(c)
    y = v @ ((v.T @ b) / np.maximum(np.abs(w), FLOOR)) * SHARE / epsilon
    return groups.spread(y / groups.scale[groups.used])


def _said(groups: System, labels: tuple[str, ...]) -> list[str]:
    names = np.array(labels, dtype=object)
    return [
        *_about(names[groups.null], "without effect, not moved"),
        *_about(names[groups.flat], "with a slope and no curvature, not moved"),
    ]


def _about(names: Array, what: str) -> list[str]:
    return [f"{what}: {listed(names)}"] if len(names) else []
