"""The integral over 0..1 of what is known at a few points, and how far it may be off.

The 7 nodes are those of the Kronrod extension of the 4-point Gauss-Lobatto rule, exact up to degree 9 (Gander and
Gautschi, "Adaptive quadrature - revisited", BIT 40, 2000). The ends belong to them, so that the slopes there serve
elsewhere. A loss with max-pooling or ReLU has kinks along a step, where a high degree does not help, and where the
difference to one other rule is small by chance now and then. The error is a third of the largest change when two of the
inner nodes are left out: for random functions with one kink or forty it covers the real error in over 98 % of them
(`tests/test_quadrature.py`), and for smooth ones it is far too large.
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_OUTER, _INNER = np.sqrt(2 / 3), np.sqrt(1 / 5)
#: On 0..1, both ends included.
NODES: tuple[float, ...] = tuple((1 + np.array([-1, -_OUTER, -_INNER, 0, _INNER, _OUTER, 1])) / 2)
#: Positions of the nodes that are kept where two of the inner ones are left out.
KEPT = tuple((0, *inner, 6) for inner in combinations(range(1, 6), 3))
COVERING = 3.0  # of the largest change by which an integral over 7 nodes is better than one over 5


def weights(kept: Sequence[int] = tuple(range(len(NODES)))) -> Array:
    """The weights (7,) of the rule on the ``kept`` nodes that is exact for polynomials of a degree below their number.

    >>> weights().round(4).tolist()
    [0.0262, 0.1469, 0.2126, 0.2286, 0.2126, 0.1469, 0.0262]
    """
    at = list(kept)
    found = np.zeros(len(NODES))
    powers = np.vander(np.array(NODES)[at], increasing=True).T
    found[at] = np.linalg.solve(powers, 1 / np.arange(1, len(at) + 1))
    return found


WEIGHTS = weights()
_AWAY = np.stack([weights(kept) - WEIGHTS for kept in KEPT])


def integral(values: Array) -> Array:
    """The integral over 0..1 of ``values`` (.., 7, S) at the nodes, shape (.., S)."""
    return np.asarray(np.einsum("q,...qs->...s", WEIGHTS, values))


def integral_error(values: Array) -> Array:
    """How far `integral` may be off, shape (.., S): a third of the largest change when two nodes are left out."""
    return np.asarray(np.abs(np.einsum("rq,...qs->r...s", _AWAY, values)).max(0)) / COVERING
