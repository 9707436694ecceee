"""From a state to what it shows: the Datasets at hand, what they offer, and the numbers of each view, kept."""

from __future__ import annotations

import fnmatch
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import xarray as xr

from hoanalysis import schema
from hoanalysis.analysis.arrays import Array, step_labels
from hoanalysis.analysis.coarsen import fewest, suggest_partition
from hoanalysis.analysis.merge import By
from hoanalysis.errors import ArgumentError, HoError, listed
from hoanalysis.explorer.estimates import Checkpoint, Estimate, Shown, difference
from hoanalysis.explorer.state import ALL, THIS_RUN, Offer, State, fitted

T = TypeVar("T")
KEPT = 1024  # results; a matrix of S = 100 groups with its errors takes 160 kB
TAUS = np.linspace(0.0, 2.0, 41)
TRAJECTORIES = 5
SAME = "exactly 0: both are the same checkpoint"


@dataclass(frozen=True)
class Series:
    """The values of one entry over the checkpoints."""

    name: str
    values: Array
    errors: Array


@dataclass(frozen=True)
class Followed:
    """A selected entry with its value and error; ``absent`` where what is shown has no such entry."""

    entry: tuple[str, ...]
    value: float
    error: float
    absent: bool = False


@dataclass(frozen=True)
class View:
    """All that a state shows, as numbers: `figures` draws it, `words` tells it.

    ``shown`` is the main picture; ``whole`` the same before entries were masked. ``limit`` ends the colours where they
    are shared. ``entries`` are those whose trajectories are drawn, ``followed`` the selected ones with their values,
    whatever block or slice is shown. ``notes`` says in sentences what could not be shown as asked.
    """

    state: State
    shown: Shown | None
    whole: Shown | None
    step: Any
    n_groups: int
    loss: tuple[float, float] | None = None
    limit: float | None = None
    reference: str = ""
    entries: tuple[tuple[str, ...], ...] = ()
    followed: tuple[Followed, ...] = ()
    notes: list[str] = field(default_factory=list)


