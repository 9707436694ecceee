"""Independent pieces of one node's work, a share for each of torch's threads.

Operations of some ten microseconds lose much of a second core to the handshake at the end of each. Where a node falls
into independent pieces (the heads of an attention), each thread takes a share of them instead, with torch on one thread
inside. Results come back in the order of the pieces, so that sums over them do not depend on who was first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def shared_out(work: Callable[[Sequence[T]], list[R]], pieces: Sequence[T], device: torch.device) -> list[R]:
    """``work(pieces)``, one result per piece; ``work`` gets a contiguous share and may reuse its buffers within it."""
    threads = min(torch.get_num_threads(), len(pieces)) if device.type == "cpu" else 1
    if threads <= 1:
        return work(pieces)
    ends = [i * len(pieces) // threads for i in range(threads + 1)]
    grad = torch.is_grad_enabled()

    def run(start: int, stop: int) -> list[R]:
        with torch.set_grad_enabled(grad):  # both are settings of a thread, and this one is new
            torch.set_num_threads(1)
            return work(pieces[start:stop])

    with _kept_threads(), ThreadPoolExecutor(threads) as pool:
        return [r for share in pool.map(run, ends, ends[1:]) for r in share]


@contextmanager
def _kept_threads() -> Iterator[None]:
    """Puts the number of torch's threads back: a thread that sets its own sets the default of the process as well."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
