"""Figures of stored summaries: ``f(ds, ax=None, ...) -> Axes``, each on top of a pure function in `frames`.

Every one works without further arguments. Nothing is shown or kept open: see `style.axes`.
"""

from hoanalysis.plots.autopsy import prediction, waterfall
from hoanalysis.plots.dots import learning_rates, regularizer
from hoanalysis.plots.heatmaps import blocks, change, errors, matrix, third
from hoanalysis.plots.lines import interaction_shares as shares
from hoanalysis.plots.lines import loss, merging, pairs, spectrum, taylor, trajectories, triples
from hoanalysis.plots.weights import flatness, laplace, saliency

__all__ = [
    "blocks",
    "change",
    "errors",
    "flatness",
    "laplace",
    "learning_rates",
    "loss",
    "matrix",
    "merging",
    "pairs",
    "prediction",
    "regularizer",
    "saliency",
    "shares",
    "spectrum",
    "taylor",
    "third",
    "trajectories",
    "triples",
    "waterfall",
]