class Session:
    """The Datasets of an explorer, and what was computed of them.

    Parameters
    ----------
    ds
        The run that is explored: a summary Dataset, with or without ``step``.
    others
        Name -> Dataset of runs to compare with.
    """

    def __init__(self, ds: xr.Dataset, others: Mapping[str, xr.Dataset] | None = None) -> None:
        if others is not None and not isinstance(others, Mapping):
            raise ArgumentError(
                f"others= is a mapping of names to Datasets, not a {type(others).__name__}",
                do="give others={'seed 1': ds1}",
            )
        self.given_others = {str(k): v for k, v in (others or {}).items()}
        self.others = {name: _series(other, f"others, {name!r}") for name, other in self.given_others.items()}
        if THIS_RUN in self.others or "" in self.others:
            raise ArgumentError(f"a run to compare with cannot be called {THIS_RUN!r} or ''", where="others")
        self.update(ds)

    def update(self, ds: xr.Dataset) -> None:
        """Take another Dataset of the same run, with more units filled in."""
        self.given, self.ds = ds, _series(ds)
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()

    # ---- what can be chosen -----------------------------------------------------------------------------------------

    def runs(self) -> dict[str, xr.Dataset]:
        """All Datasets by name, the explored one first."""
        return {THIS_RUN: self.ds, **self.others}

    def fitted(self, state: State) -> tuple[State, Offer, list[str]]:
        """The state that can be shown, what could be chosen instead, and what had to be changed."""
        found, offer, notes = self._keep(("fitted", state), lambda: self._fitted(state))
        return found, offer, list(notes)

    def _fitted(self, state: State) -> tuple[State, Offer, list[str]]:
        notes: list[str] = []
        try:
            self.grouping(state)
        except HoError as error:
            notes.append(f"{error.what[0].upper()}{error.what[1:]}{': ' + error.do if error.do else ''}.")
            state = state.but(grouping="tensor")
        offer = self.offer(state)
        found, more = fitted(state, offer)
        return found, offer, notes + more

    def offer(self, state: State) -> Offer:
        """What the Dataset lets one choose under the grouping of ``state``."""
        return self._keep(("offer", *_grouping_key(state)), lambda: self._offer(state))

    def _offer(self, state: State) -> Offer:
        labels, kinds = self._keep(("labels", *_grouping_key(state)), lambda: self._labels(state))
        steps = tuple(map(_plain, step_labels(self.ds))) if self.ds.sizes[schema.STEP] else ()
        done = np.isfinite(np.atleast_1d(self.ds[schema.LOSS].values).astype(float))
        initials = dict.fromkeys(k[0].upper() for k in schema.KINDS if k in kinds)
        pairs = [a + b for i, a in enumerate(initials) for b in list(initials)[i:]] if len(initials) > 1 else []
        pairs.sort(key=lambda p: (not set(p) <= {"W", "B"}, p[0] != p[1]))
        return Offer(
            steps,
            tuple(s for s, ok in zip(steps, done, strict=True) if ok),
            tuple(_full_orders(self.ds)),
            labels,
            (ALL, *pairs),
            {name: tuple(map(_plain, step_labels(run))) for name, run in self.runs().items()},
        )

    def _labels(self, state: State) -> tuple[tuple[str, ...], tuple[str, ...]]:
        by = self.grouping(state)
        bare = self.ds[[schema.LOSS, *(["D1"] if "D1" in self.ds else [])]]
        merged = bare if by is None else bare.ho.merge(by)
        kinds = tuple(map(str, merged["kind"].values)) if "kind" in merged.coords else ()
        return tuple(schema.labels(merged)), kinds

    def grouping(self, state: State, run: str = THIS_RUN) -> By | None:
        """What `merge` takes for the state's grouping of a run; None for the groups as stored."""
        key = ("grouping", run, *_grouping_key(state))
        return self._keep(key, lambda: _grouping(self.runs()[run], state))

    # ---- views ------------------------------------------------------------------------------------------------------

    def view(self, state: State) -> View:
        """What the state shows. What cannot be computed is a note in words, and the picture is left out."""
        return self._keep(("view", state), lambda: self._view(state))

    def _view(self, state: State) -> View:
        state, _, notes = self.fitted(state)
        try:
            whole = self._whole(state)
        except HoError as error:
            return View(state, None, None, state.step, 0, notes=[*notes, told(error)])
        if whole is None:
            return View(state, None, None, state.step, 0, notes=[*notes, "The run has no checkpoints."])
        n_groups, whole = len(whole.rows), self._block(whole, state)
        shown = _masked(whole) if state.mask else whole
        limit = self._limit(state) if state.shared else None
        at = self._at(THIS_RUN, state.step)
        loss = (float(at[schema.LOSS]), float(at.get("loss_se", np.nan)))
        state = self._told_slices(state)
        entries = state.entries or tuple(entry for entry, _, _ in ranked(whole, state, TRAJECTORIES))
        followed = tuple(self._followed(state, entry) for entry in state.entries)
        return View(
            state, shown, whole, state.step, n_groups, loss, limit, self._reference(state), entries, followed, notes
        )

    def rates(self, state: State) -> list[tuple[str, Shown]]:
        """The learning rates of the checkpoint, and of the one it is compared with: name -> vector."""
        found = []
        for name, run, step in self._compared(state):
            point = self._checkpoint(run, step, state)
            key = ("rates", run, step, state.regularization, state.epsilon, *_grouping_key(state))

            def make(point: Checkpoint = point) -> Shown:
                rates = point.rates(state.regularization, state.epsilon)  # type: ignore[arg-type]
                return Shown(rates.labels, rates.labels, rates.value(), rates.error(), rates.title, rates.units)

            found.append((name, self._keep(key, make)))
        return found

    def along(self, state: State) -> tuple[Array, Array]:
        """The Taylor prediction along minus the learning rates, and its error, shape (orders, taus of `TAUS`)."""
        rates = self.rates(state.but(compare_run=""))[0][1]
        key = ("along", state.step, state.regularization, state.epsilon, *_grouping_key(state))
        point = self._checkpoint(THIS_RUN, state.step, state)
        return self._keep(key, lambda: point.along(rates.values, TAUS))

    def trajectories(self, state: State) -> tuple[list[Any], list[Series]]:
        """The selected entries at every checkpoint, the strongest of the view where none is selected."""
        view = self.view(state)
        steps = list(self.offer(state).steps)
        alone = view.state.but(compare_run="", compare_step=None)
        found = []
        for entry in view.entries:
            values, errors = np.full(len(steps), np.nan), np.full(len(steps), np.nan)
            for k, step in enumerate(steps):
                point = self._followed(alone.but(step=step), entry)
                values[k], errors[k] = point.value, point.error
            found.append(Series(entry_name(entry), values, errors))
        return steps, found

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _followed(self, state: State, entry: tuple[str, ...]) -> Followed:
        """An entry of the tensor that is shown, of any block and slice."""
        part = self._whole(state.but(slices=entry[2:]))
        place = place_of(part, entry)
        if part is None or place is None:
            return Followed(entry, np.nan, np.nan, absent=True)
        return Followed(entry, float(part.values[place]), float(part.errors[place]))

    def _whole(self, state: State) -> Shown | None:
        """The main picture before block and mask."""
        if state.step is None:
            return None
        state = self._told_slices(state)
        key = (
            "whole", state.step, state.order, state.matrix, state.slices, state.compare_run, state.compare_step,
            *((state.regularization, state.epsilon) if state.matrix == "inverse" else ()), *_grouping_key(state),
        )  # fmt: skip
        return self._keep(key, lambda: self._made(state))

    def _made(self, state: State) -> Shown:
        pairs = self._compared(state)
        points = [self._checkpoint(run, step, state) for _, run, step in pairs]
        estimates = [_estimate(point, state) for point in points]
        if len(pairs) == 1:
            e = estimates[0]
            return Shown(e.labels, e.labels, e.value(), e.error(), e.title, e.units)
        if pairs[0][1:] == pairs[1][1:]:
            e = estimates[0]
            nothing = (
                e.value() - e.value()
            )  # 0, and NaN where there is no number; both errors are those of one estimate
            return Shown(e.labels, e.labels, nothing, nothing, f"difference of the {e.title}", e.units, SAME)
        return difference(estimates[0], estimates[1], points[0].light, points[1].light)

    def _told_slices(self, state: State) -> State:
        """The slices that are shown where the state leaves them open, so that they stay while the step moves.

        They are the strongest at the last computed checkpoint.
        """
        if len(state.slices) == max(state.order - 2, 0) or not self.offer(state).computed:
            return state
        last = self.offer(state).computed[-1]
        key = ("slices", state.order, *_grouping_key(state))
        chosen = self._keep(key, lambda: self._checkpoint(THIS_RUN, last, state).strongest_slice(state.order))
        return state.but(slices=(state.slices + chosen)[: state.order - 2] if state.slices else chosen)

    def _compared(self, state: State) -> list[tuple[str, str, Any]]:
        """(name, run, step) of what is shown and of what it is compared with."""
        found = [(f"step {state.step}", THIS_RUN, state.step)]
        if state.compare_run:
            steps = self.offer(state).runs[state.compare_run]
            step = state.compare_step
            if step is None:
                step = self._compared_first(state)
            if not steps:
                raise ArgumentError(f"the run {state.compare_run!r} has no checkpoints", do="compare with another run")
            found.append((f"{state.compare_run}, step {step}", state.compare_run, step))
        return found

    def _compared_first(self, state: State) -> Any:
        """The step that a comparison begins with: of this run the checkpoint before, of another the same step."""
        steps = self.offer(state).runs[state.compare_run]
        if state.compare_run != THIS_RUN:
            return state.step if state.step in steps else next(reversed(steps), None)
        before = steps[: steps.index(state.step)]
        done = set(self.offer(state).computed)
        return next((s for s in reversed(before) if s in done), state.step)

    def _reference(self, state: State) -> str:
        pairs = self._compared(state)
        if len(pairs) < 2:
            return ""
        return f"{pairs[1][0]} (the same checkpoint)" if pairs[0][1:] == pairs[1][1:] else pairs[1][0]

    def _at(self, run: str, step: Any) -> xr.Dataset:
        ds = self.runs()[run]
        return ds.isel({schema.STEP: [_plain(s) for s in step_labels(ds)].index(step)})

    def _checkpoint(self, run: str, step: Any, state: State) -> Checkpoint:
        key = ("checkpoint", run, step, *_grouping_key(state))
        return self._keep(key, lambda: Checkpoint(self._at(run, step), self.grouping(state, run)))

    def _block(self, whole: Shown, state: State) -> Shown:
        if state.block == ALL or whole.values.ndim < 2:
            return whole
        _, kinds = self._keep(("labels", *_grouping_key(state)), lambda: self._labels(state))
        kind = dict(zip(self.offer(state).labels, (k[0].upper() for k in kinds), strict=True))
        rows, columns = ([i for i, g in enumerate(whole.rows) if kind.get(g) == letter] for letter in state.block)
        return Shown(
            tuple(whole.rows[i] for i in rows), tuple(whole.columns[i] for i in columns),
            whole.values[np.ix_(rows, columns)], whole.errors[np.ix_(rows, columns)],
            whole.title, whole.units, whole.how,
        )  # fmt: skip

    def _limit(self, state: State) -> float | None:
        """The largest size over all checkpoints of what is shown."""
        tops = []
        for step in self.offer(state).computed:
            try:
                whole = self._whole(state.but(step=step))
            except HoError:
                continue
            if whole is not None:
                tops.append(np.nanmax(np.abs(self._block(whole, state).values), initial=0.0))
        return float(max(tops)) if tops and max(tops) > 0 else None

    def _keep(self, key: Hashable, make: Callable[[], T]) -> T:
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        value = self._kept[key] = make()
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return value


