"""The step that the Taylor polynomial of the highest stored order asks for, as far as it can be trusted.

    f_d(-eta) = sum_{k=1..d} (-1)^k D^(k)[eta, .., eta] / k!                      d >= 3

has no global minimum at order 3, so that it is minimized where the stored tensors vouch for it. With W =
Diag(|H-bar_ss|) and sigma >= 0, the minimizers eta(sigma) of f_d(-eta) + sigma/2 eta.W eta form a curve that starts at
eta = 0 for sigma = infinity. Each is the minimizer of f_d within the ellipsoid through it, eta.W eta <= rho^2, that
descent from 0 reaches; at d = 2 they are the ridge steps. The curve is followed to the smallest sigma at which, all the
way from the start,

    |term of order d| <= share * (|term of order 1| + .. + |term of order d-1|)      and
    sigma >= -2 lambda_min of the curvature of f_d there, relative to W,

so that a step along negative curvature is divided by at least the size of that curvature. Where the terms go on falling
by the factor ``share`` from one order to the next, the missing ones change the prediction by about share^2. sigma = 0
is a minimum of f_d itself: on a quadratic loss Newton's step, exactly. Like the steps of `steps` it is invariant:
U^s -> c_s U^s divides eta_s by c_s.
"""

from collections.abc import Sequence
from itertools import permutations

import numpy as np
import xarray as xr

from hoanalysis import schema
from hoanalysis.analysis.advice import FLAT, MISSING, NULL
from hoanalysis.analysis.arrays import Array, Tensors, error_attrs, labelled, number, over_checkpoints, require, tensors
from hoanalysis.analysis.errorbars import standard_error, why_none
from hoanalysis.analysis.groups import System, system
from hoanalysis.analysis.taylor import highest_order
from hoanalysis.analysis.trust import Point, Polynomial, follow
from hoanalysis.errors import ArgumentError, SchemaError, listed

SHARE = 0.1


def taylor_step(ds: xr.Dataset, order: int | None = None, share: float = SHARE) -> xr.Dataset:
    """The learning rates of theta - sum_s eta_s U^s that minimize the Taylor polynomial where it can be trusted.

    Parameters
    ----------
    order
        d, from 3 on; by default the highest whose tensors are all held in full.
    share
        How large the term of order d may be beside the sum of the sizes of the others, in 0..1.

    Returns
    -------
    Dataset
        ``learning_rates`` (S,), without unit, NaN for groups without effect; ``predicted``, the change of the loss that
        the polynomial predicts for them, in loss; each with ``<name>_se``, the delete-one jackknife over the kept
        blocks (the curve is followed anew without each). ``ridge``: sigma, 0 at a minimum of the polynomial.
        ``status``: ``minimum``, ``limited`` (by ``share``) or ``open`` (by negative curvature), with advice.

    Raises
    ------
    SchemaError
        No full D3 is held.
    ArgumentError
        ``order`` is below 3 or not held, or ``share`` is not between 0 and 1.
    """
    names = _names(ds, order)
    if not 0 < number(share, "share") <= 1:
        raise ArgumentError(f"share must be above 0 and at most 1, not {share!r}")
    parts = over_checkpoints(ds, lambda one: _step_and_errors(one, names, share))
    words = over_checkpoints(ds, lambda one: _status(one, names, share))
    size, d = ds.sizes[schema.GROUP], len(names)
    titles = {
        "learning_rates": (f"learning rate (Taylor polynomial of order {d})", "1", (schema.GROUP,), slice(0, size)),
        "predicted": (f"predicted change of the loss to order {d}", "loss", (), size),
    }
    found = {}
    for name, (title, units, dims, at) in titles.items():
        found[name] = labelled(ds, parts[..., 0, at], dims, name, title, units)
        found[f"{name}_se"] = labelled(ds, parts[..., 1, at], dims, f"{name}_se", "", units)
        found[f"{name}_se"].attrs = error_attrs(ds, title, units, why_none(ds, names))
    found["ridge"] = labelled(
        ds, parts[..., 0, size + 1], (), "ridge", "sigma, what is added to the diagonal of C", "1"
    )
    found["status"] = labelled(ds, words, (), "status", "advice on the step", "")
    return xr.Dataset(found).assign_attrs(order=d, share=float(share))


