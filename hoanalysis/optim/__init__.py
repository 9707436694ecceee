"""Training by the summaries: the second-order step of the paper as an optimizer."""

from hoanalysis.optim.summary_newton import SummaryNewton

__all__ = ["SummaryNewton"]