def _series(ds: xr.Dataset, where: str = "") -> xr.Dataset:
    """The Dataset with ``step`` as a dim, whatever it had."""
    if not isinstance(ds, xr.Dataset):
        raise ArgumentError(
            f"a run is a Dataset of summaries, not of type {type(ds).__name__}",
            where=where,
            do="open it with ho.open_dataset(path)",
        )
    schema.validate(ds)
    if not ds.sizes[schema.GROUP]:
        raise ArgumentError("the Dataset has no groups, so that there is nothing to show", where=where,
                            do="select at least one group")  # fmt: skip
    if schema.STEP in ds.dims:
        return ds
    return ds.expand_dims(schema.STEP) if schema.STEP in ds.coords else ds.expand_dims({schema.STEP: [0]})


def _plain(label: Any) -> Any:
    return label.item() if isinstance(label, np.generic) else label


def _full_orders(ds: xr.Dataset) -> list[int]:
    held = schema.orders(ds)
    return held if 2 in held else [o for o in held if o == 1]  # slices are scaled by D2


def _grouping_key(state: State) -> tuple[Hashable, ...]:
    """The part of the state that the groups depend on."""
    detail: Hashable = None
    if state.grouping in ("blocks", "suggested"):
        detail = state.n_blocks
    elif state.grouping == "pattern":
        detail = state.pattern
    return state.grouping, detail


