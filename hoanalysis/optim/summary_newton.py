"""`SummaryNewton`: one learning rate per group of parameters, asked from the loss itself every few steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hoanalysis import partitions
from hoanalysis.analysis.groups import eps_of
from hoanalysis.analysis.regularized import Regularization, check
from hoanalysis.derivatives.common import Request
from hoanalysis.derivatives.engines import ENGINES
from hoanalysis.errors import ArgumentError, DirectionError, NumericsError, listed
from hoanalysis.optim.descent import CURVATURES, Curvature, Descent
from hoanalysis.optim.information import Information, Known
from hoanalysis.optim.passes import group_inner
from hoanalysis.optim.updates import Update, resolve
from hoanalysis.partitions import Partition
from hoanalysis.problem import Problem

NEGATIVE = ("keep", "clip")
SLOPES = ("measured", "steps", "confirmed")
MEMORY = 0.9  # of the slopes over steps: as long as that of momentum
SUFFICIENT = 0.1  # of the decrease that the slope alone would give; half of it is what a quadratic gives
EXTRA = "summary_newton"  # the entry of the state_dict that torch.optim.Optimizer does not know


@dataclass(frozen=True)
class Usual:
    """What holds for the options that are not given."""

    direction: str
    curvature: Curvature
    average: float
    slope: str
    backtracking: int


PAPER = Usual("gradient", "signed", 0.0, "measured", 8)
NOISE = Usual("adam", "absolute", 0.8, "confirmed", 0)  # docs/optimizer.md


class SummaryNewton(torch.optim.Optimizer):
    """Training step (3) of the paper: Newton's method on the S learning rates, one for each group.

        theta <- theta - lr sum_s eta_s U^s,       H-bar_reg eta = g-bar,

        g-bar_s  = dL/dtheta . U^s                 H-bar_st = d^2L/dtheta^2 : U^s x U^t

    with u the gradient (or another direction made from it) and U^s its restriction to group s. With one group it is
    Cauchy's steepest descent with the exact quadratic step, with one group per parameter Newton's method. It is
    invariant under the named directions: rescaling the parameters of a tensor that is a group changes nothing.

    eta is computed every ``period`` steps from D^(1), D^(2) and, for "r" and "cubic", the diagonal of D^(3), measured
    on the next batches of ``problem.data``, and holds until the next time: u is that of each step.

    Parameters
    ----------
    problem
        The model that is trained (the same object), the batches for the information, and the loss. Its data may be the
        training set, in another order or shuffled anew; nothing else reads the training batches.
    partition
        "canonical" (a group per tensor), "layer", "kind", "trivial", "discrete", or a `Partition`. The optimizer's
        ``param_groups`` are its groups, in order; tensors that a partition cuts stand in one for all their groups.
    direction
        "gradient"; "momentum", the moving average of gradients with 0.9; "adam"; or a function
        ``fn(gradient, state) -> u`` of each parameter: `hoanalysis.optim.updates`.
    regularization, epsilon
        As of ``ds.ho.learning_rates``: None, "ridge", "r" or "cubic" (epsilon is lambda then).

        "cubic" comes with what the noise of batches asks for, the others with the step as the paper writes it. That is,
        what is not given of direction, curvature, average, slope and backtracking is "adam", "absolute", 0.8,
        "confirmed" and 0 with "cubic", and "gradient", "signed", 0, "measured" and 8 with the others. docs/optimizer.md
        says why.
    curvature
        H-bar as it is, "signed", its "absolute" value, or a "separable" bound of it, under which no group's rate relies
        on another's: `hoanalysis.optim.descent.Descent`.
    damping
        The initial ``lr`` of every param_group, which multiplies eta: what a scheduler of torch changes.
    period
        Steps between two measurements.
    rates_momentum
        eta <- rates_momentum eta + (1 - rates_momentum) (the new eta).
    negative
        "keep" negative rates, or "clip" them at 0. H-bar asks for a negative rate where climbing along u^s pays because
        of what the other groups do; on batches it is often noise.
    average
        The coefficient of the moving averages of g-bar, H-bar and the diagonal, 0 for none.
    batches
        Batches for each measurement.
    slope
        g-bar is "measured" on the information's batches, or the slope of the "steps" on their own batches:
        |U^s| times the moving average (0.9) of g^s . U^s / |U^s| over all steps, at least 0. Another batch's slope
        along u is what a single step gains, and late in training that is little more than noise. "confirmed" takes the
        slope of the steps too, and of the rates the part rho that the information's batches confirm:

            eta = rho eta',    rho = eta' . D1 / eta' . g-bar, at least 0,

        D1 the measured slopes, averaged like the rest of the information. So the steps say how the groups share the
        way, and other batches how long it is: with the curvature that eta' was solved for, not regularized, rho is the
        minimum of their second-order model along eta'. u has the noise of the batches that it is made of, and other
        batches do not: rho falls as gradients become noise. That needs data in another order than the training's; a
        batch confirms itself.
    trust
        Rates closer to 0 than ``trust`` standard errors are set to 0; the errors are the jackknife's over ``batches``.
        Unless ``slope`` is "measured" they are those of the curvature alone.
    backtracking
        How often eta may be halved, 0 for never.
    engine, memory
        As of `hoanalysis.summarize`.

    Attributes
    ----------
    status
        One line, or several: "ok", "skipped: ..." where the last step moved nothing, "kept: ..." where the last
        measurement failed and the rates before it hold, and whatever was found about single groups.
    rates
        Label -> eta, without unit, as last measured (without ``lr``).
    confirmed
        rho as last measured; 1 where ``slope`` is another.

    Notes
    -----
    A measurement is followed by backtracking: eta is halved until the loss of the same batches falls by a tenth of what
    its slope says, at most ``backtracking`` times, for a forward pass each; ``lr`` is not in it. In the steps until the
    next one negative rates count as 0, and no group goes further than |eta_s U^s| was when it was measured.

    Dropout makes L random and is refused by `Problem`; BatchNorm in train mode is differentiated as it is. Gradients
    may be clipped or scaled before `step`: u is what it finds in ``.grad``, and how far to go is measured. A group
    without a gradient at a measurement keeps its rate, and one that gets its first later is measured at once. Groups
    without effect (a bias before a norm), and groups with a slope but no curvature, do not move, and ``status`` names
    them.

    Source: arXiv 2312.03885, Section 3.1, training step 3; Sections 3.2 and 3.3 for "r" and "cubic".

    >>> import torch, hoanalysis as ho
    >>> model = torch.nn.Linear(2, 1).double()
    >>> x = torch.eye(2, dtype=torch.float64).repeat(4, 1)
    >>> problem = ho.Problem(model, [(x, x.sum(1, keepdim=True))], torch.nn.functional.mse_loss)
    >>> optimizer = ho.optim.SummaryNewton(problem, regularization=None, period=1)
    >>> for x, y in problem.data:
    ...     optimizer.zero_grad()
    ...     problem.loss(model(x), y).backward()
    ...     optimizer.step()
    >>> sorted(optimizer.rates)
    ['bias', 'weight']
    """

    def __init__(
        self,
        problem: Problem,
        *,
        partition: str | Partition = "canonical",
        direction: str | Update | None = None,
        regularization: Regularization = "cubic",
        epsilon: float = 1.0,
        damping: float = 1.0,
        period: int = 10,
        rates_momentum: float = 0.0,
        negative: str = "keep",
        curvature: Curvature | None = None,
        average: float | None = None,
        batches: int = 1,
        slope: str | None = None,
        trust: float = 0.0,
        backtracking: int | None = None,
        engine: str = "auto",
        memory: int = 2 * 2**30,
    ) -> None:
        if not isinstance(problem, Problem):
            raise ArgumentError(
                f"SummaryNewton needs a Problem, not {type(problem).__name__}",
                do="SummaryNewton(ho.Problem(model, batches, loss)): the loss is differentiated on batches of its own",
            )
        check(regularization, epsilon)
        usual = NOISE if regularization == "cubic" else PAPER
        direction = usual.direction if direction is None else direction
        curvature = usual.curvature if curvature is None else curvature
        average = usual.average if average is None else average
        slope = usual.slope if slope is None else slope
        backtracking = usual.backtracking if backtracking is None else backtracking
        _check(damping=damping, period=period, rates_momentum=rates_momentum, average=average, batches=batches)
        _check(backtracking=backtracking, trust=trust)
        _check_choices(negative=(negative, NEGATIVE), slope=(slope, SLOPES), engine=(engine, ENGINES))
        _check_choices(curvature=(curvature, CURVATURES))
        if trust and batches < 2:
            raise ArgumentError("trust needs errors, and one batch has none", do="batches=2 or more")
        self.problem = problem
        self.partition = partitions.resolve(partition, problem.model)
        self.update, self._own_direction = resolve(direction), callable(direction)
        self.slope = slope
        self.period, self.rates_momentum = int(period), float(rates_momentum)
        self.backtracking = int(backtracking)
        self.status = "skipped: no step yet"
        parameters = dict(problem.model.named_parameters())
        self._parameters = {n: parameters[n] for n in self.partition.parameters}
        self._dtypes = {n: p.dtype for n, p in self._parameters.items()}
        request = Request(2, 3 if regularization in ("r", "cubic") else None)
        self.information = Information(problem, self.partition, request, average, int(batches), engine, memory)
        eps = eps_of(problem.upcast() or next(iter(self._parameters.values())).dtype)
        self.descent = Descent(regularization, curvature, epsilon, negative, trust, eps, self.partition.labels)
        self._eta: np.ndarray | None = None
        self._said = self.status  # of the last measurement
        self._lengths = np.zeros(len(self.partition))  # |U^s| where eta was measured
        self.last_slopes = np.full(len(self.partition), np.nan)  # what the last rates rested on
        self._slopes = np.zeros(len(self.partition))  # the moving average over steps, and the sum of its weights
        self._slopes_weight = np.zeros(len(self.partition))
        self.confirmed = 1.0
        self._steps = 0
        super().__init__(_groups(self.partition, self._parameters), {"lr": float(damping)})
        self._sealed = True

    @property
    def rates(self) -> dict[str, float]:
        eta = np.full(len(self.partition), np.nan) if self._eta is None else self._eta
        return dict(zip(self.partition.labels, eta.tolist(), strict=True))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "_sealed"):
            raise ArgumentError("the groups of SummaryNewton are those of its partition", do="make a new optimizer")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; every ``period``-th measures first. Returns what ``closure`` returns, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        u = self._direction()
        if isinstance(u, str):
            self.status = f"skipped: {u}"
            return loss
        lengths = np.sqrt(group_inner(u, u, self.partition))
        if self.slope != "measured":
            self._remember(self._own_slopes(u), lengths)
        new = (lengths > 0) & (self._lengths == 0)  # no rate was ever measured for these
        measures = self._steps % self.period == 0 or self._eta is None or bool(new.any())
        fresh = self._measure(u) if measures else False
        self._steps += 1
        self.status = self._said
        if self._eta is not None:
            self._move(u, self._eta if fresh else self._held(lengths, self._eta))
        return loss

    def _remember(self, slopes: np.ndarray, lengths: np.ndarray) -> None:
        """The moving average over those steps that a group had a direction in."""
        there = (lengths > 0) & np.isfinite(slopes)
        unit = np.where(there, slopes, 0.0) / np.where(lengths > 0, lengths, 1)
        self._slopes = np.where(there, MEMORY * self._slopes + (1 - MEMORY) * unit, self._slopes)
        self._slopes_weight = np.where(there, MEMORY * self._slopes_weight + 1 - MEMORY, self._slopes_weight)

    def _direction(self) -> dict[str, Tensor] | str:
        """u by parameter, zeros where a parameter has no gradient; or why there is none."""
        if changed := [n for n, p in self._parameters.items() if p.dtype != self._dtypes[n]]:
            raise ArgumentError(f"of another dtype than at the start: {listed(changed)}", do="make a new optimizer")
        gradients = {n: p.grad for n, p in self._parameters.items() if p.grad is not None}
        if not gradients:
            return "no parameter of the problem's model has a gradient"
        if sparse := [n for n, g in gradients.items() if g.layout != torch.strided]:
            raise ArgumentError(f"gradients of another layout than dense: {listed(sparse)}", do="use sparse=False")
        bad = [n for n, g in gradients.items() if not bool(g.sum().isfinite()) and not bool(g.isfinite().all())]
        if bad:
            return f"the gradient is not finite in {listed(bad)}"
        if not any(bool(g.count_nonzero()) for g in gradients.values()):
            return "the gradient is zero"
        u = {n: self.update(g, self.state[self._parameters[n]]) for n, g in gradients.items()}
        if self._own_direction:
            _check_direction(u, gradients)
        return {n: u[n] if n in u else torch.zeros_like(p) for n, p in self._parameters.items()}

    def _own_slopes(self, u: Mapping[str, Tensor]) -> np.ndarray:
        """g^s . U^s, shape (S,), with g the gradient that this step was given."""
        gradients = {n: p.grad for n, p in self._parameters.items() if p.grad is not None}
        return group_inner(gradients, u, self.partition)

    def _measure(self, u: Mapping[str, Tensor]) -> bool:
        """Whether there are new rates; those before hold where none can be had."""
        try:
            known = self.information.measure(u)
            eta, said = self.descent.rates(self._with_slopes(known), known)
        except NumericsError as error:
            eta, said = None, [error.what]
        if eta is not None:
            eta = self._confirmed(eta, known.tensors["D1"])
            if not eta.any():
                unsure = "other batches confirm no part of the slope"
                said.append(f"{'no direction goes down' if self.confirmed else unsure}: the new rates are 0")
            before, m = np.zeros_like(eta) if self._eta is None else self._eta, self.rates_momentum
            eta = eta if self._eta is None else m * before + (1 - m) * eta
            eta, halved = self._backtracked(u, np.where(known.norms > 0, eta, before), known.latest)
            said += [halved] if halved else []
        if eta is None:
            self._said = "; ".join([("skipped: " if self._eta is None else "kept: ") + said[-1], *said[:-1]])
            return False
        self._eta, self._lengths = eta, np.where(known.norms > 0, known.norms, self._lengths)
        self._said = "\n".join(said) or "ok"
        return True

    def _with_slopes(self, known: Known) -> Known:
        """The slopes that the rates are to rest on."""
        if self.slope == "measured":
            return known
        weight = np.where(self._slopes_weight > 0, self._slopes_weight, 1.0) * self.information.terms
        self.last_slopes = np.maximum(self._slopes / weight, 0.0) * known.norms
        d1 = {"D1": self.last_slopes}
        left_out = tuple({**one, **d1} for one in known.without_one)
        return replace(known, tensors={**known.tensors, **d1}, without_one=left_out)

    def _confirmed(self, eta: np.ndarray, measured: np.ndarray) -> np.ndarray:
        """rho eta, with the slopes that are ``measured`` on batches that u was not made of."""
        if self.slope == "confirmed" and eta.any():
            gain, expected = float(eta @ measured), float(eta @ self.last_slopes)
            self.confirmed = max(gain / expected, 0.0) if expected > 0 else 0.0
        return self.confirmed * eta

    def _backtracked(self, u: Mapping[str, Tensor], eta: np.ndarray, latest: np.ndarray) -> tuple[np.ndarray, str]:
        """eta halved until curvature takes no more than nine tenths of what its slope gives, and what was done.

        Where the slope is that of the latest batches, this is the rule of Armijo: their loss falls by a tenth of it.
        Another slope is compared with what their loss adds to its own linear part, so that a batch that happens to
        slope the other way does not stop the training.
        """
        slope = latest if self.slope == "measured" else self.last_slopes
        for i in range(self.backtracking):
            expected = max(float(eta @ slope), 0.0)
            linear = expected if self.slope == "measured" else float(eta @ latest)
            if self.information.change(u, eta) + linear <= (1 - SUFFICIENT) * expected:
                return eta, f"halved {i} times, until the loss fell" if i else ""
            eta = eta / 2
        return eta, f"halved {self.backtracking} times, and the loss did not fall" if self.backtracking else ""

    def _held(self, lengths: np.ndarray, eta: np.ndarray) -> np.ndarray:
        """The rates for a step that did not measure: none is negative, and no group goes further than it was seen to.

        A negative rate says that climbing along one u^s paid because of the others, at that point. Of the next
        gradient nothing of the kind is known. And a gradient that grows says that the rates no longer hold.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(lengths > self._lengths, self._lengths / lengths, 1.0)
        return np.maximum(eta, 0.0) * share

    def _move(self, u: Mapping[str, Tensor], eta: np.ndarray) -> None:
        for group in self.param_groups:
            for name, p in zip(group["names"], group["params"], strict=True):
                a = self.partition.assignment[name]
                if isinstance(a, int):
                    p.add_(u[name].to(p), alpha=-group["lr"] * float(eta[a]))
                else:
                    p.sub_(torch.as_tensor(group["lr"] * eta[a], dtype=p.dtype, device=p.device) * u[name].to(p))

    # ---- saving -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As of `torch.optim.Optimizer`, with the rates, the averages and the place in the data under an entry of its
        own."""
        own = {"steps": self._steps, "status": self._said, "labels": list(self.partition.labels)}
        own |= {
            "eta": None if self._eta is None else self._eta.tolist(),
            "lengths": self._lengths.tolist(),
            "slopes": [self._slopes_weight.tolist(), *self._slopes.tolist()],
            "confirmed": self.confirmed,
            "information": self.information.state_dict(),
        }
        return {**super().state_dict(), EXTRA: own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if EXTRA not in state_dict:
            raise ArgumentError("this is not a state_dict of SummaryNewton", do="save optimizer.state_dict()")
        own = state_dict[EXTRA]
        if own["labels"] != list(self.partition.labels):
            raise ArgumentError(
                f"the state_dict is of another partition: {listed(own['labels'])}",
                do=f"make the optimizer with that partition; this one has {listed(self.partition.labels)}",
            )
        for mine, theirs in zip(self.param_groups, state_dict["param_groups"], strict=False):
            if mine["names"] != theirs["names"]:
                raise ArgumentError(
                    f"in the state_dict {listed(theirs['labels'])} holds other parameters: {listed(theirs['names'])}",
                    do=f"make the optimizer with that partition; here it holds {listed(mine['names'])}",
                )
        if self.information.request.diagonal and own["information"]["sums"].keys() == {"D1", "D2"}:
            raise ArgumentError(
                "the state_dict is of a regularization without D3", do="make the optimizer with that regularization"
            )
        super().load_state_dict({k: v for k, v in state_dict.items() if k != EXTRA})
        self._steps, self.status = own["steps"], own["status"]
        self._said = self.status
        self._eta = None if own["eta"] is None else np.array(own["eta"], dtype=float)
        self._lengths = np.array(own["lengths"], dtype=float)
        weight, *slopes = own.get("slopes", [0.0] * (1 + len(self.partition)))  # none in earlier versions
        self._slopes = np.array(slopes, dtype=float)
        self._slopes_weight = np.zeros_like(self._slopes) + weight  # in earlier versions one for all
        self.confirmed = own.get("confirmed", 1.0)
        self.information.load_state_dict(own["information"])


def _groups(partition: Partition, parameters: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """A param_group per group of whole tensors, and one per tensor that is cut."""
    found: dict[tuple[int, ...], list[str]] = {}
    for name in parameters:
        a = partition.assignment[name]
        found.setdefault((a,) if isinstance(a, int) else tuple(np.unique(a).tolist()), []).append(name)
    return [
        {
            "params": [parameters[n] for n in names],
            "names": names,
            "labels": [partition.labels[i] for i in members],
        }
        for members, names in sorted(found.items())
    ]


def _check_direction(u: Mapping[str, object], gradients: Mapping[str, Tensor]) -> None:
    """Of a function of the user's own."""
    for name, g in gradients.items():
        found = u[name]
        if not isinstance(found, Tensor) or found.shape != g.shape:
            what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise DirectionError(
                f"the direction's function gave {what} for {name!r}, whose gradient has shape {tuple(g.shape)}",
                do="return a tensor like the gradient",
            )
        if not bool(found.isfinite().all()):
            raise DirectionError(
                f"the direction's function gave values that are not finite for {name!r}", do="the gradient was finite"
            )


def _check(**numbers: float) -> None:
    whole, shares = {"period": 1, "batches": 1, "backtracking": 0}, ("rates_momentum", "average")
    for name, x in numbers.items():
        if isinstance(x, bool) or not isinstance(x, Real) or not np.isfinite(x):
            raise ArgumentError(f"{name} is a number, not {x!r}")
        if name in whole and (x < whole[name] or x != int(x)):
            raise ArgumentError(f"{name} is a whole number of at least {whole[name]}, not {x!r}")
        if name in shares and not 0 <= x < 1:
            raise ArgumentError(f"{name} is at least 0 and below 1, not {x!r}")
        if name == "damping" and not x > 0:
            raise ArgumentError(f"damping is positive, not {x!r}")
        if name == "trust" and x < 0:
            raise ArgumentError(f"trust is a number of standard errors, at least 0, not {x!r}")


def _check_choices(**given: tuple[str, Iterable[str]]) -> None:
    for name, (value, choices) in given.items():
        if value not in choices:
            raise ArgumentError(f"{name} is one of {listed(choices)}, not {value!r}")
