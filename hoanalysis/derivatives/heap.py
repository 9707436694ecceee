"""Memory that is freed during a pass is used again instead of being given back to the system and asked for anew.

The stacks of tangents are tens of megabytes each and live for a few operations. glibc's malloc maps such blocks afresh
every time, and the kernel clears each page on first touch: on a GPT with S = 77 that was a quarter of the time of D2
and a third of that of the diagonal of D3. Kept in the heap, they are reused. Other C libraries are left as they are.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

# <malloc.h>
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
MMAPS = 65_536  # glibc's default number of mapped blocks
KEPT = 1 / 12  # of the machine's memory, freed and at the end of the heap; what is above goes back to the system


@contextlib.contextmanager
def reused() -> Iterator[None]:
    """Within this context freed blocks of any size stay in the heap; afterwards `KEPT` of the machine's memory at most.

    glibc stops adjusting its threshold for mapped blocks once it has been set, so it is left at the highest value
    that the adjustment would have reached.
    """
    mallopt = _mallopt()
    if mallopt is None:
        yield
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)  # never
    try:
        yield
    finally:
        mallopt(M_MMAP_MAX, MMAPS)
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(M_TRIM_THRESHOLD, _kept())


def _kept() -> int:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(min(KEPT * total, 2**31 - 1))  # mallopt takes an int


def _mallopt():
    if not sys.platform.startswith("linux"):
        return None
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018 - absent from other C libraries, whose options mean something else
        return libc.mallopt
    except (OSError, AttributeError):
        return None