def _grouping(ds: xr.Dataset, state: State) -> By | None:
    if state.grouping in ("layer", "kind"):
        return state.grouping
    n = min(state.n_blocks, ds.sizes[schema.GROUP])
    if state.grouping == "blocks":
        return n
    if state.grouping == "suggested":
        light = ds[[v for v in ds.data_vars if str(v).startswith(("loss", "D1", "D2", "weight"))]]
        return dict(suggest_partition(light, max(n, fewest(light))))
    if state.grouping == "pattern":
        return matched(schema.labels(ds), state.pattern) or None
    return None


def matched(labels: list[str], pattern: str) -> dict[str, list[str]]:
    """``{new: [old, ..]}`` of comma-separated globs, each with a name in front or its own text as the name.

    A group joins the first that matches it; what none matches is left out, and so stays as it is.

    >>> matched(["conv1.weight", "conv2.weight", "fc.weight"], "body=conv*")
    {'body': ['conv1.weight', 'conv2.weight']}
    """
    found: dict[str, list[str]] = {}
    free = list(labels)
    for part in filter(None, (p.strip() for p in pattern.split(","))):
        name, equals, glob = part.partition("=")
        name, glob = (name.strip(), glob.strip()) if equals else (part, part)
        members = [g for g in free if fnmatch.fnmatchcase(g, glob)]
        if not members:
            raise ArgumentError(
                f"the pattern {glob!r} matches no group that is left", do=f"the groups are {listed(labels, 6)}"
            )
        found.setdefault(name, []).extend(members)
        free = [g for g in free if g not in members]
    for name in [n for n in found if n in free]:
        raise ArgumentError(f"the new name {name!r} belongs to a group that is not merged", do="use another name")
    return found


