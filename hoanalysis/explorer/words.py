"""The sentence that says what is shown, the values of the selected entries, and the line of code that reproduces it."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from hoanalysis.explorer.session import SAME, View, entry_name, place_of, ranked
from hoanalysis.explorer.state import ALL, GROUPINGS, State


def sentence(view: View) -> str:
    """What the picture shows, in a few sentences: what, where, the loss, the strongest entries, how many are unsettled.

    Numbers in it have four digits, errors two.
    """
    if view.shown is None or view.whole is None:
        return " ".join(view.notes) or "There is nothing to show."
    state, shown = view.state, view.shown
    minus = f" minus {view.reference}" if view.reference else ""
    of = f"{view.n_groups} group{'s' * (view.n_groups != 1)}, {_grouping(state)}"
    block = f", block {state.block}" if state.block != ALL and shown.values.ndim > 1 else ""
    unit = "" if shown.units == "1" else f" [{shown.units}]"
    parts = [f"Step {view.step}{minus}: {shown.title}{_regularized(state)}{unit} of {of}{block}."]
    if view.loss is not None and np.isfinite(view.loss[0]):
        parts.append(f"The loss is {number(*view.loss)}.")
    parts += [_strongest(view), _unsettled(view), *view.notes]
    return " ".join(filter(None, parts))


def _grouping(state: State) -> str:
    if state.grouping in ("blocks", "suggested"):
        return GROUPINGS[state.grouping].replace("n ", f"{state.n_blocks} ")
    return f"by the pattern {state.pattern}" if state.grouping == "pattern" else GROUPINGS[state.grouping]


def _regularized(state: State) -> str:
    if state.order == 2 and state.matrix == "inverse" and state.regularization:
        return f" with {state.regularization} regularization ({state.epsilon:g})"
    return ""


def _strongest(view: View) -> str:
    assert view.shown is not None
    found = ranked(view.shown, view.state, 1)
    if found and view.shown.how == SAME:
        return f"Every difference is {SAME}."
    if not found:
        return nothing(view)
    ((entry, value, error),) = found
    pair = "strongest pair" if len(entry) == 2 else "strongest entry"
    noun = "largest entry" if view.shown.values.ndim == 1 or entry[0] == entry[1] else pair
    return f"The {noun} is {entry_name(entry)}: {number(value, error)}."


def nothing(view: View) -> str:
    """Why no entry of what is shown is a number."""
    if view.loss is None or not np.isfinite(view.loss[0]):
        return "This checkpoint is not computed."
    return "Nothing here is a number: no entry is computed, or no group has an effect."


def _unsettled(view: View) -> str:
    """How many entries are within two standard errors of 0; each pair counted once."""
    assert view.whole is not None
    shown = view.whole
    if shown.how == SAME:
        return ""
    known = np.isfinite(shown.values) & np.isfinite(shown.errors)
    once = np.triu(known) if known.ndim == 2 and shown.rows == shown.columns else known
    if not once.any():
        return "No standard errors are kept." if np.isfinite(shown.values).any() else ""
    doubtful = int((once & ~shown.settled).sum())
    how = f" Errors of the difference are {shown.how}." if shown.how else ""
    hidden = ", and hidden" if view.state.mask and doubtful else ""
    return f"{doubtful} of {int(once.sum())} entries are within 2 standard errors of zero{hidden}.{how}"


def number(value: float, error: float = np.nan) -> str:
    """A value with its standard error.

    >>> number(0.123456, 0.00789), number(2.0), number(float("nan"))
    ('0.1235 ± 0.0079', '2', 'not a number')
    """
    if not isfinite(value):
        return "not a number"
    return f"{value:.4g} ± {error:.2g}" if isfinite(error) else f"{value:.4g}"


def table(view: View, top: int = 12) -> pd.DataFrame:
    """The selected entries with value, error and significance; without a selection the strongest ``top``."""
    if view.shown is None or view.whole is None:
        return pd.DataFrame(columns=["entry", "value", "standard error", "value / error"])
    rows = []
    for name, value, error in _selected(view) or _strong(view, top):
        significance = abs(value) / error if np.isfinite(error) and error > 0 else np.nan
        rows.append((name, value, error, significance))
    return pd.DataFrame(rows, columns=["entry", "value", "standard error", "value / error"])


def _selected(view: View) -> list[tuple[str, float, float]]:
    """The selected entries: name, value and error."""
    absent = " (not in this view)"
    return [(entry_name(f.entry) + (absent if f.absent else ""), f.value, f.error) for f in view.followed]


def _strong(view: View, top: int) -> list[tuple[str, float, float]]:
    """The ``top`` strongest entries of the picture: name, value and error as they are without the mask."""
    assert view.shown is not None
    assert view.whole is not None
    places = [(entry, place_of(view.whole, entry)) for entry, _, _ in ranked(view.shown, view.state, top)]
    values, errors = view.whole.values, view.whole.errors
    return [(entry_name(entry), float(values[at]), float(errors[at])) for entry, at in places if at is not None]


def choices(view: View, top: int = 60) -> list[tuple[str, tuple[str, ...]]]:
    """The entries that can be followed, as (text, entry): those that are chosen, and the strongest of what is shown."""
    if view.whole is None:
        return []
    chosen = {tuple(sorted(f.entry)) for f in view.followed}  # D^(d) is symmetric: (s, t) and (t, s) are one entry
    most = ranked(view.whole, view.state, top + len(chosen))
    free = [x for x in most if tuple(sorted(x[0])) not in chosen][:top]
    found = [
        (name, value, error, f.entry) for (name, value, error), f in zip(_selected(view), view.followed, strict=True)
    ]
    found += [(entry_name(entry), value, error, entry) for entry, value, error in free]
    return [(f"{name}: {number(value, error)}", entry) for name, value, error, entry in found]


def code(state: State, name: str, others: Mapping[str, str] | None = None) -> str:
    """The line that makes the figure of ``state``; ``name`` is the expression of the Dataset, ``others`` those of runs.

    >>> code(State(order=3), "ds")
    "ho.explore(ds, state={'order': 3}).figure()"
    """
    arguments = [name]
    if others:
        arguments.append("others={" + ", ".join(f"{k!r}: {v}" for k, v in others.items()) + "}")
    if chosen := state.chosen():
        arguments.append(f"state={chosen!r}")
    return f"ho.explore({', '.join(arguments)}).figure()"


def name_of(ds: xr.Dataset, namespace: Mapping[str, Any], default: str = "ds") -> str:
    """The variable of ``namespace`` that is this Dataset; ``default`` where none is."""
    names = [n for n, value in namespace.items() if value is ds and n.isidentifier() and not n.startswith("_")]
    return names[0] if names else default
