"""The cubic step: the minimizer of the second-order model plus an anisotropic cubic term.

    m(eta) = -g.eta + eta.H eta / 2 + (lambda/6) ||D eta||^3,   D = Diag(r)^(1/2)

Its stationary points are eta = (H + sigma D^2)^-1 g with sigma = lambda/2 ||D eta||; the one of largest ||D eta|| is
the global minimizer (Nesterov and Polyak 2006; design: arXiv 2312.03885, Section 3.3). With D regular, y = D eta turns
this into a secular equation in the eigenbasis of A = D^-1 H D^-1,

    || (A + sigma I)^-1 b || = 2 sigma / lambda,   b = D^-1 g,   sigma >= sigma_0 = max(0, -lambda_min(A)),

whose left side falls and whose right side rises: one root, or none, and that is the hard case (b has no part along the
eigenvectors of lambda_min): then sigma = sigma_0 and a multiple of such an eigenvector is added; both signs are global
minimizers, and the one whose largest component is positive is taken. Where r_s = 0, D is singular: those
groups are eliminated first, eta_Z = H_ZZ^-1 (g_Z - H_ZR eta_R), which leaves the same problem on the Schur complement.
"""

from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh
from scipy.optimize import brentq

from hoanalysis.analysis.arrays import Array
from hoanalysis.analysis.linear import solve


@dataclass(frozen=True)
class CubicStep:
    """``eta`` (S,), ``sigma`` = lambda/2 ||D eta||, and whether it is the hard case."""

    eta: Array
    sigma: float
    hard: bool


def cubic_step(h: Array, g: Array, r: Array, strength: float, zero: Array | None = None) -> CubicStep:
    """The stationary point of largest ||D eta||.

    Parameters
    ----------
    h, g, r
        H-bar (S, S), g-bar (S,) and r (S,), best equilibrated (C, and r_s / |H_ss|).
    strength
        lambda > 0, without unit.
    zero
        Groups whose r counts as 0; by default those where it is exactly 0.
    """
    free = (r == 0) if zero is None else zero
    held = ~free
    if free.all():
        return CubicStep(solve(h, g), 0.0, False)
    onto = solve(h[np.ix_(free, free)], np.column_stack([h[np.ix_(free, held)], g[free]]))
    schur = h[np.ix_(held, held)] - h[np.ix_(held, free)] @ onto[:, :-1]
    d = np.sqrt(r[held])
    y, sigma, hard = _secular(
        (schur + schur.T) / (2 * np.outer(d, d)), (g[held] - h[np.ix_(held, free)] @ onto[:, -1]) / d, strength
    )
    eta = np.zeros_like(g)
    eta[held] = y / d
    eta[free] = onto[:, -1] - onto[:, :-1] @ eta[held]
    return CubicStep(eta, sigma, hard)


def _secular(a: Array, b: Array, strength: float) -> tuple[Array, float, bool]:
    """y, sigma and the hard case of || (A + sigma I)^-1 b || = 2 sigma / lambda."""
    values, vectors = eigh(a)
    c = vectors.T @ b
    low = max(0.0, -values[0])
    gaps = values + low if low == 0 else values - values[0]  # the distance to the pole, without cancellation
    excess = _root(gaps, c, low, strength)
    if excess is not None:
        return vectors @ (c / (gaps + excess)), low + excess, False
    y = vectors @ np.divide(c, gaps, out=np.zeros_like(c), where=gaps > _tiny(gaps))
    bottom = vectors[:, 0] * np.sign(vectors[np.argmax(np.abs(vectors[:, 0])), 0])
    return y + bottom * np.sqrt(max((2 * low / strength) ** 2 - y @ y, 0.0)), low, low > 0


def _tiny(gaps: Array) -> float:
    return 4 * np.finfo(float).eps * float(gaps[-1]) * len(gaps)


def _root(gaps: Array, c: Array, low: float, strength: float) -> float | None:
    """sigma - sigma_0 at the root, found on a log scale; None in the hard case.

    At sigma - sigma_0 = sqrt(lambda |b| / 2) the right side is the larger, because |y| <= |b| / (sigma - sigma_0).
    """
    size = float(np.linalg.norm(c))
    if size == 0:
        return 0.0 if low == 0 else None
    high = np.sqrt(strength * size / 2) * (1 + 1e-12)
    at_pole = np.abs(c) <= 4 * np.finfo(float).eps * size * len(c)
    c = np.where((gaps <= _tiny(gaps)) & at_pole & (low > 0), 0.0, c)  # rounding of the eigenvectors, not a component

    def surplus(log_excess: float) -> float:
        excess = np.exp(log_excess)
        return float(np.linalg.norm(c / (gaps + excess)) - 2 * (low + excess) / strength)

    ends = np.log(high) - 300.0, np.log(high)
    if surplus(ends[0]) <= 0:
        return None
    return float(np.exp(brentq(surplus, *ends, xtol=1e-14, rtol=4 * np.finfo(float).eps, maxiter=500)))
