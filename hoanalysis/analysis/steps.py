"""Learning rates: the step per group that the summaries ask for.

    theta' = theta - sum_s eta_s U^s,   H-bar_reg eta = g-bar,   g-bar = D1, H-bar = D2

| regularization | H-bar_reg                                              | epsilon                        |
|----------------|--------------------------------------------------------|--------------------------------|
| None           | H-bar                                                  | not used                       |
| "ridge"        | H-bar + epsilon Diag(abs(H-bar_ss))                    | without unit                   |
| "r"            | H-bar + epsilon Diag(r)                                | loss^(1/3)                     |
| "cubic"        | H-bar + lambda/2 norm(D eta) D^2, D = Diag(r)^(1/2)    | lambda = epsilon, without unit |

All four are invariant: scaling group s (U^s -> c_s U^s) divides eta_s by c_s, so that the step eta_s U^s is the same.
The systems are solved equilibrated, C = H_st / sqrt|H_ss H_tt|, without the groups that have no effect
(`groups.system`). Where the full D3 is held, `taylor_step` has the last word.
"""

import numpy as np
import xarray as xr

from hoanalysis.analysis.advice import advice
from hoanalysis.analysis.arrays import Array, error_attrs, labelled, over_checkpoints, tensors
from hoanalysis.analysis.errorbars import standard_error, why_none
from hoanalysis.analysis.regularized import EPSILON_UNITS, Regularization, Solver, check, needed


def learning_rates(ds: xr.Dataset, regularization: Regularization = None, epsilon: float = 1.0) -> xr.Dataset:
    """The learning rate of each group, for theta - sum_s eta_s U^s: H-bar_reg eta = g-bar.

    Parameters
    ----------
    regularization
        None: H-bar itself. ``"ridge"``: H-bar + epsilon Diag(|H-bar_ss|), positive definite once epsilon exceeds the
        most negative eigenvalue of the equilibrated C. ``"r"``: H-bar + epsilon Diag(r). ``"cubic"``: the anisotropic
        Nesterov step eta = (H-bar + lambda/2 ||D eta|| D^2)^-1 g-bar, D = Diag(r)^(1/2), the root of largest ||D eta||.
    epsilon
        Without unit for ``"ridge"`` and ``"cubic"`` (lambda), in loss^(1/3) for ``"r"``.

    Returns
    -------
    Dataset
        ``learning_rates`` (S,), without unit, NaN for groups without effect; ``learning_rates_se``, the delete-one
        jackknife over the kept blocks, conditional on u (NaN without blocks); ``status``, advice, one line each.

    Raises
    ------
    SchemaError
        D1 or D2 is missing, or the third order for ``"r"`` and ``"cubic"``.
    ArgumentError
        An unknown regularization, or an epsilon that is not positive.

    Source: arXiv 2312.03885, Section 3.1, training step 3 and eq. 2; Section 3.2 (r); Section 3.3 (cubic).
    """
    check(regularization, epsilon)
    names = needed(ds, regularization)
    parts = over_checkpoints(ds, lambda one: _rates_and_errors(one, names, regularization, epsilon))
    words = over_checkpoints(ds, lambda one: advice(one, regularization, epsilon))
    title = f"learning rate ({regularization or 'no'} regularization)"
    rates = labelled(ds, parts[..., 0, :], ("group",), "learning_rates", title, "1")
    errors = rates.copy(data=parts[..., 1, :])
    errors.attrs = error_attrs(ds, "the learning rate", "1", why_none(ds, names))
    status = labelled(ds, words, (), "status", "advice on the learning rates", "")
    found = xr.Dataset({"learning_rates": rates, "learning_rates_se": errors, "status": status})
    return found.assign_attrs(
        regularization=str(regularization), epsilon=float(epsilon), epsilon_units=EPSILON_UNITS[regularization]
    )


def _rates_and_errors(one: xr.Dataset, names: list[str], regularization: Regularization, epsilon: float) -> Array:
    solver = Solver.of(one, regularization, epsilon)
    return np.stack([solver(tensors(one, names)), standard_error(one, names, solver)])
