"""Figures of stored summaries: ``f(ds, ax=None, ...) -> Axes``, each on top of a pure function in `frames`.

Every one works without further arguments. Nothing is shown or kept open: see `style.axes`.
"""

from hoanalysis.plots.autopsy import contributions, prediction, waterfall
from hoanalysis.plots.dots import differences, learning_rates, regularizer, taylor_step, unsettled
from hoanalysis.plots.heatmaps import blocks, change, errors, matrix, third
from hoanalysis.plots.lines import curvature, loss, merging, pairs, spectrum, taylor, trajectories, triples
from hoanalysis.plots.lines import interaction_shares as shares
from hoanalysis.plots.paper import submatrices
from hoanalysis.plots.weights import flatness, laplace, reinitialization, saliency

__all__ = [
    "blocks",
    "change",
    "contributions",
    "curvature",
    "differences",
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
    "reinitialization",
    "saliency",
    "shares",
    "spectrum",
    "submatrices",
    "taylor",
    "taylor_step",
    "third",
    "trajectories",
    "triples",
    "unsettled",
    "waterfall",
]
