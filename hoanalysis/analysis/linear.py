"""Solving with a symmetric matrix that may be singular."""

import numpy as np

from hoanalysis.analysis.arrays import Array


def solve(matrix: Array, right: Array) -> Array:
    """matrix^-1 right; the solution of least norm where the matrix is singular."""
    if not np.isfinite(matrix).all():
        return np.full(right.shape, np.nan)
    try:
        return np.linalg.solve(matrix, right)
    except np.linalg.LinAlgError:
        return np.linalg.lstsq(matrix, right, rcond=None)[0]


def inverse_of(matrix: Array) -> Array:
    """matrix^-1, symmetrized; the pseudo-inverse where it is singular."""
    inverted = solve(matrix, np.eye(len(matrix)))
    return (inverted + inverted.T) / 2


def condition(values: Array) -> float:
    """The condition number of a symmetric matrix with these eigenvalues."""
    size = np.abs(values)
    return float(size.max() / size.min()) if size.size and size.min() > 0 else float("inf")
