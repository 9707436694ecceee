"""Ctrl-C while the command's libraries are still being imported, which takes a second or two.

Python's own answer is a traceback through whatever was imported at that moment, and no code of the command can catch
it: the package is imported first. So the package does this first, for its command alone; `hoanalysis.cli` takes it
back.
"""

import os
import signal
import sys
import threading
from types import FrameType


def _leave(signum: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted; nothing was begun\n")
    os._exit(128 + signum)


def guard() -> None:
    """Leave with a sentence on Ctrl-C, where this process is the command ``hoanalysis``."""
    command = os.path.basename(sys.argv[0]) if sys.argv else ""
    if command in ("hoanalysis", "hoanalysis.exe") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _leave)


def release() -> None:
    """Ctrl-C is a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


guard()