def _names(ds: xr.Dataset, order: int | None) -> list[str]:
    held = highest_order(ds)
    d = held if order is None else order
    if order is not None and (isinstance(order, bool) or not isinstance(order, int | np.integer) or order < 3):
        raise ArgumentError(
            f"the order of a Taylor step is a whole number from 3 on, not {order!r}",
            do="use learning_rates(), ridge or cubic, which need D1 and D2",
        )
    if d < 3:
        raise SchemaError(
            "a Taylor step needs the full D1, D2 and D3",
            why=f"the full tensors held are those to order {held}: nothing vouches for the quadratic model",
            do="summarize with order=3, or use learning_rates('cubic') with the diagonal of D3",
        )
    names = [schema.derivative(k) for k in range(1, int(d) + 1)]
    require(ds, *names)
    return names


def polynomial(groups: System, t: Tensors, names: Sequence[str]) -> Polynomial:
    """f_d(-eta) in y = sqrt|H-bar_ss| eta over the groups that have an effect."""
    use, scale = groups.used, groups.scale_in(t["D2"])
    found = []
    for k, name in enumerate(names, 1):
        part = t[name][np.ix_(*[use] * k)]
        for axis in range(k):
            part = part / scale.reshape([-1 if i == axis else 1 for i in range(k)])
        found.append((-1) ** k * _symmetric(part))
    return Polynomial(found)


def _symmetric(tensor: Array) -> Array:
    """The mean over permutations of the axes: rounding apart, the tensor itself."""
    orders = list(permutations(range(tensor.ndim)))
    return sum((tensor.transpose(order) for order in orders), np.zeros_like(tensor)) / len(orders)


def _point(groups: System, t: Tensors, names: Sequence[str], share: float) -> tuple[Point, Polynomial | None]:
    f = polynomial(groups, t, names)
    n = len(f.tensors[0])
    if not n or not all(np.isfinite(part).all() for part in f.tensors):
        return Point(np.full(n, np.nan), np.nan, "nothing"), None
    return follow(f, share), f


def _step_and_errors(one: xr.Dataset, names: Sequence[str], share: float) -> Array:
    """Rates, predicted change and sigma, behind one another, shape (2, S + 2): values and errors."""
    groups = system(one)

    def estimate(t: Tensors) -> Array:
        point, f = _point(groups, t, names, share)
        predicted = np.nan if f is None else f.terms(point.y).sum()
        rates = groups.spread(point.y / groups.scale_in(t["D2"]))
        return np.concatenate([rates, [predicted, point.sigma]])

    return np.stack([estimate(tensors(one, names)), standard_error(one, names, estimate)])


def _status(one: xr.Dataset, names: Sequence[str], share: float) -> str:
    groups, labels = system(one), np.array(schema.labels(one), dtype=object)
    if groups.missing.all():
        return "not computed: D1 and D2 of this checkpoint are missing."
    point, f = _point(groups, tensors(one, names), names, share)
    lines = [
        text.format(listed(labels[mask]))
        for mask, text in ((groups.missing, MISSING), (groups.null, NULL), (groups.flat, FLAT))
        if mask.any()
    ]
    if f is None or point.ending == "nothing":
        return "\n".join([*lines, "missing entries: some entries of the tensors are not numbers, or none is left."])
    size = np.abs(f.terms(point.y))
    reached = size[-1] / size[:-1].sum() if size[:-1].sum() > 0 else 0.0
    d = len(names)
    words = {
        "minimum": f"minimum: these rates minimize the polynomial of order {d}; its last term is {reached:.1%} of the "
        f"others, which vouches for it.",
        "limited": f"limited: at these rates the term of order {d} reaches {share:.0%} of the others, and longer steps "
        f"are not vouched for. They are those of a ridge of {point.sigma:.3g}. A larger share goes further at more "
        f"risk; a higher order sees further.",
        "open": f"open: the polynomial curves downwards at these rates, so that no minimum is near; the step is that "
        f"of a ridge of {point.sigma:.3g}, twice the negative curvature. Move, and compute the summaries again.",
    }
    return "\n".join([words[point.ending], *lines])
