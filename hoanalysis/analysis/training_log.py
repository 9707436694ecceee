"""The learning rate and the momentum that a run used, from its training log."""

import pandas as pd

from hoanalysis.errors import ArgumentError

Used = float | pd.DataFrame | None


def used_at(used: Used, step: float | None, column: str = "learning_rate") -> float | None:
    """The learning rate used at ``step``: a number as it is, or the last one that the log has until then.

    Before the first entry it is the first, which is what the first step is about to use. ``used`` is a number, None, or
    a log with columns ``step`` and ``column``; `ArgumentError` where a log lacks one of them.
    """
    if used is None or isinstance(used, int | float):
        return used
    missing = {"step", column} - set(used.columns)
    if missing:
        raise ArgumentError(f"the training log lacks the columns {sorted(missing)}", do=f"name them step, {column}")
    logged = used.dropna(subset=[column]).sort_values("step")
    if step is not None:
        until = logged[logged["step"] <= step]
        logged = logged.head(1) if until.empty else until
    return float(logged[column].iloc[-1]) if len(logged) else None
