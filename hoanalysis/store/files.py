"""Durable and exclusive file operations, and operating-system errors told as sentences.

Every operation that must survive a crash goes through ``os.open``, ``os.write``, ``os.fsync``, ``os.link``,
``os.rename`` and ``os.unlink`` here, so that a test can make each of them fail or kill the process.
"""

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from hoanalysis.errors import StoreError

#: How the names begin of what is made beside its place, to be renamed; see `hoanalysis.store.lock.alone_in`.
HALF_MADE = ".hoanalysis-new-"

_CONTINUE = "then run the same call again: it continues with what is missing"
_COMPACT = (
    "use larger data shards (fewer and larger units), or export finished studies to one netCDF and start a new store; "
    + _CONTINUE
)

#: errno -> (what is wrong, what to do)
_SENTENCES = {
    errno.ENOSPC: ("the disk is full", f"free some space, {_CONTINUE}"),
    errno.EDQUOT: ("your disk quota is used up", f"free some space or raise the quota, {_CONTINUE}"),
    errno.EFBIG: ("a file would exceed the file-size limit", f"raise the limit (ulimit -f), {_CONTINUE}"),
    errno.EROFS: ("the file system is read-only", "choose a store on a writable disk; reading does not need one"),
    errno.EACCES: ("permission denied", f"ask for the permission or choose another folder, {_CONTINUE}"),
    errno.EPERM: ("the operation is not permitted", f"ask for the permission or choose another folder, {_CONTINUE}"),
    errno.EIO: ("the disk reports an input/output error", f"check the disk and its cable or network, {_CONTINUE}"),
    errno.ESTALE: ("the network file system lost the folder", f"mount it again, {_CONTINUE}"),
    errno.ENAMETOOLONG: ("the name is too long for the file system", "choose a shorter path"),
    errno.ELOOP: ("the path is a loop of symbolic links", "give the real folder"),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", "choose another path"),
    errno.EMFILE: ("this process has too many open files", f"raise the limit (ulimit -n), {_CONTINUE}"),
    errno.ENOLCK: ("the file system cannot lock files", "put the store on a local disk"),
}
#: Errors of ``os.link`` on file systems without hard links (FAT, some network file systems).
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)


def shown(path: str | os.PathLike[str]) -> str:
    """The path as text that any terminal prints: bytes that are not UTF-8 are escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def told(error: OSError, doing: str, path: str | os.PathLike[str], kept: str = "") -> StoreError:
    """The `StoreError` that says what ``error`` means for a store, and what to do."""
    number = error.errno or 0
    what, do = _SENTENCES.get(number, (error.strerror or str(error), f"remove the cause, {_CONTINUE}"))
    if number == errno.ENOSPC and _out_of_inodes(path):
        what, do = "the file system has no room for another file (its inodes are used up)", _COMPACT
    return StoreError(f"cannot {doing}: {what}", where=shown(path), why=str(error), do=do, kept=kept)


@contextlib.contextmanager
def explained(doing: str, path: str | os.PathLike[str], kept: Callable[[], str] | None = None) -> Iterator[None]:
    """Turn an ``OSError`` of the block into a `StoreError`; ``kept()`` says what is safe on disk."""
    try:
        yield
    except OSError as error:
        raise told(error, doing, path, kept() if kept else "") from error


def _out_of_inodes(path: str | os.PathLike[str]) -> bool:
    with contextlib.suppress(OSError):
        existing = next(p for p in (Path(path), *Path(path).parents) if p.exists())
        state = os.statvfs(existing)
        return state.f_files > 0 and state.f_favail == 0
    return False


def token() -> str:
    """A name for a temporary file that no other process uses."""
    return f"{os.getpid()}-{secrets.token_hex(6)}"


def write_all(fd: int, data: bytes) -> None:
    """Write all of ``data``; ``os.write`` may take a part only."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def write_durably(path: Path, data: bytes) -> None:
    """A new file with ``data``, on the disk when this returns."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        write_all(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(folder: Path) -> None:
    """Put the entries of ``folder`` (links, renames) on the disk."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove_quietly(path: Path) -> None:
    """Remove a file that nobody needs; one that stays is removed when a writer opens the store."""
    with contextlib.suppress(OSError):
        os.unlink(path)


def remove_tree(path: Path) -> None:
    """Remove a file or a folder that nobody needs, as far as that works."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        remove_quietly(path)


def publish_file(target: Path, data: bytes, temporary: Path, check: Callable[[], None] | None = None) -> bool:
    """Make ``data`` appear as ``target`` at once, whole, durable and never in place of another file.

    Written to ``temporary``, fsync, exclusive link to ``target``, fsync of the folder, unlink of ``temporary``.
    ``check`` is called when the bytes are on the disk and before the name appears; what it raises discards them.
    Returns False where ``target`` exists already. Where this raises, ``target`` is not there.
    """
    try:
        write_durably(temporary, data)
        if check is not None:
            check()
        try:
            _link(temporary, target)
        except FileExistsError:
            return False
        try:
            sync_folder(target.parent)
        except OSError:  # the name might not survive a power loss: take it back, so that nobody counts on it
            remove_quietly(target)
            raise
        return True
    finally:
        remove_quietly(temporary)


def _link(temporary: Path, target: Path) -> None:
    try:
        os.link(temporary, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if target.exists():  # no race: the store's lock admits one writer
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
        os.rename(temporary, target)
