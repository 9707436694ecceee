"""What a solve with H-bar has to say about itself, as advice in words: one line per finding, the first word its
name."""

import numpy as np
import xarray as xr

from hoanalysis import schema
from hoanalysis.analysis.arrays import Array, tensor, tensors
from hoanalysis.analysis.groups import rounding, system
from hoanalysis.analysis.linear import condition
from hoanalysis.analysis.regularized import Regularization, Solver, needed
from hoanalysis.analysis.regularizer import r_of, third, zero_r
from hoanalysis.analysis.taylor import highest_order, taylor_terms
from hoanalysis.errors import listed

NEXT = {
    None: "Use regularization='ridge', 'r' or 'cubic'.",
    "ridge": "Use a larger epsilon, or regularization='cubic'.",
    "r": "Use a larger epsilon, or regularization='cubic'.",
    "cubic": "Use a larger epsilon.",
}
OK = "ok: H-bar is positive definite on the groups that have an effect, and well conditioned."


def advice(one: xr.Dataset, regularization: Regularization, epsilon: float) -> str:
    """All that applies to one checkpoint, or `OK`."""
    groups, names = system(one), np.array(schema.labels(one), dtype=object)
    if groups.missing.all():
        return "not computed: D1 and D2 of this checkpoint are missing."
    lines = [_named(groups.missing, names, MISSING), _named(groups.null, names, NULL), _named(groups.flat, names, FLAT)]
    if groups.used.any():
        lines += _about_matrix(one, regularization, epsilon)
        lines.append(_beyond(one, Solver.of(one, regularization, epsilon)))
    if regularization in ("r", "cubic"):
        zero = names[groups.used & (_r(one) == 0)]
        lines.append(zero_r(list(zero)) if len(zero) else "")
    found = "\n".join(filter(None, lines))
    return found or (OK if regularization is None else OK.replace("H-bar", "the regularized H-bar"))


HARD = (
    "hard case: g-bar has no part along the most negative curvature, so that two cubic steps are equally good; one was "
    "chosen by its sign. The iterate sits on a ridge of the loss: a step along the other sign lowers it as much."
)
MISSING = "missing groups: D1 or D2 is not a number for {}; their learning rate is NaN."
NULL = (
    "null groups: {} have no effect on the loss beyond rounding (a bias before a norm, a key-projection bias under "
    "softmax); they are left out of the system and their learning rate is NaN. Freeze them or leave them as they are."
)
FLAT = (
    "flat groups: {} have a slope and no curvature at all, so that no finite learning rate is best for them; it is NaN."
)


BEYOND = 0.5  # of the terms of lower order; measured on shipped runs: below 0.1 for steps that do what they predict


def _beyond(one: xr.Dataset, solver: Solver) -> str:
    """Whether the term of the highest order held says that the quadratic model does not reach as far as the step."""
    d = highest_order(one)
    if d < 3 or any(list(one[dim].values) != list(one[schema.GROUP].values) for dim in schema.group_dims(d)):
        return ""
    rates = solver(tensors(one, needed(one, solver.regularization)))
    size = np.abs(taylor_terms(one, -rates).values) if np.isfinite(rates).any() else np.zeros(d)
    if not size[-1] > BEYOND * size[:-1].sum():
        return ""
    return (
        f"far: at these rates the term of order {d} of the loss is {size[-1] / size[:-1].sum():.3g} times all terms "
        f"below it, so that the quadratic model says nothing about so long a step. Use ds.ho.taylor_step(), which "
        f"stops where the stored orders still agree, or a larger epsilon."
    )


def _named(mask: Array, names: Array, text: str) -> str:
    return text.format(listed(names[mask])) if mask.any() else ""


def _r(one: xr.Dataset) -> Array:
    name = third(one)
    return r_of({name: tensor(one, name)}, name)


def _about_matrix(one: xr.Dataset, regularization: Regularization, epsilon: float) -> list[str]:
    solver = Solver.of(one, regularization, epsilon)
    solved = solver.equilibrated(tensors(one, needed(one, regularization)))
    matrix = solved.matrix
    if solved.hard:
        return [HARD]
    if not np.isfinite(matrix).all():
        return ["missing entries: some entries of D2 or D3 are not numbers; no learning rate can be computed."]
    values = np.linalg.eigvalsh(matrix)
    return [_indefinite(values, regularization), _ill_conditioned(values, rounding(one), regularization)]


def _indefinite(values: Array, regularization: Regularization) -> str:
    negative = int((values < -1e-12 * np.abs(values).max()).sum())
    if not negative:
        return ""
    matrix = "H-bar" if regularization is None else "the regularized H-bar"
    return (
        f"indefinite: {matrix} has {negative} negative eigenvalue{'s' * (negative > 1)} of {len(values)} (the lowest "
        f"of its equilibrated form is {values[0]:.3g}), so that along "
        f"{'some directions' if negative > 1 else 'one direction'} these rates lead to a saddle and not to a minimum. "
        f"{NEXT[regularization]}"
    )


def _ill_conditioned(values: Array, eps: float, regularization: Regularization) -> str:
    number = condition(values)
    if number * eps < 1e-3:
        return ""
    return (
        f"ill-conditioned: the equilibrated condition number is {number:.1e}, so that rounding alone moves the rates "
        f"by about {min(number * eps, 1):.0%}. Compute the summaries in float64, merge groups, or regularize. "
        f"{NEXT[regularization]}"
    )
