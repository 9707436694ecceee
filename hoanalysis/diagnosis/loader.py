"""The data by themselves: what every pass gives. Batches of the first pass are kept; all else is looked at on these."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch

from hoanalysis import culprits
from hoanalysis.diagnosis.findings import Finding
from hoanalysis.errors import HoError
from hoanalysis.problem import (
    Batch,
    batch_digest,
    batches_of,
    count_rows,
    keep_random_state,
    seed_everything,
    tensors_of,
)

MOST_BATCHES = 512
MOST_BYTES = 2**28  # of batches that are kept


@dataclass
class Kept:
    """Batches of the first pass, and whether they are all that it gave."""

    batches: list[Batch] = field(default_factory=list)
    whole: bool = False

    @property
    def samples(self) -> int:
        return sum(count_rows(b) for b in self.batches)


def examine(data: Any, what: str = "data") -> tuple[Kept, list[Finding]]:
    """Two passes over the first batches, with other random states; what was kept, and what was found."""
    if isinstance(data, Iterator):
        kept, found = _first_pass(data, what)
        found.append(_one_shot("the data is a one-shot iterator", what))
        return kept, found
    if not hasattr(type(data), "__iter__") and not hasattr(type(data), "__getitem__"):
        told = f"the data is a {type(data).__name__}, which cannot be iterated"
        return Kept(), [Finding("error", what, told, do="let the factory return a list or a DataLoader")]
    kept, found = _first_pass(data, what)
    if kept.batches:
        found += _second_pass(data, kept, what)
    if not any(f.severity == "error" for f in found):
        rows = sorted({count_rows(b) for b in kept.batches}, reverse=True)
        sizes = f"of {rows[0]}" if len(rows) == 1 else f"of {rows[-1]} to {rows[0]}"
        begun = "" if kept.whole else "the first "
        found.insert(
            0,
            Finding(
                "ok",
                what,
                f"{begun}{kept.samples:,} samples in {len(kept.batches)} batches {sizes}, the same in two passes",
            ),
        )
    return kept, found


def _first_pass(data: Any, what: str) -> tuple[Kept, list[Finding]]:
    kept, found, size = Kept(), [], 0
    try:
        with keep_random_state():
            seed_everything(0)
            for batch in batches_of(data):
                where = f"batch {len(kept.batches)}"
                culprits.refuse_strange(tensors_of(batch), where)
                if count_rows(batch) == 0:
                    found.append(
                        Finding("error", what, f"{where} has no samples", do="drop empty batches from the data")
                    )
                    continue
                size += sum(t.numel() * t.element_size() for t in tensors_of(batch))
                kept.batches.append(batch)
                if len(kept.batches) >= MOST_BATCHES or size >= MOST_BYTES:
                    return kept, found
        kept.whole = True
    except HoError as error:
        found.append(Finding.of(what, error))
    if not kept.batches and not found:
        told = Finding(
            "error", what, "the data has no batches", do="check the path, the subset and drop_last of the loader"
        )
        found.append(told)
    return kept, found


def _second_pass(data: Any, kept: Kept, what: str) -> list[Finding]:
    """Whether the batches of another pass, with other seeds, are those that were kept."""
    n = len(kept.batches)
    try:
        with keep_random_state():
            seed_everything(1)
            again = [batch_digest(b) for b in islice(batches_of(data), n + kept.whole)]
    except HoError as error:
        return [Finding.of(what, error)]
    if not again:
        return [_one_shot(f"the first pass over the data gave {n} batches, the second one none", what)]
    if len(again) != n:
        return [
            Finding(
                "error", what, f"the first pass over the data gave {n} batches, the second one {len(again)}",
                why="it samples at random, or is consumed by iteration", do="give the same batches in every pass",
            )
        ]  # fmt: skip
    other = [i for i, (b, digest) in enumerate(zip(kept.batches, again, strict=True)) if batch_digest(b) != digest]
    if not other:
        return []
    return [
        Finding(
            "error", what, f"a second pass over the data gives other batches: {len(other)} of {n} differ",
            where=f"batch {other[0]} is the first", why=_rearranged(data),
            do="use shuffle=False and a fixed transform: direction, derivatives and checkpoints must all see "
            "the same batches",
        )
    ]  # fmt: skip


def _rearranged(data: Any) -> str:
    sampler = getattr(data, "sampler", None)
    if isinstance(sampler, torch.utils.data.RandomSampler):
        return "the loader draws its samples by a RandomSampler (shuffle=True)"
    return "the loader shuffles, or a transform augments at random"


def _one_shot(told: str, what: str) -> Finding:
    return Finding(
        "error", what, told, why="it is empty after the first pass, and several passes are needed",
        do="let the factory return a list, a DataLoader or another re-iterable",
    )  # fmt: skip
