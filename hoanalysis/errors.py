"""One exception family: every error that a user can cause says what, where, why, what to do, and what was kept."""

import difflib
from collections.abc import Iterable


class HoError(Exception):
    """The base of every error that a user can cause.

    Parameters
    ----------
    what
        One sentence in the user's nouns: what is wrong.
    where
        The file, the parameter, the batch, the index.
    why
        What made it go wrong, where that is known.
    do
        The next action.
    kept
        What was written or kept, where anything was under way.
    """

    def __init__(self, what: str, *, where: str = "", why: str = "", do: str = "", kept: str = "") -> None:
        self.what, self.where, self.why, self.do, self.kept = what, where, why, do, kept
        lines = [what]
        lines += [
            f"  {label}: {text}" for label, text in (("where", where), ("why", why), ("do", do), ("kept", kept)) if text
        ]
        super().__init__("\n".join(lines))

    def __reduce__(self):  # the five parts travel between processes, not only the rendered text
        return _rebuild, (type(self), self.what, self.where, self.why, self.do, self.kept)


def _rebuild(cls: type[HoError], what: str, where: str, why: str, do: str, kept: str) -> HoError:
    return cls(what, where=where, why=why, do=do, kept=kept)


class ArgumentError(HoError):
    """An argument of a call is outside what the call accepts."""


class CheckpointError(HoError):
    """A checkpoint file cannot be read, or does not fit the model."""


class ModelError(HoError):
    """The model cannot be differentiated as it is."""


class LossError(HoError):
    """The loss is not a differentiable scalar, or its normalization is unknown."""


class PartitionError(HoError):
    """A partition is not a set of named, disjoint, complete groups of the model's parameters."""


class DirectionError(HoError):
    """A direction does not fit the parameters, or cannot be built."""


class NoDirection(DirectionError):
    """A checkpoint has no direction of this kind, and other checkpoints of its run may: in a run it is a gap."""


class DataError(HoError):
    """The data cannot be iterated, or a batch is unusable."""


class NonFiniteWeights(CheckpointError):
    """Weights of a checkpoint are NaN or infinite; others of the run can be computed."""


class NumericsError(HoError):
    """A derivative overflowed or is not a number."""


class SchemaError(HoError):
    """A Dataset is not one of ours, or lacks what the analysis asks for."""


class StoreError(HoError):
    """The store cannot be opened, locked, read or written."""


class ClusterError(HoError):
    """Workers cannot be reached, cannot compute what they are asked for, or were lost."""


class StudyError(HoError):
    """A study file is wrong."""


class ReportError(HoError):
    """A report could not be rendered."""


def listed(names: Iterable[object], limit: int = 10) -> str:
    """The first ``limit`` names, and how many more there are.

    >>> listed(["a", "b", "c"], limit=2)
    "'a', 'b' and 1 more"
    """
    names = list(names)
    shown = ", ".join(repr(str(n)) for n in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint for a misspelt name: the closest of ``names``, or all of them.

    >>> nearest("parition", ["partition", "direction"])
    "did you mean 'partition'?"
    >>> nearest("zzz", ["partition", "direction"])
    "one of 'partition', 'direction'"
    """
    names = list(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"one of {listed(names)}"
