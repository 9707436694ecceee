"""`Recorder`: what a later post-mortem needs, written while a model trains, cheap enough to leave on.

Every step is copied into one of a ring of files that are mapped into memory, ``step_ring_<k>.safetensors``, so that the
latest steps are on disk even where the process is killed, and no step waits for the disk. A slot is marked as torn
before it is written over and as whole after: a torn one is no checkpoint to any reader, and `open_run` leaves it out.
The header has a fixed place for the numbers of a step, so that none is made anew. A step that stays, because it is a
multiple of ``every`` or near a break, and every step of the ring when the recorder is closed, is renamed to
``step_<step>.safetensors``.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import operator
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from hoanalysis.checkpoints.safetensors_file import DTYPES
from hoanalysis.checkpoints.sniff import TORN, is_slot, slot_step
from hoanalysis.errors import ArgumentError, CheckpointError

_WORDS = {getattr(torch, name): (word, size) for word, (size, name) in DTYPES.items() if hasattr(torch, name)}
FIELD = 26  # characters of a number in a header, so that it is written over in place: the longest float has 24
WINDOW, ENOUGH = 32, 16  # losses that a break is seen against, and how many there must be
JUMP = 2.0  # times the largest of them


@dataclass
class _Layout:
    """Names, dtypes and shapes of what is written, and the facts beside them that do not change: a header with blanks.

    The numbers of a step (its count, loss and learning rates) have a fixed place and width in the header.
    """

    names: list[str]
    shapes: list[torch.Size]
    dtypes: list[torch.dtype]
    rates: list[str]
    settings: dict[str, Any]
    header: bytes = b""  # all of it, blanks included
    begin: int = 0  # of the numbers of a step, in the file
    end: int = 0
    size: int = 0
    spans: list[tuple[int, int]] = field(default_factory=list)  # of each tensor, in the file
    template: str = ""

    def __post_init__(self) -> None:
        entries, at, spans = {}, 0, {}
        # the largest elements first, as the format's own writer does: every tensor is aligned then
        for i in sorted(range(len(self.names)), key=lambda i: -_WORDS[self.dtypes[i]][1]):
            word, each = _WORDS[self.dtypes[i]]
            end = at + each * math.prod(self.shapes[i])
            entries[self.names[i]] = {"dtype": word, "shape": list(self.shapes[i]), "data_offsets": [at, end]}
            spans[i] = (at, end)
            at = end
        facts = {**dict.fromkeys(("step", "loss", *self.rates), "%s"), "optimizer": self.settings}
        # within the header the facts are JSON in a string: what stands between the numbers is taken from there
        template = json.dumps(json.dumps(facts)).replace('\\"%s\\"', f"%-{FIELD}s")
        told = json.dumps({"__metadata__": {"training": ""}, **entries}, separators=(",", ":"))
        before, _, after = told.partition('""')
        head, _, tail = template.partition(', \\"optimizer\\"')
        self.template = head
        told = before + self.template % (("",) * (2 + len(self.rates))) + ', \\"optimizer\\"' + tail + after
        start = -(-(8 + len(told)) // 64) * 64
        self.header = (start - 8).to_bytes(8, "little") + told.encode().ljust(start - 8)
        self.begin = 8 + len(before)
        self.end = self.begin + len(self.numbers(0, "", [""] * len(self.rates)))
        self.spans = [(start + spans[i][0], start + spans[i][1]) for i in range(len(spans))]
        self.size = start + at

    def numbers(self, step: int, loss: str, rates: Sequence[str]) -> bytes:
        """The facts of a step as they stand in the header, of the same length for all steps: JSON allows blanks."""
        return (self.template % (step, loss, *rates)).encode()


def _number(x: float) -> str:
    """As `json` writes and reads it."""
    return repr(x) if math.isfinite(x) else json.dumps(x)


class _Sources:
    """The tensors of a model and its optimizer, found again each step without walking through the model.

    A module keeps its tensors in dictionaries of its own, and so does the optimizer for each parameter: as long as
    these dictionaries are the same and have as many entries, what they hold under the known names is what is trained.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        self.model, self.optimizer = model, optimizer
        self._holders: list[Mapping[Any, Any]] = []
        self._sizes: list[int] = []
        self._places: list[tuple[Mapping[Any, Any], Any]] = []
        self.names: list[str] = []

    def tensors(self) -> list[Tensor]:
        """In the order of ``names``, which is another list where anything but values has changed."""
        if not self._holders or [*map(len, self._holders)] != self._sizes:
            self._find()
        return [holder[key] for holder, key in self._places]

    def _find(self) -> None:
        found: dict[str, tuple[Mapping[Any, Any], Any]] = {}
        self._holders = [self.model._modules]
        parameters: dict[int, str] = {}
        for prefix, module in self.model.named_modules(remove_duplicate=False):
            dot = f"{prefix}." if prefix else ""
            for holder in (module._parameters, module._buffers):
                self._holders.append(holder)
                for key, value in holder.items():
                    if isinstance(value, Tensor) and key not in module._non_persistent_buffers_set:
                        found[dot + key] = (holder, key)
                        parameters.setdefault(id(value), dot + key)
        if self.optimizer is not None:
            self._holders.append(self.optimizer.state)
            for p, states in self.optimizer.state.items():
                self._holders.append(states)
                for key, value in states.items():
                    if isinstance(value, Tensor) and id(p) in parameters:
                        found[f"optimizer.{key}.{parameters[id(p)]}"] = (states, key)
        self._sizes = [*map(len, self._holders)]
        self.names, self._places = list(found), list(found.values())


