"""`Recorder`: what a later post-mortem needs, written while a model trains, cheap enough to leave on.

Every step is copied into one of a ring of files that are mapped into memory, so that the latest steps are on disk even
where the process is killed, and no step waits for the disk. A file is renamed before it is overwritten and again after:
what is called ``step_*.safetensors`` is whole. Files leave the ring, and stay, where their step is a multiple of
``every``, and around a break.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from hoanalysis.checkpoints.safetensors_file import DTYPES
from hoanalysis.errors import ArgumentError, CheckpointError

_WORDS = {getattr(torch, name): (word, size) for word, (size, name) in DTYPES.items() if hasattr(torch, name)}
ROOM = 2048  # bytes of a header for the facts of a step, whose length changes from step to step
WINDOW, ENOUGH = 32, 16  # losses that a break is seen against, and how many there must be
JUMP = 2.0  # times the largest of them
PARTIAL = ".partial"  # at the end of the name of a file that is being written


@dataclass
class _Layout:
    """Names, dtypes and shapes of what is written: the header but for the facts, and where each tensor goes."""

    signature: tuple[tuple[str, torch.dtype, torch.Size], ...]
    order: tuple[int, ...] = ()
    rest: bytes = b""
    start: int = 0
    size: int = 0
    spans: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        # the largest elements first, as the format's own writer does: every tensor is aligned then
        self.order = tuple(sorted(range(len(self.signature)), key=lambda i: -_WORDS[self.signature[i][1]][1]))
        entries, at = {}, 0
        for i in self.order:
            name, dtype, shape = self.signature[i]
            word, each = _WORDS[dtype]
            end = at + each * math.prod(shape)
            entries[name] = {"dtype": word, "shape": list(shape), "data_offsets": [at, end]}
            self.spans.append((at, end))
            at = end
        self.rest = json.dumps(entries, separators=(",", ":"))[1:].encode()
        self.start = -(-(8 + len(self.rest) + ROOM) // 8) * 8
        self.size = self.start + at

    def fits(self, names: Sequence[str], tensors: Sequence[Tensor]) -> bool:
        return len(names) == len(self.signature) and all(
            n == name and t.dtype == dtype and t.shape == shape
            for n, t, (name, dtype, shape) in zip(names, tensors, self.signature, strict=True)
        )

    def header(self, facts: Mapping[str, Any]) -> bytes:
        """The first bytes of a file, padded to a length that is the same for all steps."""
        told = json.dumps({"training": json.dumps(facts)}).encode()
        text = b'{"__metadata__":' + told + (b"," if self.signature else b"") + self.rest
        if len(text) > self.start - 8:
            return self.header({k: v for k, v in facts.items() if k == "step"})
        return (self.start - 8).to_bytes(8, "little") + text.ljust(self.start - 8)


class _Sources:
    """The tensors of a model and its optimizer, found again each step without walking through the model.

    A module keeps its tensors in dictionaries of its own, and so does the optimizer for each parameter: as long as
    these dictionaries are the same and have as many entries, what they hold under the known names is what is trained.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        self.model, self.optimizer = model, optimizer
        self._holders: list[tuple[Mapping[Any, Any], int]] = []
        self._places: list[tuple[Mapping[Any, Any], Any]] = []
        self.names: list[str] = []

    def tensors(self) -> list[Tensor]:
        """In the order of ``names``."""
        if not self._holders or any(len(holder) != n for holder, n in self._holders):
            self._find()
        return [holder[key] for holder, key in self._places]

    def _find(self) -> None:
        found: dict[str, tuple[Mapping[Any, Any], Any]] = {}
        self._holders = [(self.model._modules, len(self.model._modules))]
        parameters: dict[int, str] = {}
        for prefix, module in self.model.named_modules(remove_duplicate=False):
            dot = f"{prefix}." if prefix else ""
            for holder in (module._parameters, module._buffers):
                self._holders.append((holder, len(holder)))
                for key, value in holder.items():
                    if isinstance(value, Tensor) and key not in module._non_persistent_buffers_set:
                        found[dot + key] = (holder, key)
                        parameters.setdefault(id(value), dot + key)
        if self.optimizer is not None:
            self._holders.append((self.optimizer.state, len(self.optimizer.state)))
            for p, states in self.optimizer.state.items():
                self._holders.append((states, len(states)))
                for key, value in states.items():
                    if isinstance(value, Tensor) and id(p) in parameters:
                        found[f"optimizer.{key}.{parameters[id(p)]}"] = (states, key)
        self.names, self._places = list(found), list(found.values())


