"""A sign of life of the kernel: without it for a while, the page itself says that the explorer is dead.

JupyterLab tells its widgets of a kernel that was restarted from its own menu or died, and of no other end: not of a
restart from another page or client, of a shutdown, of a server that is gone. So a thread renews one line of HTML every
few seconds, and a line that is not renewed shows itself, by CSS alone.
"""

from __future__ import annotations

import atexit
import itertools
import threading

import ipywidgets as w

BEAT, SILENCE = 4, 20  # seconds: between two signs, and without one until it is said

#: A renewed element is a new element, whose animation starts over.
STYLE = f"""<style>
@keyframes ho-silence {{from {{font-size: 0}} to {{font-size: 13px}}}}
.ho-pulse::before {{
  content: "Disconnected: no sign of the kernel for {SILENCE} seconds. If it was restarted, run this cell again; "
    "this is the last view.";
  color: #b2182b; animation: ho-silence 0s linear {SILENCE}s both}}
.ho-live.jupyter-widgets-disconnected .ho-pulse {{display: none}}
</style>"""


class Pulse:
    """The line, shared by all explorers of a kernel, and the thread that renews it once one of them is displayed."""

    def __init__(self) -> None:
        self.line = w.HTML(_sign(0))
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin; does nothing where it beats already."""
        if self._thread is None or not self._thread.is_alive():
            atexit.register(self._ended.set)
            self._thread = threading.Thread(target=self._beat, name="hoanalysis pulse", daemon=True)
            self._thread.start()

    def _beat(self) -> None:
        for count in itertools.count(1):
            self.line.value = _sign(count)
            if self._ended.wait(BEAT):
                return


_pulse: Pulse | None = None


def pulse() -> Pulse:
    """That of this kernel; a new one where its widgets were closed."""
    global _pulse
    if _pulse is None or _pulse.line.comm is None:
        _pulse = Pulse()
    return _pulse


def _sign(count: int) -> str:
    return f"<span class='ho-pulse' data-beat='{count}'></span>"
