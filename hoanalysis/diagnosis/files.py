"""The checkpoints of a run, each fitted to the model; and which of them the derivatives are looked at."""

from __future__ import annotations

from collections.abc import Iterator

from hoanalysis.diagnosis.findings import Finding
from hoanalysis.diagnosis.subject import Subject
from hoanalysis.errors import HoError, NonFiniteWeights, listed
from hoanalysis.problem import Problem

MOST = 64  # checkpoints that are read; of a longer run, these many in even distances


def examine(subject: Subject, problem: Problem) -> Iterator[Finding]:
    """Reads the files and sets the position of the last one that can be used."""
    run = subject.run
    assert run is not None
    n = len(run)
    looked = sorted({round(i * (n - 1) / (MOST - 1)) for i in range(MOST)}) if n > MOST else list(range(n))
    failed: dict[tuple[str, str], list[tuple[int, HoError]]] = {}
    notes: dict[str, list[int]] = {}
    usable: list[int] = []
    for i in looked:
        try:
            checkpoint = run[i]
            problem.fitted(checkpoint)
        except HoError as error:
            failed.setdefault((type(error).__name__, error.what), []).append((i, error))
            continue
        usable.append(i)
        subject.position, subject.checkpoint = i, checkpoint
        for note in checkpoint.notes:
            notes.setdefault(note, []).append(run.steps[i])
    told = f"{len(usable)} of {n}" if len(looked) == n else f"{len(usable)} of {len(looked)} that were read, of {n},"
    if usable:
        first, last = run.steps[usable[0]], run.steps[usable[-1]]
        which = f"steps {first} to {last}; looked at: {last}" if len(usable) > 1 else f"step {first}"
        yield Finding("ok", "checkpoints", f"{told} fit the model: {which}")
    for (_, what), cases in failed.items():
        yield _failure(subject, what, cases, bool(usable))
    for note, steps in notes.items():
        yield Finding("note", "checkpoints", note, where=f"steps {listed(steps)}")
    yield from _log(subject)


def _failure(subject: Subject, what: str, cases: list[tuple[int, HoError]], others: bool) -> Finding:
    """One finding for all files with the same fault. Weights that diverged are a gap in the run, not its end."""
    assert subject.run is not None
    _, error = cases[0]
    steps = [subject.run.steps[i] for i, _ in cases]
    where = error.where or str(subject.run.paths[cases[0][0]])
    if len(cases) > 1:
        where += f" and {len(cases) - 1} more, steps {listed(steps)}"
    gap = isinstance(error, NonFiniteWeights) and others
    do = error.do + ("; the other checkpoints are computed, this one is a gap" if gap else "")
    return Finding("warning" if gap else "error", "checkpoints", what, where, error.why, do)


def _log(subject: Subject) -> Iterator[Finding]:
    if subject.log is None or subject.run is None:
        return
    rows = {int(s) for s in subject.log["step"].dropna()}
    if absent := [s for s in subject.run.steps if s not in rows]:
        yield Finding(
            "warning", "checkpoints", f"the log has no row for {len(absent)} of {len(subject.run)} checkpoints",
            where=f"steps {listed(absent)}", why=f"its rows are the steps {min(rows)} to {max(rows)}" if rows else "",
            do="log the loss and the learning rate at the steps of the checkpoints",
        )  # fmt: skip
