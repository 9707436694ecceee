"""The run store: immutable units in a folder (`hoanalysis.store.layout`), one writer, any number of readers."""

import contextlib
import logging
import os
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import xarray as xr

from hoanalysis.errors import ArgumentError, StoreError
from hoanalysis.store import container, files, plans
from hoanalysis.store.files import explained, shown
from hoanalysis.store.layout import VERSION, create, make_ready, occupied, version_of
from hoanalysis.store.lock import Lock

T = TypeVar("T")

log = logging.getLogger("hoanalysis.store")

_UNIT = re.compile(r"([0-9a-f]{64})\.unit")
_MANY_UNITS = 100_000


class StoreWarning(UserWarning):
    """A file of the store was not what was published, or the store was written by a newer version."""


class Store:
    """Units of a run under their keys; made by `Store.open`, and a context manager.

    A key is a JSON object of what the unit depends on; the unit's name is the SHA-256 of its canonical text. A unit is
    never changed: changed inputs are another key, hence another unit. What a reader sees is always whole. ``notes``
    holds, in sentences, what was found wrong.

    >>> import tempfile, xarray as xr
    >>> with tempfile.TemporaryDirectory() as folder, Store.open(folder + "/store", mode="w") as store:
    ...     store.publish({"step": 0}, xr.Dataset({"loss": 2.0}))
    ...     float(store.read({"step": 0}).loss), store.read({"step": 1})
    (2.0, None)
    """

    def __init__(self, folder: Path, lock: Lock | None, version: int = VERSION) -> None:
        self.folder = folder
        self.version = version
        self.notes: list[str] = []
        self._lock = lock
        self._writes = lock is not None

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, mode: Literal["r", "w"] = "r") -> "Store":
        """Open the store in ``folder``.

        ``"w"`` makes the folder if it is not there and takes the lock; `StoreError` where another writer holds it,
        where the store was written by a newer version, or where the folder is something else. ``"r"`` never locks and
        never writes.
        """
        if mode not in ("r", "w"):
            raise ArgumentError(f"mode {mode!r} is unknown", do="'r' reads, 'w' reads and writes")
        path = Path(os.path.realpath(folder))
        with explained("open the store", path):
            return _open_to_write(path) if mode == "w" else _open_to_read(path)

    def close(self) -> None:
        """Give the lock back; the store can still be read."""
        if self._lock is not None and self._lock.held:
            self._lock.release()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"<Store {shown(self.folder)!r}, {len(self.keys())} units, {'writer' if self._may_write() else 'reader'}>"
        )

    def keys(self) -> list[str]:
        """The digests of the units, sorted."""
        with explained("list the units", self.folder):
            names = os.listdir(self.folder / "units") if (self.folder / "units").is_dir() else []
        return sorted(m[1] for m in map(_UNIT.fullmatch, names) if m)

    def __contains__(self, key: Mapping[str, Any]) -> bool:
        """Whether the unit of ``key`` is there with every bit as published."""
        return self._payload(key) is not None

    # Units

    def publish(self, key: Mapping[str, Any], unit: xr.Dataset, *, check: Callable[[], None] | None = None) -> None:
        """Store ``unit``; when this returns, it is whole and survives a power loss.

        ``check`` is called when the bytes are on the disk and before the unit appears; what it raises discards the
        unit (a checkpoint that was replaced meanwhile). A second unit under the same key is dropped, and whether it
        was bitwise the same is logged. Where this raises, nothing was published.
        """
        self._publish(key, container.NETCDF, container.netcdf_bytes(unit), check)

    def read(self, key: Mapping[str, Any]) -> xr.Dataset | None:
        """The unit of ``key``, in memory; None where it is absent or damaged.

        A damaged file is moved to ``quarantine/`` by a writer and left alone by a reader; a `StoreWarning` says so.
        """
        return self._decoded(key, container.NETCDF, container.dataset_of)

    def publish_arrays(
        self, key: Mapping[str, Any], arrays: Mapping[str, np.ndarray], *, check: Callable[[], None] | None = None
    ) -> None:
        """`publish` for named arrays without labels, such as a direction."""
        self._publish(key, container.ARRAYS, container.arrays_bytes(arrays), check)

    def read_arrays(self, key: Mapping[str, Any]) -> dict[str, np.ndarray] | None:
        """`read` for what `publish_arrays` stored."""
        return self._decoded(key, container.ARRAYS, container.arrays_of)

    def _publish(self, key: Mapping[str, Any], kind: str, payload: bytes, check: Callable[[], None] | None) -> None:
        self._require_writer()
        digest = container.digest_of(key)
        data = container.pack(key, kind, payload)
        with explained("publish a unit", self._unit(digest), self._kept):
            if self._put(self._unit(digest), data, check):
                return
            present = self._payload(key)
            if present is None:  # it was damaged and is in quarantine now
                self._put(self._unit(digest), data, check)
                return
        same = present == (kind, payload)
        log.log(
            logging.INFO if same else logging.WARNING,
            "unit %s is there already, the second was dropped: bitwise %s",
            digest,
            "equal" if same else "different",
        )

    def _put(self, target: Path, data: bytes, check: Callable[[], None] | None = None) -> bool:
        return files.publish_file(target, data, self.folder / "tmp" / files.token(), check)

    def _decoded(self, key: Mapping[str, Any], kind: str, decode: Callable[[bytes], T]) -> T | None:
        found = self._payload(key)
        if found is None:
            return None
        if found[0] != kind:
            raise StoreError(
                f"this unit holds {found[0]}, not {kind}",
                where=shown(self._unit(container.digest_of(key))),
                do="read() is for Datasets, read_arrays() for arrays",
            )
        return decode(found[1])

    def _payload(self, key: Mapping[str, Any]) -> tuple[str, bytes] | None:
        """The kind and the verified bytes of a unit; None where it is absent or damaged."""
        digest = container.digest_of(key)
        path = self._unit(digest)
        try:
            with explained("read a unit", path):
                return container.unpack(path.read_bytes(), digest)
        except StoreError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise
        except container.Damaged as damage:
            self._set_aside(path, str(damage))
            return None

    def _set_aside(self, path: Path, why: str) -> None:
        if not self._may_write():
            newer = "; the store was written by a newer version" if self.version > VERSION else ""
            self._note(f"{shown(path)} is damaged ({why}{newer}) and taken as absent")
            return
        with explained("move a damaged file to quarantine", path, self._kept):
            kept = self.folder / "quarantine" / f"{path.name}-{files.token()}"
            os.rename(path, kept)
            files.sync_folder(path.parent)
        self._note(f"{shown(path)} is damaged ({why}); it was moved to {shown(kept)} and is taken as absent")

    # Plans

    def register(self, name: str, plan: dict[str, Any]) -> list[str]:
        """Make ``plan`` the newest of the study ``name``; returns how its ``"study"`` part differs from the one before.

        The plan before stays, and so do its units; results use the units that the newest plan names. Registering the
        same plan again changes nothing.
        """
        self._require_writer()
        before = self._before(name)
        data = plans.encode(plan)
        if before is not None and plans.encode(before) == data:
            return []
        filename = plans.next_name(self.folder / "plans", name, data)
        with explained("register the study", self.folder / "plans" / filename, self._kept):
            self._put(self.folder / "plans" / filename, data)
        if (count := plans.unit_count(plan)) > _MANY_UNITS:
            self._note(f"the study {name!r} asks for {count} units, one file each: larger data shards make fewer")
        return [] if before is None else list(plans.difference(before.get("study", {}), plan.get("study", {})))

    def _before(self, name: str) -> dict[str, Any] | None:
        """The newest whole plan of ``name``; damaged ones go to quarantine."""
        while (file := plans.newest(self.folder / "plans", name)) is not None:
            try:
                return plans.decode(file)
            except StoreError as error:
                if error.__cause__ is not None:
                    raise
                self._set_aside(file.path, error.why)
        return None

    def plan(self, name: str | None = None) -> dict[str, Any] | None:
        """The newest plan of the study ``name`` (of the only study, without a name); None where none was registered."""
        file = plans.chosen(self.folder / "plans", name)
        return None if file is None else plans.decode(file)

    def plan_names(self) -> list[str]:
        """The names of the registered studies, sorted."""
        return sorted({p.name for p in plans.plan_files(self.folder / "plans")})

    # Inside

    def _unit(self, digest: str) -> Path:
        return self.folder / "units" / f"{digest}.unit"

    def _kept(self) -> str:
        with contextlib.suppress(StoreError):
            return f"this unit was not published; {len(self.keys())} finished units are kept in {shown(self.folder)}"
        return ""

    def _note(self, text: str) -> None:
        self.notes.append(text)
        warnings.warn(text, StoreWarning, stacklevel=4)

    def _may_write(self) -> bool:
        return self._lock is not None and self._lock.held

    def _require_writer(self) -> None:
        if self._may_write():
            return
        why = "it was opened to read"
        if self._writes:
            why = "it was closed, or this is a forked child of the process that opened it"
        raise StoreError("this store cannot be written through this handle", where=shown(self.folder), why=why)


def _open_to_read(path: Path) -> Store:
    store = Store(path, None, version_of(path))
    if store.version > VERSION:
        store._note(f"the store {shown(path)} was written by a newer version; what cannot be read is taken as absent")
    return store


def _open_to_write(path: Path) -> Store:
    lock = None if occupied(path) else create(path)
    version = version_of(path)
    if version > VERSION:
        raise StoreError(
            f"this store has version {version}, written by a newer hoanalysis, and this one writes version {VERSION}",
            where=shown(path),
            do="update hoanalysis to write; reading it works as far as possible (mode='r')",
        )
    lock = lock or Lock(path / "lock")
    try:
        make_ready(path)
    except BaseException:
        lock.release()
        raise
    return Store(path, lock)