class _Slot:
    """One file of the ring."""

    def __init__(self, path: str, layout: _Layout) -> None:
        self.path, self.layout = path, layout
        with open(path, "wb+", buffering=0) as stream:
            stream.write(TORN + layout.header[len(TORN) :])
            stream.truncate(layout.size)
            self._map = mmap.mmap(stream.fileno(), layout.size)
        whole = torch.frombuffer(self._map, dtype=torch.uint8)
        self._views = [
            whole[a:b].view(dtype).view(shape)
            for (a, b), dtype, shape in zip(layout.spans, layout.dtypes, layout.shapes, strict=True)
        ]
        self._places, self._sizes = [v.data_ptr() for v in self._views], [b - a for a, b in layout.spans]

    def write(self, tensors: Sequence[Tensor], pointers: Sequence[int] | None, numbers: bytes) -> None:
        """Hold another step; what it held is gone. ``pointers``: of the tensors where all are plain memory."""
        memory, layout = self._map, self.layout
        memory[:8] = TORN
        if pointers is not None:
            _exhaust(map(_move, self._places, pointers, self._sizes))  # less than half the time of copy_
        else:
            for view, t in zip(self._views, tensors, strict=True):
                view.copy_(t.detach())
        memory[layout.begin : layout.end] = numbers
        memory[:8] = layout.header[:8]

    def keep(self, path: str) -> None:
        """Leave the ring: the file stays under the name of its step."""
        os.rename(self.path, path)
        self.path = path


