"""What a user chose to see: plain values, saved and restored as JSON, and fitted to the Dataset at hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from hoanalysis.analysis.regularized import REGULARIZATIONS
from hoanalysis.errors import ArgumentError, listed, nearest

MATRICES = {"H": "as it is", "inverse": "inverse", "scale_free": "scale-free"}
GROUPINGS = {
    "tensor": "as stored",
    "layer": "by layer",
    "kind": "by kind",
    "blocks": "n blocks",
    "suggested": "n suggested",
    "pattern": "by pattern",
}
PANELS = {"rates": "Learning rates", "trajectories": "Trajectories", "taylor": "Taylor prediction"}
SCALES = {"auto": "as the values need", "linear": "linear", "log": "symmetric log"}
ALL, NO_RUN, THIS_RUN = "all", "", "this run"


@dataclass(frozen=True)
class State:
    """The choices of an explorer. Every field is a JSON value; ``None`` and ``()`` leave the choice to the data.

    Attributes
    ----------
    step
        The checkpoint; None is the last computed one.
    order
        d of the tensor D^(d) that the picture shows.
    matrix
        ``"H"`` (the tensor itself), ``"inverse"`` (order 2) or ``"scale_free"``, divided by sqrt|H_ss| for each index.
    slices
        The groups of the third and every further index, d - 2 of them; empty: the strongest slice.
    block
        ``"all"``, or the kinds of the rows and columns: ``"WW"``, ``"BB"``, ``"WB"``, ...
    grouping, n_blocks, pattern
        ``"tensor"`` (as stored), ``"layer"``, ``"kind"``, ``"blocks"`` (``n_blocks`` runs of neighbours),
        ``"suggested"`` (the ``n_blocks`` groups that lose least of a step) or ``"pattern"``: ``"conv*, head=fc3.*"``,
        one new group for each, the groups that none matches as they are.
    scale, shared
        ``"linear"``, ``"log"`` (signed, four decades) or ``"auto"``, log where linear colours would be white; whether
        they mean the same at every checkpoint.
    mask
        Hide entries within 2 standard errors of 0.
    regularization, epsilon
        Of learning rates, the inverse and the Taylor prediction; see `analysis.steps.learning_rates`.
    compare_run, compare_step
        What is subtracted: ``""`` nothing, ``"this run"`` or the name of another; and its step (None: the checkpoint
        before of this run, the same step of another).
    entries
        The entries whose trajectories are drawn, each a list of labels of its rows, columns (and slices); empty: the
        strongest of what is shown.
    panel
        The panel beside the matrix: ``"rates"``, ``"trajectories"`` or ``"taylor"``.

    >>> State.of({"order": 3, "slices": ["fc1.weight"]}).chosen()
    {'order': 3, 'slices': ['fc1.weight']}
    """

    step: Any = None
    order: int = 2
    matrix: str = "H"
    slices: tuple[str, ...] = ()
    block: str = ALL
    grouping: str = "tensor"
    n_blocks: int = 2
    pattern: str = ""
    scale: str = "auto"
    shared: bool = False
    mask: bool = False
    regularization: str | None = None
    epsilon: float = 1.0
    compare_run: str = NO_RUN
    compare_step: Any = None
    entries: tuple[tuple[str, ...], ...] = ()
    panel: str = "rates"

    def __post_init__(self) -> None:
        for f in fields(self):  # labels and counts read from a Dataset are numpy's
            if isinstance(value := getattr(self, f.name), np.generic):
                object.__setattr__(self, f.name, value.item())
        object.__setattr__(self, "slices", _labels(self.slices, "slices"))
        object.__setattr__(self, "entries", _entries(self.entries))
        for name, known in _KNOWN.items():
            if getattr(self, name) not in known:
                do = nearest(str(getattr(self, name)), [str(k) for k in known])
                raise ArgumentError(f"unknown choice {getattr(self, name)!r}", where=f"state, {name!r}", do=do)
        for name in ("order", "n_blocks"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(f"{name} is a whole number from 1 on, not {value!r}", where="state")
        for name in ("block", "pattern", "compare_run"):
            if not isinstance(value := getattr(self, name), str):
                raise ArgumentError(f"{name} is a text, not {value!r}", where="state")
        for name in ("step", "compare_step"):
            value = getattr(self, name)
            if isinstance(value, Iterable) and not isinstance(value, str):
                raise ArgumentError(f"{name} is the step of one checkpoint, not {value!r}", where="state")
        epsilon = self.epsilon
        if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 < epsilon < float("inf"):
            raise ArgumentError(f"epsilon must be positive and finite, not {epsilon!r}", where="state")

    @classmethod
    def of(cls, choices: Mapping[str, Any] | State | None) -> State:
        """The state of a mapping as `chosen` or JSON gives it."""
        if isinstance(choices, State):
            return choices
        if choices is not None and not isinstance(choices, Mapping):
            raise ArgumentError(
                f"a state is a mapping of choices, not {choices!r}", do="give state={'step': 120, 'matrix': 'inverse'}"
            )
        choices = dict(choices or {})
        known = [f.name for f in fields(cls)]
        for name in choices:
            if name not in known:
                raise ArgumentError(f"a state has no {name!r}", do=nearest(str(name), known))
        return cls(**choices)

    def chosen(self) -> dict[str, Any]:
        """What differs from the defaults, as JSON values: ``State.of(state.chosen()) == state``."""
        default = State()
        values = {k: v for k, v in asdict(self).items() if v != getattr(default, k)}
        if "slices" in values:
            values["slices"] = list(self.slices)
        if "entries" in values:
            values["entries"] = [list(entry) for entry in self.entries]
        return values

    def but(self, **changes: Any) -> State:
        """The same with some choices changed."""
        return replace(self, **changes)


_KNOWN: dict[str, Sequence[Any]] = {
    "matrix": list(MATRICES),
    "grouping": list(GROUPINGS),
    "scale": list(SCALES),
    "regularization": REGULARIZATIONS,
    "panel": list(PANELS),
    "shared": (False, True),
    "mask": (False, True),
}


def _labels(value: Any, name: str) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ArgumentError(f"{name} holds lists of group labels, not {value!r}", where="state")
    return tuple(str(label) for label in value)


def _entries(value: Any) -> tuple[tuple[str, ...], ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ArgumentError(f"entries is a list of entries, each a list of group labels, not {value!r}", where="state")
    return tuple(_labels(entry, "entries") for entry in value)


@dataclass(frozen=True)
class Offer:
    """What a Dataset lets one choose: the values of each control."""

    steps: tuple[Any, ...]
    computed: tuple[Any, ...]
    orders: tuple[int, ...]
    labels: tuple[str, ...]
    blocks: tuple[str, ...]
    runs: Mapping[str, tuple[Any, ...]]  # name -> its steps; the first is this run

    def matrices(self, order: int) -> tuple[str, ...]:
        """The matrices that there are at an order."""
        return {1: ("H",), 2: ("H", "inverse", "scale_free")}.get(order, ("H", "scale_free"))


def fitted(state: State, offer: Offer) -> tuple[State, list[str]]:
    """The nearest state that the Dataset can show, and in sentences what was changed to get there."""
    notes: list[str] = []
    step = state.step
    if step not in offer.steps:
        if step is not None:
            notes.append(f"There is no checkpoint at step {step}; the steps are {listed(offer.steps, 5)}.")
        step = next(iter(reversed(offer.computed or offer.steps)), None)
    order = state.order
    if offer.orders and order not in offer.orders:
        order = max((o for o in offer.orders if o <= order), default=offer.orders[0])
        notes.append(f"D{state.order} is not stored in full; D{order} is shown.")
    matrix = state.matrix
    if matrix not in offer.matrices(order):
        matrix = "scale_free" if order > 2 else "H"
        notes.append(f"There is no {MATRICES[state.matrix]} D{order}; what is shown is {MATRICES[matrix]}.")
    if len(state.slices) > max(state.order - 2, 0):
        notes.append(f"D{state.order} has fewer further indices than {listed(state.slices)}; the last are left out.")
    slices = tuple(s for s in state.slices[: max(order - 2, 0)])
    if gone := [s for s in slices if s not in offer.labels]:
        notes.append(f"No group is called {listed(gone)} in this grouping; the strongest slice is shown.")
        slices = ()
    block = state.block
    if block not in offer.blocks:
        notes.append(f"There is no block {block} in this grouping; all groups are shown.")
        block = ALL
    run, at = _reference(state, offer, notes)
    known = set(offer.labels)
    entries = tuple(e for e in state.entries if len(e) == order and known.issuperset(e))
    if gone := [g for g in dict.fromkeys(g for e in state.entries for g in e) if g not in known]:
        notes.append(f"No group is called {listed(gone)} in this grouping; entries of it are left out.")
    if any(len(e) != state.order for e in state.entries):
        notes.append(f"Selected entries whose number of indices is not that of D{state.order} are left out.")
    found = state.but(
        step=step, order=order, matrix=matrix, slices=slices, block=block, compare_run=run, compare_step=at,
        entries=entries,
    )  # fmt: skip
    return found, notes


def _reference(state: State, offer: Offer, notes: list[str]) -> tuple[str, Any]:
    run, at = state.compare_run, state.compare_step
    if run == NO_RUN:
        if at is not None:
            notes.append(f"Nothing is subtracted: step {at} is of no run; choose compare_run as well.")
        return NO_RUN, None
    if run not in offer.runs:
        notes.append(f"There is no run {run!r} to compare with; give it in others={{name: Dataset}}.")
        return NO_RUN, None
    if at is not None and at not in offer.runs[run]:
        notes.append(f"The run {run!r} has no checkpoint at step {at}.")
        at = None
    return run, at
