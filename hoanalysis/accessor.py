"""``ds.ho.<verb>``: a thin face on `hoanalysis.analysis` and `hoanalysis.plots`. Formulas stand where they are
computed.

Importing this module registers the accessor on every `xarray.Dataset`; it imports neither torch nor matplotlib.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import pandas as pd
import xarray as xr

from hoanalysis.analysis import autopsy as _autopsy
from hoanalysis.analysis import coarsen as _coarsen
from hoanalysis.analysis import compare as _compare
from hoanalysis.analysis import curvature as _curvature
from hoanalysis.analysis import flatness as _flatness
from hoanalysis.analysis import interactions as _interactions
from hoanalysis.analysis import inverse as _inverse
from hoanalysis.analysis import laplace as _laplace
from hoanalysis.analysis import merge as _merge
from hoanalysis.analysis import path as _path
from hoanalysis.analysis import prediction as _prediction
from hoanalysis.analysis import pruning as _pruning
from hoanalysis.analysis import regularizer as _regularizer
from hoanalysis.analysis import reinitialization as _reinitialization
from hoanalysis.analysis import spectra as _spectra
from hoanalysis.analysis import steps as _steps
from hoanalysis.analysis import taylor as _taylor
from hoanalysis.analysis import taylor_step as _taylor_step
from hoanalysis.analysis import triples as _triples
from hoanalysis.analysis import unsettled as _unsettled
from hoanalysis.analysis import update_rule as _update_rule
from hoanalysis.analysis.findings import findings
from hoanalysis.analysis.groups import null_groups
from hoanalysis.analysis.regularized import Regularization


@xr.register_dataset_accessor("ho")
class HoAccessor:
    """The analysis verbs and plots of a summary Dataset."""

    def __init__(self, ds: xr.Dataset) -> None:
        self._ds = ds

    def regularizer(self) -> xr.DataArray:
        """r_s = |D3[s,s,s]|^(2/3), with ``regularizer_se`` and ``status``; see `analysis.regularizer`."""
        return _regularizer.regularizer(self._ds)

    def learning_rates(self, regularization: Regularization = None, epsilon: float = 1.0) -> xr.Dataset:
        """The rates of theta - sum_s eta_s U^s with H-bar_reg eta = g-bar; see `analysis.steps.learning_rates`."""
        return _steps.learning_rates(self._ds, regularization, epsilon)

    def taylor_step(self, order: int | None = None, share: float = _taylor_step.SHARE) -> xr.Dataset:
        """The rates that minimize the Taylor polynomial where it can be trusted; see `analysis.taylor_step`."""
        return _taylor_step.taylor_step(self._ds, order, share)

    def inverse(self, regularization: Regularization = None, epsilon: float = 1.0) -> xr.DataArray:
        """H-bar_reg^-1; see `analysis.inverse.inverse`."""
        return _inverse.inverse(self._ds, regularization, epsilon)

    def scale_free(self) -> xr.DataArray:
        """H_st / sqrt|H_ss H_tt|; see `analysis.inverse.scale_free`."""
        return _inverse.scale_free(self._ds)

    def blocks(
        self, which: _inverse.Which = "H", regularization: Regularization = None, epsilon: float = 1.0
    ) -> dict[str, xr.DataArray]:
        """The WW, BB, WB, .. blocks of H-bar or its inverse; see `analysis.inverse.blocks`."""
        return _inverse.blocks(self._ds, which, regularization, epsilon)

    def merge(self, by: _merge.By) -> xr.Dataset:
        """The summaries of a coarser partition, exactly; see `analysis.merge.merge`."""
        return _merge.merge(self._ds, by)

    def suggest_partition(
        self, n: int, *, within: str | None = None, epsilon: float | None = None
    ) -> _coarsen.Suggestion:
        """The merging into ``n`` groups that costs a step least, for `merge`; see `analysis.coarsen`."""
        return _coarsen.suggest_partition(self._ds, n, within=within, epsilon=epsilon)

    def taylor(self, eta: _taylor.Move, order: int | None = None) -> xr.DataArray:
        """The predicted change of the loss under +eta; see `analysis.taylor.taylor`."""
        return _taylor.taylor(self._ds, eta, order)

    def taylor_terms(self, eta: _taylor.Move, order: int | None = None) -> xr.DataArray:
        """The predicted change order by order; see `analysis.taylor.taylor_terms`."""
        return _taylor.taylor_terms(self._ds, eta, order)

    def interactions(self, top: int | None = None) -> pd.DataFrame:
        """Pairs of groups, the strongest first at every step; see `analysis.interactions.interactions`."""
        return _interactions.interactions(self._ds, top)

    def triples(self, top: int | None = None, *, distinct: bool = True) -> pd.DataFrame:
        """Triples of groups, the strongest first at every step; see `analysis.triples.triples`."""
        return _triples.triples(self._ds, top, distinct=distinct)

    def shares(self, which: str = "H") -> xr.Dataset:
        """The off-diagonal and off-block shares of H-bar or its inverse; see `analysis.interactions.shares`."""
        return _interactions.shares(self._ds, which)

    def spectrum(self) -> xr.DataArray:
        """Eigenvalues of the Hessian compressed to the directions; see `analysis.spectra.spectrum`."""
        return _spectra.spectrum(self._ds)

    def curvature(self) -> xr.Dataset:
        """Extremes, condition and negative share of that spectrum; see `analysis.curvature.curvature`."""
        return _curvature.curvature(self._ds)

    def flatness(self) -> xr.Dataset:
        """Curvature along the scales of the groups, u = weights; see `analysis.flatness.flatness`."""
        return _flatness.flatness(self._ds)

    def saliency(self) -> xr.Dataset:
        """OBD and OBS scores of groups along u = weights; see `analysis.pruning.saliency`."""
        return _pruning.saliency(self._ds)

    def reinitialization(self) -> xr.Dataset:
        """What putting groups back to their initial values does, u = to:init; see `analysis.reinitialization`."""
        return _reinitialization.reinitialization(self._ds)

    def laplace(self, prior_precision: float = 1.0, n_samples: float | None = None) -> xr.Dataset:
        """Sigma = (N D2 + Lambda)^-1 along u = weights; see `analysis.laplace.laplace`."""
        return _laplace.laplace(self._ds, prior_precision, n_samples)

    def compare(self, other: xr.Dataset, step: Any = None, *, paired: bool | None = None) -> xr.Dataset:
        """What changes from this Dataset to ``other``, groups matched by label; see `analysis.compare.compare`."""
        return _compare.compare(self._ds, other, step, paired=paired)

    def differences(self, other: xr.Dataset, step: Any = None, top: int | None = None) -> pd.DataFrame:
        """The rows of `compare`, the most significant first; see `analysis.compare.differences`."""
        return _compare.differences(_compare.compare(self._ds, other, step), top)

    def unsettled(self, top: int | None = None) -> pd.DataFrame:
        """Entries whose sign is not settled, and how many more batches would; see `analysis.unsettled`."""
        return _unsettled.unsettled(self._ds, top)

    def null_groups(self) -> xr.DataArray:
        """Which groups have no effect beyond rounding; see `analysis.groups.null_groups`."""
        return null_groups(self._ds)

    def prediction(self) -> xr.Dataset:
        """The predicted and the measured change of the loss over each real step; see `analysis.prediction`."""
        return _prediction.prediction(self._ds)

    def path(self) -> xr.Dataset:
        """What each group did to the loss along the step, from its measured slopes; see `analysis.path.path`."""
        return _path.path(self._ds)

    def autopsy(
        self,
        step: Any = None,
        *,
        gradient: xr.Dataset | None = None,
        weights: xr.Dataset | None = None,
        log: pd.DataFrame | None = None,
    ) -> _autopsy.Autopsy:
        """The terms of one real step, where the run broke and who did it; see `analysis.autopsy.autopsy`."""
        return _autopsy.autopsy(self._ds, step, gradient=gradient, weights=weights, log=log)

    def update_rule(
        self, gradient: xr.Dataset, weights: xr.Dataset | None = None, log: pd.DataFrame | None = None
    ) -> xr.Dataset:
        """Learning rates, momentum and weight decay that the checkpoints show; see `analysis.update_rule`."""
        return _update_rule.update_rule(self._ds, gradient, weights, log)

    def findings(self, log: pd.DataFrame | None = None, others: Mapping[str, xr.Dataset] | None = None) -> list[str]:
        """What the summaries say about the run, in sentences; see `analysis.findings.findings`."""
        return findings(self._ds, log, others)

    @property
    def plot(self) -> "PlotAccessor":
        """``ds.ho.plot.<name>()``: every plot of `hoanalysis.plots`, all of which work without arguments."""
        return PlotAccessor(self._ds)


class PlotAccessor:
    """The plots, with the Dataset filled in; matplotlib is imported on first use."""

    def __init__(self, ds: xr.Dataset) -> None:
        self._ds = ds

    def __dir__(self) -> list[str]:
        from hoanalysis import plots

        return [*super().__dir__(), *plots.__all__]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        from hoanalysis import plots
        from hoanalysis.errors import nearest

        if name not in plots.__all__:
            raise AttributeError(f"no plot is called {name!r}; {nearest(name, plots.__all__)}")
        return partial(getattr(plots, name), self._ds)
