"""The model by itself: modes, dtypes, devices, hooks, frozen and tied parameters. Nothing is run."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from hoanalysis import culprits
from hoanalysis.diagnosis.findings import Finding
from hoanalysis.diagnosis.subject import Subject
from hoanalysis.errors import HoError, listed
from hoanalysis.partitions import describe_parameters
from hoanalysis.problem import active_dropout

HALF = (torch.float16, torch.bfloat16)


def examine(subject: Subject) -> Iterator[Finding]:
    """The findings on a model, an ``ok`` that describes it first."""
    model = subject.model
    assert model is not None
    for refuse in (culprits.refuse_unready, culprits.refuse_hooks):
        try:
            refuse(model)
        except HoError as error:
            yield Finding.of("model", error)
    parameters, frozen = describe_parameters(model, subject.include_frozen)
    dtypes = sorted({_word(p.dtype) for p in model.parameters()})
    training = sorted({m.training for m in model.modules()})
    mode = "eval mode" if training == [False] else "train mode" if training == [True] else "partly in train mode"
    count = sum(info.numel for info in parameters.values())
    yield Finding(
        "ok",
        "model",
        f"{type(model).__name__}: {len(parameters)} tensors, {count:,} parameters in {_and(dtypes)}, {mode}",
    )
    yield from _modes(subject, model)
    yield from _dtypes(subject, model)
    if frozen:
        yield Finding(
            "note", "model", f"{_many(len(frozen), 'parameter')} frozen and left out: {listed(frozen)}",
            do="include_frozen = true takes them in",
        )  # fmt: skip
    if tied := {n: info.aliases for n, info in parameters.items() if info.aliases}:
        names = "; ".join(f"{n!r} is also {listed(aliases, 3)}" for n, aliases in list(tied.items())[:5])
        yield Finding("note", "model", f"tied parameters are one group each: {names}")
    if not parameters:
        yield Finding(
            "error",
            "model",
            "the model has no parameters that are not frozen",
            do="include_frozen = true takes them in",
        )


def _modes(subject: Subject, model: nn.Module) -> Iterator[Finding]:
    if active := [n for n, _ in active_dropout(model)]:
        yield Finding(
            "error", "model", f"dropout is active in {listed(active)}",
            why="the loss is random then and has no derivative tensor; the rest was looked at without it",
            do=_eval(subject),
        )  # fmt: skip
    norms = [n for n, m in model.named_modules() if m.training and isinstance(m, nn.modules.batchnorm._NormBase)]
    norms = [n for n in norms if getattr(model.get_submodule(n), "track_running_stats", False)]
    if norms:
        yield Finding(
            "warning", "model", f"normalization by the statistics of the batch: {listed(norms)} in train mode",
            why="the loss of a sample then depends on the others of its batch: batches are taken whole, and the "
            "summaries are those of the training loss at this batch size",
            do=_eval(subject) + ", for the loss that the trained network has",
        )  # fmt: skip


def _dtypes(subject: Subject, model: nn.Module) -> Iterator[Finding]:
    kinds: dict[torch.dtype, list[str]] = {}
    for name, p in model.named_parameters():
        kinds.setdefault(p.dtype, []).append(name)
    cast = {s.dtype for s in subject.settings}
    half = [n for d in HALF for n in kinds.get(d, [])]
    if half:
        given = next((str(c).removeprefix("torch.") for c in cast if c is not None), "float32")
        yield Finding(
            "warning", "model", f"{_many(len(half), 'parameter')} in half precision, cast to {given}: {listed(half)}",
            why="derivatives of order two are noise in half precision; those of the cast model belong to weights that "
            "were rounded, and the loss differs a little from that of the training",
            do="take the master weights in float32, where the training kept them"
            + ("" if None not in cast else f"; dtype = {given!r} says that the cast is meant"),
        )  # fmt: skip
    elif len(kinds) > 1 and None in cast:
        told = "; ".join(f"{_word(d)}: {listed(names, 4)}" for d, names in kinds.items())
        yield Finding(
            "warning",
            "model",
            f"the parameters are of {len(kinds)} dtypes",
            where=told,
            do="dtype = 'float64' casts all",
        )


def _eval(subject: Subject) -> str:
    return "call model.eval()" if subject.given is not None else "mode = 'eval' in [model]"


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _many(n: int, word: str) -> str:
    return f"{n} {word}{'s are' if n > 1 else ' is'}"


def _and(words: list[str]) -> str:
    return " and ".join(words)
