"""Minimizing a polynomial within the region that its own terms vouch for: the curve behind `taylor_step`.

All in the equilibrated coordinates y = sqrt|H-bar_ss| eta, in which W is the identity and rescaling groups changes
nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import factorial

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import brentq

from hoanalysis.analysis.arrays import Array

FALL = 0.3  # the factor from one sigma on the curve to the next
LEAST = 1e-10  # below this sigma only 0 is tried


@dataclass(frozen=True)
class Polynomial:
    """f(y) = sum_k A_k[y, .., y] / k! over n groups, from its symmetric tensors A_1, .., A_d."""

    tensors: Sequence[Array]

    def terms(self, y: Array) -> Array:
        """The d terms at y."""
        return np.array([self._contracted(k, k, y) / factorial(k) for k in range(1, len(self.tensors) + 1)])

    def slope(self, y: Array) -> Array:
        return sum((self._contracted(k, k - 1, y) / factorial(k - 1) for k in self._from(2)), self.tensors[0])

    def curvature(self, y: Array) -> Array:
        return sum((self._contracted(k, k - 2, y) / factorial(k - 2) for k in self._from(3)), self.tensors[1])

    def _from(self, k: int) -> range:
        return range(k, len(self.tensors) + 1)

    def _contracted(self, k: int, times: int, y: Array) -> Array:
        out = self.tensors[k - 1]
        for _ in range(times):
            out = out @ y
        return out


@dataclass(frozen=True)
class Point:
    """A minimizer ``y`` of f(y) + sigma/2 |y|^2, and how the curve ended there."""

    y: Array
    sigma: float
    ending: str


def follow(f: Polynomial, share: float) -> Point:
    """Along the curve of minimizers from sigma = infinity to where it ends; see the head of `taylor_step`."""
    y = np.zeros_like(f.tensors[0])
    sigma = 4.0 * max(1.0, float(np.abs(np.linalg.eigvalsh(f.tensors[1])).max(initial=0.0)))
    while (start := _minimizer(f, sigma, y)) is None or max(_beyond(f, sigma, start, share)) > 0:
        sigma *= 4
        if sigma > 1e30:
            return Point(y * np.nan, np.nan, "nothing")
    y = start
    lower = sigma * FALL
    while True:
        after = _continued(f, sigma, lower, y)
        if after is None and sigma - lower > 1e-12 * sigma:  # the curve turns back before lower
            lower = (sigma + lower) / 2
            continue
        if after is None or max(_beyond(f, lower, after, share)) > 0:
            return _stopped(f, sigma, lower, y, share)
        y, sigma = after, lower
        if sigma == 0:
            return Point(y, 0.0, "minimum")
        lower = sigma * FALL if sigma > LEAST else 0.0


def _stopped(f: Polynomial, sigma: float, lower: float, y: Array, share: float) -> Point:
    """The first point between ``sigma`` and ``lower`` at which one of the two conditions is at its limit."""

    def beyond(at: float) -> float:
        found = _continued(f, sigma, at, y)
        return np.inf if found is None else max(_beyond(f, at, found, share))

    if np.isfinite(beyond(lower)) and beyond(sigma) < 0 < beyond(lower):
        root = float(brentq(beyond, lower, sigma, xtol=1e-14 * sigma, rtol=4 * np.finfo(float).eps))
        found = _continued(f, sigma, root, y)
        y, sigma = (y, sigma) if found is None else (found, root)
    term, curve = _beyond(f, sigma, y, share)
    return Point(y, sigma, "limited" if term >= curve else "open")


def _beyond(f: Polynomial, sigma: float, y: Array, share: float) -> tuple[float, float]:
    """How far the last term exceeds its share of the others, and twice the most negative curvature sigma."""
    size = np.abs(f.terms(y))
    others = size[:-1].sum()
    term = float(size[-1] / others - share) if others > 0 else -share
    return term, -2 * float(np.linalg.eigvalsh(f.curvature(y))[0]) - sigma


def _minimizer(f: Polynomial, sigma: float, start: Array) -> Array | None:
    """Newton's method from ``start`` for slope + sigma y = 0, to rounding; None unless it stays where f is convex."""
    y, before = start, np.inf
    for _ in range(25):
        factor = _factor(f, sigma, y)
        if factor is None:
            return None
        step = cho_solve(factor, f.slope(y) + sigma * y)
        size, length = float(np.linalg.norm(step)), float(np.linalg.norm(y - step))
        if not np.isfinite(size) or size > 4 * before:
            return None
        y = y - step
        if size <= _rounding(factor) * length or before <= size <= 1e-10 * length:
            return y if _factor(f, sigma, y) is not None else None
        before = size
    return None


def _rounding(factor: tuple[Array, bool]) -> float:
    """The relative error with which a system with this Cholesky factor is solved, roughly; at most 1e-3."""
    pivots = np.diagonal(factor[0])
    return float(min(np.finfo(float).eps * max(4.0, (pivots.max() / pivots.min()) ** 2), 1e-3))


def _factor(f: Polynomial, sigma: float, y: Array) -> tuple[Array, bool] | None:
    try:
        return cho_factor(f.curvature(y) + sigma * np.eye(len(y)))
    except (np.linalg.LinAlgError, ValueError):
        return None


def _continued(f: Polynomial, sigma: float, to: float, y: Array, depth: int = 6) -> Array | None:
    """The minimizer at ``to`` on the curve through y at ``sigma``, in as many steps between them as it takes."""
    factor = _factor(f, sigma, y)
    if factor is None:
        return None
    tangent = cho_solve(factor, y) * (sigma - to)  # dy/dsigma = -(curvature + sigma)^-1 y
    found = _minimizer(f, to, y)
    near = 4 * float(np.linalg.norm(tangent)) + 1e-9 * float(np.linalg.norm(y))
    if found is not None and np.linalg.norm(found - y) <= near:
        return found
    middle = (sigma + to) / 2
    if depth == 0 or middle in (sigma, to):
        return None
    halfway = _continued(f, sigma, middle, y, depth - 1)
    return None if halfway is None else _continued(f, middle, to, halfway, depth - 1)
