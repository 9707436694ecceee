"""Files that appear whole or not at all, folders that are checked before anything is computed."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from hoanalysis.errors import ReportError
from hoanalysis.store import files
from hoanalysis.store.lock import alone_in


@contextlib.contextmanager
def reported(doing: str, path: Path) -> Iterator[None]:
    """Turn an ``OSError`` of the block into a `ReportError` that says what it means and what to do."""
    try:
        yield
    except OSError as error:
        told = files.told(error, doing, path, "what was finished before; a file that was there is as it was")
        raise ReportError(told.what, where=told.where, why=told.why, do=told.do, kept=told.kept) from error


def write_whole(path: Path, text: str) -> None:
    """``text`` at ``path``: temporary file, fsync, rename, fsync. What a killed writer left in the folder goes."""
    with reported(f"write {path.name}", path), alone_in(path.parent):
        temporary = path.parent / (files.HALF_MADE + files.token())
        try:
            # file names that are not UTF-8 are lone surrogates; in JSON and to a reader \udcff says what they are
            files.write_durably(temporary, text.encode("utf-8", "backslashreplace"))
            os.rename(temporary, path)
        finally:
            files.remove_quietly(temporary)
        files.sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    with reported("make the output folder", folder):
        folder.mkdir(parents=True, exist_ok=True)


def refuse_unusable(folder: Path, page: str) -> None:
    """Raise `ReportError` where ``folder`` can be neither used nor made, or ``page`` not be put into it."""
    with reported("use the output folder", folder):
        existing = next(p for p in (folder, *folder.absolute().parents) if os.path.lexists(p))
        if not existing.is_dir():
            what = "a link to nothing" if existing.is_symlink() and not existing.exists() else "a file"
            raise _unusable(f"{files.shown(existing)} is {what}, not a folder", folder)
        if not os.access(existing, os.W_OK | os.X_OK):
            raise _unusable("the output folder cannot be written", folder, f"{files.shown(existing)} is read-only")
        if (folder / page).is_dir():
            raise _unusable(f"a folder is in the place of the file {page}", folder)


def _unusable(what: str, folder: Path, why: str = "") -> ReportError:
    return ReportError(
        what, where=files.shown(folder), why=why, do="choose another --out", kept="nothing was computed or written"
    )
