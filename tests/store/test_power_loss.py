"""A model of a power loss: what was not fsynced may be there, be missing, or be zeros, in any combination.

The operations of a run are recorded. For every prefix of them and several choices of what reached the disk, the folder
as it would be found is built, and must open, hold what was acknowledged, and resume to the files of an uninterrupted
run. The idea is that of ALICE (Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014).
"""

import contextlib
import hashlib
import itertools
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hoanalysis.errors import StoreError
from hoanalysis.store import StoreWarning
from tests.store import workload

ROOT = 0
UNSYNCED = ("lost", "zeros", "half", "whole")


@dataclass(frozen=True)
class Entry:
    """A change of the entries of folders: each (folder, name) gets an inode, or None. A rename is one change."""

    changes: tuple[tuple[int, str, int | None], ...]


@dataclass(frozen=True)
class Content:
    """The content of a file from here on."""

    inode: int
    data: bytes


@dataclass(frozen=True)
class Sync:
    """An fsync of a file or a folder."""

    inode: int


@dataclass(frozen=True)
class Ack:
    """The run said that something is safe."""

    what: str


Event = Entry | Content | Sync | Ack


class Killed(BaseException):
    """Stands for SIGKILL: from here on the process does nothing."""


@dataclass
class Recorder:
    """Wraps the operations of ``os`` and writes down what they did below ``root``; dies at the ``dies_at``-th fsync."""

    root: Path
    dies_at: int = 0
    events: list[Event] = field(default_factory=list)
    inodes: dict[str, int] = field(default_factory=dict)
    folders: set[int] = field(default_factory=lambda: {ROOT})

    def __post_init__(self) -> None:
        self.inodes[str(self.root)] = ROOT
        self.open_files: dict[int, int] = {}
        self.data: dict[int, bytes] = {}
        self.fresh = itertools.count(1)
        self.mortal = self.dies_at > 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("open", "write", "ftruncate", "fsync", "link", "rename", "unlink", "mkdir"):
            monkeypatch.setattr(os, name, self._wrapped(getattr(os, name), getattr(self, f"_{name}")))

    def ack(self, what: str) -> None:
        self.events.append(Ack(what))

    def _wrapped(self, real: Callable[..., Any], note: Callable[..., None]) -> Callable[..., Any]:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            self.dies_at -= real.__name__ == "fsync"
            if self.dies_at == 0 and self.mortal:
                raise Killed
            existed = isinstance(args[0], str | Path) and os.path.lexists(args[0])
            answer = real(*args, **kwargs)
            note(answer, existed, *args)
            return answer

        return recorded

    def _at(self, path: Any) -> tuple[int, str]:
        return self.inodes[os.path.dirname(path)], os.path.basename(path)

    def _enter(self, path: Any, inode: int | None) -> tuple[int, str, int | None]:
        if inode is None:
            del self.inodes[str(path)]
        else:
            self.inodes[str(path)] = inode
        return (*self._at(path), inode)

    def _open(self, fd: int, existed: bool, path: Any, *flags: Any) -> None:
        if not str(path).startswith(str(self.root)):
            return
        if not existed:
            inode = next(self.fresh)
            self.data[inode] = b""
            self.events += [Entry((self._enter(path, inode),)), Content(inode, b"")]
        self.open_files[fd] = self.inodes[str(path)]

    def _write(self, count: int, existed: bool, fd: int, data: bytes) -> None:
        self._set(fd, self.data[self.open_files[fd]] + bytes(data[:count]))

    def _ftruncate(self, answer: None, existed: bool, fd: int, size: int) -> None:
        self._set(fd, self.data[self.open_files[fd]][:size])

    def _set(self, fd: int, data: bytes) -> None:
        inode = self.open_files[fd]
        self.data[inode] = data
        self.events.append(Content(inode, data))

    def _fsync(self, answer: None, existed: bool, fd: int) -> None:
        self.events.append(Sync(self.open_files[fd]))

    def _link(self, answer: None, existed: bool, source: Any, target: Any) -> None:
        self.events.append(Entry((self._enter(target, self.inodes[str(source)]),)))

    def _unlink(self, answer: None, existed: bool, path: Any) -> None:
        if str(path) in self.inodes:  # not what rmtree removes of a store that never was
            self.events.append(Entry((self._enter(path, None),)))

    def _mkdir(self, answer: None, existed: bool, path: Any, *mode: Any) -> None:
        inode = next(self.fresh)
        self.folders.add(inode)
        self.events.append(Entry((self._enter(path, inode),)))

    def _rename(self, answer: None, existed: bool, source: Any, target: Any) -> None:
        inside = {p: i for p, i in self.inodes.items() if p.startswith(f"{source}/")}
        inode = self.inodes[str(source)]
        self.events.append(Entry((self._enter(source, None), self._enter(target, inode))))
        for path, i in inside.items():
            del self.inodes[path]
            self.inodes[str(target) + path[len(str(source)) :]] = i


def found(
    events: list[Event], folders: set[int], kept: Callable[[int], bool], unsynced: str
) -> dict[str, bytes | None]:
    """The files (and folders: None) after a power loss: pending change number i is there if ``kept(i)``."""
    entries: dict[tuple[int, str], int] = {}
    pending = 0
    for position, event in enumerate(events):
        if isinstance(event, Entry):
            durable = all(Sync(folder) in events[position:] for folder, _, _ in event.changes)
            pending += not durable
            if durable or kept(pending - 1):
                for folder, name, inode in event.changes:
                    entries.pop((folder, name), None)
                    if inode is not None:
                        entries[folder, name] = inode
    return dict(_below(ROOT, "", entries, folders, lambda inode: _content(events, inode, unsynced)))


