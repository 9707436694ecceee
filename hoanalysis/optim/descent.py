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

Curvature = Literal["signed", "absolute", "separable"]
CURVATURES = ("signed", "absolute", "separable")
THIRD = {None: "", "ridge": "", "r": schema.diagonal(3), "cubic": schema.diagonal(3)}

FLOOR = 1.0  # of the equilibrated curvature along any combination of groups: that of a single group
LEAST = 1e-6  # of the largest y: a group without slope does not move, whatever bounds its curvature
SHARE = 0.5  # of the solution: it holds for several steps. docs/optimizer.md


@dataclass(frozen=True)
class Descent:
    """H-bar_reg eta = g-bar, and which of its solutions are taken.

    ``curvature="absolute"`` replaces H-bar by its absolute value, before it is regularized. In equilibrated form
    C_st = H_st / sqrt|H_ss H_tt| for s != t, and C_ss = 1 whatever the sign of H_ss: a negative curvature of a group by
    itself counts as |H_ss| first, and only then C is taken apart, C = V Diag(w) V^T:

        |C| = V Diag(max(|w|, FLOOR)) V^T,     eta = SHARE (|C|_reg)^-1 g-bar,

    so that eta goes down the second-order model (saddle-free Newton, Dauphin et al. 2014), and the noise of g-bar is
    not magnified where groups act on the loss alike and C has nearly the rank 1.

    ``curvature="separable"`` replaces it by a diagonal that bounds it: with y_s = |g-bar_s| / sqrt|H_ss|

        M_ss = |H_ss| sum_t |C_st| y_t / y_s,     eta . H-bar . eta <= sum_s M_ss eta_s^2 for every eta,

    since 2 |x_s x_t| <= x_s^2 y_t / y_s + x_t^2 y_s / y_t, x_s = sqrt|H_ss| eta_s, for any positive y. So no group's
    rate relies on what another does: each has the sign of its slope, and the second-order model falls whichever of them
    are left out. Groups share what curvature allows as their own Newton steps ask for it.

    ``negative``: "keep" negative rates, which climb along u^s because H-bar says that the other groups more than make
    up for it, or "clip" them at 0. ``trust``: rates that are not ``trust`` standard errors away from 0 are 0.
    """

    regularization: Regularization
    curvature: Curvature
    epsilon: float
    negative: str
    trust: float
    eps: float  # rounding of the parameters' dtype
    labels: tuple[str, ...]

    def rates(self, known: Known, measured: Known) -> tuple[Array | None, list[str]]:
        """eta, shape (S,), without unit, 0 for groups that must not move; None where no rate makes sense, and why.

        Which groups have an effect is a matter of what was ``measured``: in ``known`` the slopes may be those of steps,
        of gradients in another precision.
        """
        groups = system_of(dict(measured.tensors), known.norms, self.eps)
        names, said = np.array(self.labels, dtype=object), _said(groups, known.norms, self.labels)
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
        third = THIRD[self.regularization]
        solver = Solver(groups, self.regularization, self.epsilon, third, self.eps ** (2 / 3))
        if self.curvature == "absolute":
            return lambda t: SHARE * solver({**t, "D2": absolute(groups, t["D2"])}), False
        if self.curvature == "separable":
            return lambda t: solver({**t, "D2": separable(groups, t["D1"], t["D2"])}), False
        return solver, self.regularization == "cubic" and solver.equilibrated(dict(known.tensors)).hard

    @staticmethod
    def _error(solver: Callable[[Tensors], Array], known: Known) -> Array:
        """The delete-one jackknife over the batches: sqrt( (n-1)/n sum_k (eta_(k) - mean)^2 ); NaN counts as unsure."""
        each = np.stack([solver(one) for one in known.without_one])
        n = len(each)
        error = np.sqrt((n - 1) / n * np.square(each - each.mean(0)).sum(0))
        return np.nan_to_num(error, nan=np.inf)


def absolute(groups: System, d2: Array) -> Array:
    """|H-bar|, shape (S, S), over the used groups and 0 elsewhere; NaN where an entry is missing."""
    use, scale = groups.used, groups.scale[groups.used]
    c = d2[np.ix_(use, use)] / np.outer(scale, scale)
    out = np.zeros_like(d2)
    if np.isfinite(c).all():
        c[np.diag_indices_from(c)] = np.abs(np.diagonal(c))
        w, v = np.linalg.eigh(c)
        c = (v * np.maximum(np.abs(w), FLOOR)) @ v.T
    out[np.ix_(use, use)] = c * np.outer(scale, scale)
    return out


def separable(groups: System, d1: Array, d2: Array) -> Array:
    """Diag(M), shape (S, S), over the used groups and 0 elsewhere; NaN where an entry is missing."""
    use, scale = groups.used, groups.scale[groups.used]
    c = np.abs(d2[np.ix_(use, use)]) / np.outer(scale, scale)
    y = np.abs(d1[use]) / scale
    y = np.maximum(y, LEAST * y.max()) if y.max() > 0 else np.ones_like(y)
    out = np.zeros_like(d2)
    i = np.flatnonzero(use)
    out[i, i] = (c @ y) / y * scale**2
    return out


def _said(groups: System, norms: Array, labels: tuple[str, ...]) -> list[str]:
    names = np.array(labels, dtype=object)
    return [
        *_about(names[norms == 0], "without a direction when measured, the rate before holds"),
        *_about(names[groups.null & (norms > 0)], "without effect, not moved"),
        *_about(names[groups.flat], "with a slope and no curvature, not moved"),
    ]


def _about(names: Array, what: str) -> list[str]:
    return [f"{what}: {listed(names)}"] if len(names) else []
