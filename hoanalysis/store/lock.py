"""One writer for a store: ``flock`` on a file that is never removed and says who holds it.

The kernel drops the lock with its process, however that ends: a dead writer of this machine blocks nobody. What the
file says matters where ``flock`` does not reach: on network file systems that keep locks to one machine.
"""

import contextlib
import errno
import json
import os
import shlex
import socket
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hoanalysis.errors import StoreError
from hoanalysis.store.files import HALF_MADE, explained, remove_tree, shown, told, write_all

try:
    import fcntl
except ImportError:  # no flock on this system: stores can be read, not written
    fcntl = None  # type: ignore[assignment]

_BUSY = (errno.EWOULDBLOCK, errno.EACCES)


def _boot() -> str:
    """Tells two containers on one machine, which share its locks, from two machines."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _here() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "boot": _boot()}


def _is_elsewhere(holder: dict[str, Any]) -> bool:
    here = _here()
    same = holder.get("host") == here["host"] or (here["boot"] and holder.get("boot") == here["boot"])
    return bool(holder) and not same


def _named(holder: dict[str, Any]) -> str:
    if not holder:
        return "a process that has not said its name yet"
    return f"process {holder.get('pid')} on {holder.get('host')}"


class Lock:
    """The exclusive lock of a store; raises `StoreError` that names the holder if there is one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = _acquire(path)
        try:
            holder = _holder(self._fd)
            if _is_elsewhere(holder):
                raise _left_elsewhere(path, holder)
            with explained("lock the store", path):
                _say(self._fd, json.dumps(_here()))
        except BaseException:
            os.close(self._fd)
            raise
        _held.add(self)

    @property
    def held(self) -> bool:
        """Whether this process holds the lock; a forked child does not."""
        return self._fd >= 0

    def release(self) -> None:
        """Give the lock back. Twice is once."""
        if self.held:
            try:
                os.ftruncate(self._fd, 0)
            except OSError:  # the name of a process that ended here is taken over silently
                pass
            finally:
                self.forget()

    def forget(self) -> None:
        """Close the file. In a forked child the parent's lock stays."""
        fd, self._fd = self._fd, -1
        os.close(fd)
        _held.discard(self)


_held: "weakref.WeakSet[Lock]" = weakref.WeakSet()


def _forget_in_child() -> None:
    # A child would hold the lock on after its parent's death: an orphaned worker must not block the resume.
    for lock in list(_held):
        lock.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


def unlock(folder: str | os.PathLike[str]) -> str:
    """Clear the lock that a writer on *another* host left behind; returns what was done, as a sentence.

    Make sure that the process is dead: two writers at once are what the lock is for. A dead writer of this host needs
    no unlock, a living one cannot be unlocked (`StoreError`).
    """
    path = Path(folder) / "lock"
    if not path.is_file():
        raise StoreError("there is no lock to clear", where=shown(path), do="give the folder of a store")
    fd = _acquire(path)
    try:
        holder = _holder(fd)
        if not _is_elsewhere(holder):
            return "nothing to unlock: no other host holds this store, and a dead writer of this host blocks nobody"
        with explained("clear the lock", path):
            os.ftruncate(fd, 0)
        return f"cleared the lock of {_named(holder)}"
    finally:
        os.close(fd)


def _acquire(path: Path) -> int:
    if fcntl is None:
        raise StoreError("stores cannot be written on this system, which has no flock", where=shown(path))
    with explained("lock the store", path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = _holder(fd)
        os.close(fd)
        raise (_busy(path, holder) if error.errno in _BUSY else told(error, "lock the store", path)) from error
    return fd


def _holder(fd: int) -> dict[str, Any]:
    """What the lock file says; empty where it says nothing whole."""
    try:
        holder = json.loads(os.pread(fd, 4096, 0))
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _say(fd: int, text: str) -> None:
    os.ftruncate(fd, 0)
    os.lseek(fd, 0, os.SEEK_SET)
    write_all(fd, text.encode())
    os.fsync(fd)  # other hosts see it


def _busy(path: Path, holder: dict[str, Any]) -> StoreError:
    return StoreError(
        f"another writer holds this store: {_named(holder)}",
        where=shown(path.parent),
        why="a store has one writer at a time",
        do="wait for it or stop it; reading needs no lock: hoanalysis show, ho.open_store",
    )


def _left_elsewhere(path: Path, holder: dict[str, Any]) -> StoreError:
    return StoreError(
        f"this store was locked by {_named(holder)}, another host, and not given back",
        where=shown(path.parent),
        why="whether that process lives cannot be seen from here",
        do=f"if it is dead: hoanalysis unlock {shlex.quote(shown(path.parent))}; reading needs no lock",
    )


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Take turns with others that make something in ``folder`` under a temporary name and rename it.

    What lies there half-made when the turn comes is of the dead, and goes. Where the file system cannot lock folders
    (some network ones) nobody waits and nothing goes.
    """
    fd = os.open(folder, os.O_RDONLY)
    try:
        if _waited(fd):
            for left in folder.glob(HALF_MADE + "*"):
                remove_tree(left)
        yield
    finally:
        os.close(fd)


def _waited(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
    except (OSError, AttributeError):
        return False
    return True