def _below(
    folder: int, path: str, entries: dict[tuple[int, str], int], folders: set[int], content: Callable[[int], bytes]
) -> Iterator[tuple[str, bytes | None]]:
    for (parent, name), inode in sorted(entries.items()):
        if parent == folder:
            yield path + name, None if inode in folders else content(inode)
            if inode in folders:
                yield from _below(inode, f"{path}{name}/", entries, folders, content)


def _content(events: list[Event], inode: int, unsynced: str) -> bytes:
    safe = latest = b""
    for event in events:
        if isinstance(event, Content) and event.inode == inode:
            latest = event.data
        if event == Sync(inode):
            safe = latest
    if safe == latest:
        return safe
    return {"lost": safe, "zeros": bytes(len(latest)), "half": latest[: len(latest) // 2], "whole": latest}[unsynced]


def extremes() -> Iterator[tuple[Callable[[int], bool], str]]:
    """Nothing that is pending reached the disk, or all of it."""
    for unsynced in UNSYNCED:
        yield lambda i: False, unsynced
        yield lambda i: True, unsynced


def choices(events: list[Event]) -> Iterator[tuple[Callable[[int], bool], str]]:
    """What may have reached the disk: nothing, all, all but one, one alone, and random halves."""
    yield from extremes()
    count = sum(isinstance(e, Entry) for e in events)
    for chosen in range(count):
        yield lambda i, chosen=chosen: i == chosen, "half"
        yield lambda i, chosen=chosen: i != chosen, "zeros"
    draw = random.Random(len(events))
    for _ in range(4):
        coins = [draw.random() < 0.5 for _ in range(count)]
        yield lambda i, coins=coins: coins[i], draw.choice(UNSYNCED)


def build(root: Path, state: dict[str, bytes | None]) -> None:
    for path, data in state.items():
        if data is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(data)


def recorded_run(root: Path) -> Recorder:
    recorder = Recorder(root)
    with pytest.MonkeyPatch.context() as patch:
        recorder.install(patch)
        workload.run(root / "store", recorder.ack)
    return recorder


def losses(recorder: Recorder) -> Iterator[tuple[list[str], dict[str, bytes | None]]]:
    """Every different state that a power loss may leave, with what had been acknowledged by then."""
    seen = set()
    for end in range(len(recorder.events) + 1):
        events = recorder.events[:end]
        acks = [e.what for e in events if isinstance(e, Ack)]
        for kept, unsynced in choices(events):
            state = found(events, recorder.folders, kept, unsynced)
            name = hashlib.sha256(repr((acks, _anonymous(state))).encode()).digest()
            if name not in seen:
                seen.add(name)
                yield acks, state


def _anonymous(state: dict[str, bytes | None]) -> list[Any]:
    return sorted((p if "/tmp/" not in p else "tmp", d) for p, d in state.items())


def test_S2_power_loss(quiet: dict[str, bytes], folder: Path) -> None:
    recorder = recorded_run(folder.parent)
    shutil.rmtree(folder)
    count = 0
    for acks, state in losses(recorder):
        build(folder.parent, state)
        if folder.exists():
            workload.check_acknowledged(folder, acks)
        else:
            assert acks == []
        workload.run(folder)
        assert workload.snapshot(folder) == quiet
        shutil.rmtree(folder)
        count += 1
    assert count > 50


def test_S2_power_loss_after_a_kill(folder: Path) -> None:
    """A killed run, a resumed one, a power loss: what the first linked and never fsynced, the second acknowledged."""
    for n in itertools.count(1):
        recorder = Recorder(folder.parent, dies_at=n)
        with pytest.MonkeyPatch.context() as patch:
            recorder.install(patch)
            with contextlib.suppress(Killed):
                workload.run(folder, recorder.ack)
            died, recorder.mortal = recorder.dies_at == 0, False
            workload.run(folder, recorder.ack)
        shutil.rmtree(folder)
        if not died:
            break
        for kept, unsynced in extremes():
            for end, event in enumerate(recorder.events, 1):
                if isinstance(event, Ack):
                    acks = [e.what for e in recorder.events[:end] if isinstance(e, Ack)]
                    state = found(recorder.events[:end], recorder.folders, kept, unsynced)
                    assert not _breaks(folder, acks, state), f"killed at fsync {n}, power lost after {acks}"
    assert n > 10


@pytest.mark.parametrize("forgotten", ["file", "folder"])
def test_the_model_finds_a_missing_fsync(folder: Path, monkeypatch: pytest.MonkeyPatch, forgotten: str) -> None:
    """Without the fsync of the file, or of the folder, the model must lose an acknowledged unit."""
    recorder = Recorder(folder.parent)
    recorder.install(monkeypatch)
    real = os.fsync

    def forgetful(fd: int) -> None:
        is_folder = recorder.open_files[fd] in recorder.folders
        if is_folder != (forgotten == "folder"):
            real(fd)

    monkeypatch.setattr(os, "fsync", forgetful)
    workload.run(folder, recorder.ack)
    monkeypatch.undo()
    shutil.rmtree(folder)
    assert any(_breaks(folder, acks, state) for acks, state in losses(recorder))


def _breaks(folder: Path, acks: list[str], state: dict[str, bytes | None]) -> bool:
    build(folder.parent, state)
    try:
        if acks:
            workload.check_acknowledged(folder, acks)
    except (AssertionError, StoreError, StoreWarning):
        return True
    finally:
        for path in folder.parent.iterdir():
            shutil.rmtree(path)
    return False