class _Slot:
    """One file of the ring."""

    def __init__(self, path: str, layout: _Layout) -> None:
        self.path, self.layout = path, layout
        with open(path, "wb+") as stream:
            stream.truncate(layout.size)
            self._map = mmap.mmap(stream.fileno(), layout.size) if layout.size else None
        whole = torch.frombuffer(self._map, dtype=torch.uint8)
        self._views = [
            whole[layout.start + a : layout.start + b].view(layout.signature[i][1]).view(layout.signature[i][2])
            for i, (a, b) in zip(layout.order, layout.spans, strict=True)
        ]

    def write(self, path: str, tensors: Sequence[Tensor], facts: Mapping[str, Any]) -> None:
        """Become the file ``path``; what it was is gone."""
        if not self.path.endswith(PARTIAL):
            os.rename(self.path, partial := self.path + PARTIAL)
            self.path = partial
        assert self._map is not None
        self._map[: self.layout.start] = self.layout.header(facts)
        with torch.no_grad():
            torch._foreach_copy_(self._views, [tensors[i] for i in self.layout.order])
        os.rename(self.path, path)
        self.path = path


class Recorder:
    """Records the steps of a training loop as a run that `open_run` and a study read.

    Parameters
    ----------
    model, optimizer
        What is trained; the optimizer's tensors are written as ``optimizer.<state>.<parameter>``. It may be None.
    folder
        Where checkpoints ``step_<step>.safetensors`` and the training log ``log.csv`` go. It is made.
    every
        Steps between two checkpoints that stay. The state at the start is one of them.
    ring
        How many of the latest single steps are kept beside them.
    breaks
        How many breaks are kept: where the loss is not finite, or is more than twice the largest of the 32 before,
        the steps of the ring and half as many after it stay.
    start
        The step at which the recording starts, 0 for a new run.

    Raises
    ------
    CheckpointError
        Where the folder has checkpoints already and ``start`` is 0.

    Notes
    -----
    Reading the loss waits for the device; pass it every few steps where that matters. Two recorders must not share a
    folder.

    >>> import tempfile, torch, hoanalysis as ho
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> folder = tempfile.mkdtemp()
    >>> with ho.Recorder(model, optimizer, folder, every=2, ring=2) as recorder:
    ...     for _ in range(5):
    ...         loss = model(torch.ones(1, 2)).square().sum()
    ...         optimizer.zero_grad()
    ...         loss.backward()
    ...         optimizer.step()
    ...         recorder.step(loss)
    >>> ho.open_run(folder).steps
    (0, 2, 4, 5)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        folder: str | os.PathLike[str],
        *,
        every: int = 100,
        ring: int = 16,
        breaks: int = 3,
        start: int = 0,
    ) -> None:
        for name, value, least in (("every", every, 1), ("ring", ring, 1), ("breaks", breaks, 0), ("start", start, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ArgumentError(f"{name} is a whole number of at least {least}, not {value!r}")
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"the model is a {type(model).__name__}, not a torch.nn.Module")
        self.model, self.optimizer = model, optimizer
        self.folder, self.every, self.ring, self.breaks = Path(folder), every, ring, breaks
        self.count = start
        self._slots: deque[tuple[bool, _Slot]] = deque()  # whether the file stays
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._after = 0  # steps of a break that are still to be kept
        self._broken = False
        self._layout: _Layout | None = None
        self._sources, self._stem = _Sources(model, optimizer), os.path.join(self.folder, "step_")
        self.folder.mkdir(parents=True, exist_ok=True)
        if start == 0 and (old := sorted(self.folder.glob("step_*.safetensors"))):
            raise CheckpointError(
                f"the folder holds the checkpoints of a run already, {len(old)} of them",
                where=str(self.folder),
                do="give another folder, or start=the step at which this run goes on",
            )
        for left in self.folder.glob(f"step_*{PARTIAL}"):
            left.unlink()
        # unbuffered: a line is in the file before the next step, whatever becomes of the process
        self._log: int | None = os.open(self.folder / "log.csv", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        if os.fstat(self._log).st_size == 0:
            self._write(",".join(["step", "loss", *self._rates()]))
        self._record(None, stays=True)

    # ---- the loop -----------------------------------------------------------------------------------------------

    def step(self, loss: float | Tensor | None = None) -> None:
        """After each ``optimizer.step()``; ``loss`` is that of the batch of this step."""
        if self._log is None:
            raise ArgumentError("this recorder is closed", do="make a new one")
        self.count += 1
        value = None if loss is None else float(loss.detach() if isinstance(loss, Tensor) else loss)
        if value is not None:
            self._watch(value)
        self._record(value, stays=self.count % self.every == 0)

    def close(self) -> None:
        """Close the log; the files of the ring stay as they are."""
        if self._log is not None:
            os.close(self._log)
        self._log = None
        self._slots.clear()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- breaks -------------------------------------------------------------------------------------------------

    def _watch(self, loss: float) -> None:
        """Keep the ring, and what follows, where the loss breaks; once for each time that it was whole before."""
        high = JUMP * max(self._losses, default=math.inf)
        broken = not math.isfinite(loss) or (len(self._losses) >= ENOUGH and loss > high)
        if broken and not self._broken and self.breaks > 0:
            self.breaks -= 1
            self._after = -(-self.ring // 2) + 1
            self._slots.clear()  # out of the ring: what is not written over stays
        self._broken = broken
        if not broken:
            self._losses.append(loss)

    # ---- writing ------------------------------------------------------------------------------------------------

    def _record(self, loss: float | None, stays: bool) -> None:
        tensors = self._sources.tensors()
        layout = self._layout
        if layout is None or not layout.fits(self._sources.names, tensors):
            layout = self._layout = _Layout(
                tuple((n, t.dtype, t.shape) for n, t in zip(self._sources.names, tensors, strict=True))
            )
        rates = self._rates()
        facts = {"step": self.count, "loss": loss, **rates, "optimizer": self._settings()}
        slot = self._free(layout)
        slot.write(f"{self._stem}{self.count:08d}.safetensors", tensors, facts)
        if self._after > 0:
            self._after -= 1
        else:
            self._slots.append((stays, slot))  # one that stays has a place in the ring too: the latest are consecutive
        told = "" if loss is None else f"{loss:.9g}"
        self._write(",".join([str(self.count), told, *(f"{r:.9g}" for r in rates.values())]))

    def _free(self, layout: _Layout) -> _Slot:
        """A file to write to: the oldest of a full ring, or a new one."""
        while len(self._slots) >= self.ring:
            stays, slot = self._slots.popleft()
            if stays:
                continue
            if slot.layout is layout:
                return slot
            os.unlink(slot.path)
        return _Slot(f"{self._stem}{self.count:08d}.safetensors{PARTIAL}", layout)

    def _write(self, line: str) -> None:
        assert self._log is not None
        os.write(self._log, f"{line}\n".encode())

    def _rates(self) -> dict[str, float]:
        if self.optimizer is None:
            return {}
        groups = self.optimizer.param_groups
        names = ["learning_rate", *(f"learning_rate_{i}" for i in range(1, len(groups)))]
        return {n: float(g["lr"]) for n, g in zip(names, groups, strict=True) if "lr" in g}

    def _settings(self) -> dict[str, Any]:
        """The numbers and words that the optimizer was given, of its first group."""
        if self.optimizer is None:
            return {}
        plain = {}
        for name, value in self.optimizer.param_groups[0].items():
            if isinstance(value, (bool, int, float, str)) or (
                isinstance(value, tuple) and all(isinstance(x, float) for x in value)
            ):
                plain[name] = value
        return {"name": type(self.optimizer).__name__, **plain}
