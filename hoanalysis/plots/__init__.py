"""Figures of stored summaries: ``f(ds, ax=None, ...) -> Axes``, each on top of a pure function in `frames`.

Every one works without further arguments. Nothing is shown or kept open: see `style.axes`.
"""

from hoanalysis.plots.dots import learning_rates, regularizer
from hoanalysis.plots.heatmaps import blocks, errors, matrix
from hoanalysis.plots.lines import interaction_shares as shares
from hoanalysis.plots.lines import loss, pairs, spectrum, taylor, trajectories

__all__ = [
    "blocks",
    "errors",
    "learning_rates",
    "loss",
    "matrix",
    "pairs",
    "regularizer",
    "shares",
    "spectrum",
    "taylor",
    "trajectories",
]