# Loops over the tensors run in C: a step of training leaves no line of Python in the processor's cache.
_move = ctypes.memmove
_exhaust = deque[int](maxlen=0).extend
_pointer, _contiguous, _shape = Tensor.data_ptr, Tensor.is_contiguous, operator.attrgetter("shape")


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
        self._slots: deque[tuple[int, bool, _Slot]] = deque()  # the step, and whether the file stays
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._after = 0  # steps of a break that are still to be kept
        self._broken = False
        self._layout: _Layout | None = None
        self._last: tuple[list[float], list[str]] = [], []  # learning rates, and as text
        self._getter: Callable[[Any], Any] = lambda group: ()  # of what the optimizer was given
        self._values: tuple[int, Any] = 0, ()
        self._pointers: list[int] = []  # of the tensors at the step before
        self._on_cpu = False
        self._sources, self._stem = _Sources(model, optimizer), os.path.join(self.folder, "step_")
        self.folder.mkdir(parents=True, exist_ok=True)
        if start == 0 and (old := sorted(self.folder.glob("step_*.safetensors"))):
            raise CheckpointError(
                f"the folder holds the checkpoints of a run already, {len(old)} of them",
                where=str(self.folder),
                do="give another folder, or start=the step at which this run goes on",
            )
        self._take_over(start)
        # unbuffered: a line is in the file before the next step, whatever becomes of the process
        self._log: int | None = os.open(self.folder / "log.csv", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        if os.fstat(self._log).st_size == 0:
            self._write(",".join(["step", "loss", *_names(self._rates())]))
        self._record(None, stays=True)

    def _take_over(self, start: int) -> None:
        """The ring of a process that was killed: whole steps get their names, the torn one and those after ``start``,
        which are trained again, are removed."""
        for path in filter(is_slot, sorted(self.folder.glob("step_ring_*.safetensors"))):
            step = slot_step(path)
            if step is None or step > start:
                path.unlink()
            else:
                path.rename(self._name(step))

    def _name(self, step: int) -> str:
        return f"{self._stem}{step:08d}.safetensors"

    # ---- the loop -----------------------------------------------------------------------------------------------

    def step(self, loss: float | Tensor | None = None) -> None:
        """After each ``optimizer.step()``; ``loss`` is that of the batch of this step."""
        if self._log is None:
            raise ArgumentError("this recorder is closed", do="make a new one")
        self.count += 1
        value = None if loss is None else loss.item() if isinstance(loss, Tensor) else float(loss)
        if value is not None:
            self._watch(value)
        self._record(value, stays=self.count % self.every == 0)

    def close(self) -> None:
        """Close the log; the steps of the ring get their names."""
        if self._log is not None:
            os.close(self._log)
        self._log = None
        self._keep_ring()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- breaks -------------------------------------------------------------------------------------------------

    def _watch(self, loss: float) -> None:
        """Keep the ring, and what follows, where the loss breaks; once for each time that it was whole before."""
        seen = self._losses
        # the largest is at least the last: where the loss is not above twice that, there is no need to look further
        high = len(seen) >= ENOUGH and loss > JUMP * seen[-1] and loss > JUMP * max(seen)
        broken = not math.isfinite(loss) or high
        if broken and not self._broken and self.breaks > 0:
            self.breaks -= 1
            self._after = -(-self.ring // 2) + 1
            self._keep_ring()
        self._broken = broken
        if not broken:
            seen.append(loss)

    def _keep_ring(self) -> None:
        """All out of the ring: what is not written over stays."""
        for step, stays, slot in self._slots:
            if not stays:
                slot.keep(self._name(step))
        self._slots.clear()

    # ---- writing ------------------------------------------------------------------------------------------------

    def _record(self, loss: float | None, stays: bool) -> None:
        step, tensors, rates = self.count, self._sources.tensors(), self._rates()
        if rates != self._last[0]:
            self._last = rates, [_number(r) for r in rates]
        told, text = self._last[1], "" if loss is None else _number(loss)
        pointers = [*map(_pointer, tensors)]
        layout = self._laid_out(tensors, pointers, rates)
        slot = self._free(layout)
        plain = self._on_cpu and all(map(_contiguous, tensors))
        slot.write(tensors, pointers if plain else None, layout.numbers(step, text or "null", told))
        kept = stays or self._after > 0
        if kept:
            slot.keep(self._name(step))
        if self._after > 0:
            self._after -= 1
        else:
            self._slots.append((step, kept, slot))  # one that stays has a place too: the latest are consecutive
        self._write(",".join([str(step), text, *told]))

    def _laid_out(self, tensors: list[Tensor], pointers: list[int], rates: list[float]) -> _Layout:
        """The layout of the step before, or a new one where anything but the numbers has changed."""
        layout, shapes = self._layout, [*map(_shape, tensors)]
        if (
            layout is None or layout.names is not self._sources.names or layout.shapes != shapes
            or len(layout.rates) != len(rates) or self._given() != self._values
            # where the memory is the same, so are dtypes and devices
            or (pointers != self._pointers and layout.dtypes != [t.dtype for t in tensors])
        ):  # fmt: skip
            dtypes = [t.dtype for t in tensors]
            layout = self._layout = _Layout(self._sources.names, shapes, dtypes, _names(rates), self._settings())
            self._pointers = []
        if pointers != self._pointers:
            self._pointers, self._on_cpu = pointers, all(t.is_cpu for t in tensors)
        return layout

    def _free(self, layout: _Layout) -> _Slot:
        """A file to write to: that of the oldest step of a full ring, or a new one."""
        slots = self._slots
        while len(slots) >= self.ring:
            _, stays, slot = slots.popleft()
            if stays:
                continue
            if slot.layout is layout:
                return slot
            os.unlink(slot.path)
        taken = {slot.path for _, stays, slot in slots if not stays}
        paths = (f"{self._stem}ring_{k:03d}.safetensors" for k in range(self.ring))
        return _Slot(next(p for p in paths if p not in taken), layout)

    def _write(self, line: str) -> None:
        assert self._log is not None
        os.write(self._log, f"{line}\n".encode())

    def _rates(self) -> list[float]:
        """The learning rate of each group of parameters."""
        if self.optimizer is None:
            return []
        return [float(g["lr"]) for g in self.optimizer.param_groups if "lr" in g]

    def _given(self) -> tuple[int, Any]:
        """What `_settings` found, looked at again at every step."""
        if self.optimizer is None:
            return 0, ()
        group = self.optimizer.param_groups[0]
        return len(group), self._getter(group)

    def _settings(self) -> dict[str, Any]:
        """The numbers and words that the optimizer was given for its first group, but for the rate of the step."""
        if self.optimizer is None:
            return {}
        group = self.optimizer.param_groups[0]
        plain = {k: v for k, v in group.items() if k != "lr" and _plain(v)}
        self._getter = operator.itemgetter(*plain) if plain else lambda group: ()
        self._values = self._given()
        return {"name": type(self.optimizer).__name__, **plain}


def _plain(value: Any) -> bool:
    """A number or a word, or several numbers such as Adam's betas."""
    kind = type(value)
    return kind in (bool, int, float, str) or (kind is tuple and all(type(x) is float for x in value))


def _names(rates: Sequence[float]) -> list[str]:
    return ["learning_rate", *(f"learning_rate_{i}" for i in range(1, len(rates)))][: len(rates)]