def _estimate(point: Checkpoint, state: State) -> Estimate:
    if state.order == 1:
        return point.slope()
    if state.order == 2:
        return point.matrix(state.matrix, state.regularization, state.epsilon)  # type: ignore[arg-type]
    return point.slice(state.order, state.slices, state.matrix == "scale_free")


def _masked(shown: Shown) -> Shown:
    values = np.where(shown.settled, shown.values, 0.0)
    return Shown(shown.rows, shown.columns, values, shown.errors, shown.title, shown.units, shown.how)


def ranked(shown: Shown, state: State, top: int | None = None) -> list[tuple[tuple[str, ...], float, float]]:
    """(entry, value, error) of the ``top`` largest of what is shown; each pair once, those off the diagonal first."""
    values = np.asarray(shown.values, dtype=float)
    if values.ndim == 1:
        order = np.argsort(-np.abs(np.nan_to_num(values)), kind="stable")
        order = order[np.isfinite(values[order])][:top]
        return [((shown.rows[i],), float(values[i]), float(shown.errors[i])) for i in order]
    rows, columns = np.nonzero(np.isfinite(values))
    if shown.rows == shown.columns:
        rows, columns = rows[rows <= columns], columns[rows <= columns]
    place = {g: j for j, g in enumerate(shown.columns)}
    same = np.array([place.get(g, -1) for g in shown.rows], dtype=int)[rows] == columns
    order = np.lexsort((-np.abs(values[rows, columns]), same))[:top]
    return [
        (
            (shown.rows[i], shown.columns[j], *state.slices),
            float(values[i, j]),
            float(shown.errors[i, j]),
        )
        for i, j in zip(rows[order].tolist(), columns[order].tolist(), strict=True)
    ]


def entry_name(entry: tuple[str, ...]) -> str:
    """How an entry is called: its groups joined by a cross."""
    return " \N{MULTIPLICATION SIGN} ".join(entry)


def place_of(part: Shown | None, entry: tuple[str, ...]) -> tuple[int, ...] | None:
    if part is None:
        return None
    at = entry[: part.values.ndim]
    if at[0] not in part.rows or (len(at) > 1 and at[1] not in part.columns):
        return None
    return (part.rows.index(at[0]), *([part.columns.index(at[1])] if len(at) > 1 else []))


def told(error: HoError) -> str:
    """An error as sentences."""
    what = error.what[0].upper() + error.what[1:]
    return ". ".join(filter(None, [what, f"To do: {error.do}" if error.do else ""])) + "."
