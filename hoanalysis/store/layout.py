"""The folder of a store: how it appears, what is in it, how it is made ready for a writer.

store.json     the manifest; the folder appears by rename with it
lock           flock of the writer, and who it is
units/         <SHA-256 of the key>.unit, see `hoanalysis.store.container`
plans/         which units each study asks for, see `hoanalysis.store.plans`
tmp/           files on their way; what a dead writer left is removed when the next one opens
quarantine/    files that were not what was published
"""

import contextlib
import json
import os
from pathlib import Path

from hoanalysis.errors import StoreError
from hoanalysis.store import files
from hoanalysis.store.describe import described, missing, readable_manifest
from hoanalysis.store.files import shown
from hoanalysis.store.lock import Lock, alone_in

VERSION = 1
MANIFEST = "store.json"
_FOLDERS = ("units", "plans", "tmp", "quarantine")


def version_of(path: Path) -> int:
    """The version in the manifest; raises `StoreError` where there is no store."""
    if not _exists(path):
        raise missing(path, "store")
    if not (path / MANIFEST).is_file():
        raise StoreError(
            "this folder is not a store" if path.is_dir() else "this is a file, not the folder of a store",
            where=shown(path),
            why=described(path),
            do="give the folder of a store, or a new folder for a new one",
        )
    return readable_manifest(path / MANIFEST)["version"]


def _exists(path: Path) -> bool:
    """Whether something is there; a path that cannot be (a loop of links, too long a name) raises."""
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    return True


def occupied(path: Path) -> bool:
    """Whether something is at ``path`` that a new store may not replace; an empty folder is nothing."""
    return _exists(path) and not (path.is_dir() and not any(path.iterdir()))


def make_ready(path: Path) -> None:
    """Clear what a dead writer left, and make durable what it may have renamed without living to fsync."""
    for name in _FOLDERS:  # copies of a store often lack its empty folders
        (path / name).mkdir(exist_ok=True)
    for left in (path / "tmp").iterdir():
        files.remove_quietly(left)
    for folder in (path / "units", path / "plans", path):
        files.sync_folder(folder)
    with contextlib.suppress(PermissionError):  # a parent that may be entered but not read
        files.sync_folder(path.parent)


def create(path: Path) -> Lock | None:
    """The folder with its manifest, by rename, and its lock; None where another process was faster."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with alone_in(path.parent):
        temporary = path.parent / (files.HALF_MADE + files.token())
        temporary.mkdir()
        lock = None
        try:
            lock = Lock(temporary / "lock")
            _fill(temporary)
            if occupied(path):
                raise FileExistsError
            os.rename(temporary, path)
        except BaseException as error:
            if lock is not None:
                lock.release()
            files.remove_tree(temporary)
            if isinstance(error, FileExistsError):
                return None
            raise
    return lock


def _fill(folder: Path) -> None:
    for name in _FOLDERS:
        (folder / name).mkdir()
    manifest = {"format": "hoanalysis-store", "version": VERSION}
    files.write_durably(folder / MANIFEST, json.dumps(manifest).encode() + b"\n")
    files.sync_folder(folder)
