"""Loss and D1 of each batch beside the others: a wrong label, a damaged image, a batch of another kind.

The rule: of x_b over n >= 8 batches of weight w_b, b is an outlier where, with m the median,

    |x_b - m| > 8 * 1.4826 * median |x - m|     and     w_b |x_b - m| > 0.05 sum_b w_b |x_b|

The first is 8 standard deviations where the x_b are normal; batches of less weight vary more, and their distance is
multiplied by the root of their share of a full one. The second leaves out what does not matter to the mean: losses near
0 spread over orders of magnitude. Within such a batch the samples of the largest loss are named.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from hoanalysis.diagnosis.derivatives import not_finite
from hoanalysis.diagnosis.findings import Finding
from hoanalysis.diagnosis.loader import Kept
from hoanalysis.diagnosis.subject import Subject, quick
from hoanalysis.errors import HoError
from hoanalysis.problem import Problem, State, count_rows, keep_random_state, naming_batch
from hoanalysis.summaries import Work, summarize

FAR = 8.0
FEWEST = 8  # batches
SHARE = 0.05  # of the whole
MANY = 0.25  # of the batches: then they are no outliers, but another kind
GRADIENTS = 12.0  # a forward pass is so much cheaper than the passes that D1 takes


def outliers(values: Sequence[float], weights: Sequence[float]) -> np.ndarray:
    """The positions of outlying values, the farthest first.

    >>> outliers([1.0, 1.1, 0.9, 1.0, 1.05, 0.95, 1.0, 9.0], [8] * 8).tolist()
    [7]
    """
    x, w = np.asarray(values, float), np.asarray(weights, float)
    if len(x) < FEWEST:
        return np.array([], int)
    away = np.abs(x - np.median(x))
    spread = 1.4826 * np.median(away)
    size = np.sqrt(np.minimum(w / np.median(w), 1.0))
    score = away * size / max(spread, 1e-3 * abs(float(np.median(x))), np.finfo(float).tiny)
    matters = w * away > SHARE * np.sum(w * np.abs(x))
    found = np.flatnonzero((score > FAR) & matters)
    return found[np.argsort(-score[found])]


def examine(subject: Subject, problem: Problem, kept: Kept, seconds: float, known: bool = False) -> Iterator[Finding]:
    """As many batches as there is time for. ``known``: that losses are not finite has been told."""
    work = Work(problem, quick(subject.settings[0]))
    state = work.state(subject.checkpoint)
    losses, sizes, broken = _losses(problem, state, kept, seconds / 2, known)
    n = len(losses)
    yield from broken
    good = [i for i in range(n) if np.isfinite(losses[i])]
    if not good:
        return
    found = _judged(problem, state, kept, [(losses[i], sizes[i]) for i in good], good, "loss")
    found += _of_slopes(subject, problem, kept, good, sizes, seconds)
    whole = "all" if n == len(kept.batches) and kept.whole else "the first"
    if not found and not broken:
        few = "" if n >= FEWEST else f"; too few to tell outliers, which takes {FEWEST}"
        yield Finding(
            "ok", "batches", f"losses of {whole} {n} batches from {min(losses):.4g} to {max(losses):.4g}{few}"
        )
    yield from found


def _losses(
    problem: Problem, state: State, kept: Kept, seconds: float, known: bool
) -> tuple[list[float], list[float], list[Finding]]:
    """Loss and size of each batch; findings of those that have none."""
    losses: list[float] = []
    sizes: list[float] = []
    broken: list[Finding] = []
    until = time.monotonic() + seconds
    for i, raw in enumerate(kept.batches):
        if i >= FEWEST and time.monotonic() > until:
            break
        value, size = np.nan, np.nan
        try:
            with keep_random_state(), naming_batch(i), torch.no_grad():
                size = problem.size(raw)
                batch = problem.cast(raw, state.dtype)
                value = float(problem.batch_value(state.parameters, state, batch).detach())
            if not np.isfinite(value) and not known:
                known = True
                broken.append(not_finite(problem, state, batch, f"batch {i}", value))
        except HoError as error:
            if len(broken) < 3:
                broken.append(Finding("error", "batches", error.what, error.where or f"batch {i}", error.why, error.do))
        losses.append(value)
        sizes.append(size)
    return losses, sizes, broken


def _of_slopes(
    subject: Subject, problem: Problem, kept: Kept, good: list[int], sizes: list[float], seconds: float
) -> list[Finding]:
    """Outliers of D1, summed over the groups, with u the gradient over these batches."""
    started = time.monotonic()
    batches = [kept.batches[i] for i in good]
    some = subject.problem(batches[:1])
    settings: dict[str, Any] = dict(
        partition="canonical", include_frozen=subject.include_frozen, self_check=False, progress=False,
        dtype=subject.settings[0].dtype, checkpoint=subject.checkpoint,
    )  # fmt: skip
    try:
        summarize(some, 1, **settings)
        each = time.monotonic() - started
        n = int(min(len(batches), max(FEWEST, seconds / max(each, 1e-6))))
        if n < FEWEST:
            return []
        ds = summarize(subject.problem(batches[:n]), 1, keep_batches=n + n % 2, **settings)
    except HoError as error:
        return [Finding.of("batches", error)]
    d1 = ds["D1_batch"].sum("group").values / ds["weight"].values
    work = Work(problem, quick(subject.settings[0]))
    state = work.state(subject.checkpoint)
    return _judged(problem, state, kept, [(d1[k], sizes[i]) for k, i in enumerate(good[:n])], good[:n], "D1")


def _judged(
    problem: Problem, state: State, kept: Kept, values: list[tuple[float, float]], places: list[int], what: str
) -> list[Finding]:
    x = [v for v, _ in values]
    found = outliers(x, [w for _, w in values])
    if not len(found):
        return []
    median = float(np.median(x))
    first = places[found[0]]
    rows = [count_rows(b) for b in kept.batches]
    spans = [f"{places[i]} ({what} {x[i]:.4g})" for i in found[:5]] + ["..."] * (len(found) > 5)
    told = f"{what} of {len(found)} of {len(x)} batches is far from the median, {median:.4g}: batch {', '.join(spans)}"
    if len(found) > max(1.0, MANY * len(x)):
        return [
            Finding(
                "note", "batches", told, why="so many are no outliers: they are of another kind than the others",
                do="shuffle the data once, before they are cut into batches, for standard errors that mean something",
            )
        ]  # fmt: skip
    start = sum(rows[:first])
    return [
        Finding(
            "warning", "batches", told, where=_samples(problem, state, kept, first, start),
            why=f"more than {FAR:g} times the spread, 1.4826 times the median distance from the median",
            do="look at these samples: a wrong label, a damaged input, another source",
        )
    ]  # fmt: skip


def _samples(problem: Problem, state: State, kept: Kept, index: int, start: int) -> str:
    """The samples of the largest loss within a batch, by their place in the data."""
    batch = problem.cast(kept.batches[index], state.dtype)
    rows = count_rows(batch)
    if not problem.splittable or rows < 2:
        return f"batch {index}, samples {start} to {start + rows - 1} of the data"
    with torch.no_grad(), keep_random_state():
        each = np.array(
            [
                float(problem.batch_value(state.parameters, state, problem.take_rows(batch, i, i + 1)))
                for i in range(rows)
            ]
        )
    worst = np.argsort(-np.where(np.isfinite(each), each, np.inf))[:3]
    told = ", ".join(f"{start + i} (loss {each[i]:.4g})" for i in worst)
    return f"batch {index}; its samples of the largest loss: {told}; their median in it is {np.median(each):.4g}"
