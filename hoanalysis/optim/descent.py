"""From information to learning rates: the solve of `hoanalysis.analysis.steps` with what guards a training run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hoanalysis import schema
from hoanalysis.analysis.advice import HARD
from hoanalysis.analysis.groups import System, system_of
from hoanalysis.analysis.regularized import Regularization, Solver
from hoanalysis.errors import listed
from hoanalysis.optim.information import Array, Known

THIRD = {None: "", "ridge": "", "r": schema.diagonal(3), "cubic": schema.diagonal(3)}


@dataclass(frozen=True)
class Descent:
    """H-bar_reg eta = g-bar, and which of its solutions are taken.

    ``negative``: "keep" negative rates, which climb along u^s because H-bar says that the other groups more than make
    up for it, or "clip" them at 0. ``trust``: rates that are not ``trust`` standard errors away from 0 are 0.
    """

    regularization: Regularization
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
        solver = Solver(groups, self.regularization, self.epsilon, THIRD[self.regularization], self.eps ** (2 / 3))
        solved = solver.equilibrated(dict(known.tensors))
        eta = np.nan_to_num(groups.spread(solved.rates / groups.scale[groups.used]), nan=0.0)
        if not np.isfinite(solved.rates).all():
            return None, [*said, "the system of the rates has no finite solution"]
        if solved.hard:
            said.append(HARD)
        if self.trust:
            unsure = np.abs(eta) < self.trust * self._error(solver, known)
            said += _about(names[unsure & groups.used], f"below {self.trust:g} standard errors, set to 0")
            eta[unsure] = 0.0
        if (negative := eta < 0).any():
            said += _about(names[negative], "negative, " + ("clipped" if self.negative == "clip" else "kept"))
            eta = np.maximum(eta, 0.0) if self.negative == "clip" else eta
        return eta, said

    @staticmethod
    def _error(solver: Solver, known: Known) -> Array:
        """The delete-one jackknife over the batches: sqrt( (n-1)/n sum_k (eta_(k) - mean)^2 ); NaN counts as unsure."""
        each = np.stack([solver(dict(one)) for one in known.without_one])
        n = len(each)
        error = np.sqrt((n - 1) / n * np.square(each - each.mean(0)).sum(0))
        return np.nan_to_num(error, nan=np.inf)


def _said(groups: System, labels: tuple[str, ...]) -> list[str]:
    names = np.array(labels, dtype=object)
    return [
        *_about(names[groups.null], "without effect, not moved"),
        *_about(names[groups.flat], "with a slope and no curvature, not moved"),
    ]


def _about(names: Array, what: str) -> list[str]:
    return [f"{what}: {listed(names)}"] if len(names) else []
