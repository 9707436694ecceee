"""The learning rate that a run used, from its training log."""

import pandas as pd

from hoanalysis.errors import ArgumentError

Used = float | pd.DataFrame | None


def used_at(used: Used, step: float | None) -> float | None:
    """The learning rate used at ``step``: a number as it is, or the last one that the log has until then.

    Before the first entry it is the first, which is what the first step is about to use. ``used`` is a number, None, or
    a log with columns ``step`` and ``learning_rate``; `ArgumentError` where a log lacks one of them.
    """
    if used is None or isinstance(used, int | float):
        return used
    missing = {"step", "learning_rate"} - set(used.columns)
    if missing:
        raise ArgumentError(f"the training log lacks the columns {sorted(missing)}", do="name them step, learning_rate")
    logged = used.dropna(subset=["learning_rate"]).sort_values("step")
    if step is not None:
        until = logged[logged["step"] <= step]
        logged = logged.head(1) if until.empty else until
    return float(logged["learning_rate"].iloc[-1]) if len(logged) else None
