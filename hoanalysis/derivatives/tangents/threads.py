"""Many small matrix products on several cores: whole items on threads of their own, one core each.

Torch would share out each product instead and wait for all cores after every one. For thousands of products of a tenth
of a millisecond the waiting is felt, and on a machine with other work each wait lasts until the slower core is free.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def share(work: Callable[[Sequence[T]], None], items: Sequence[T]) -> None:
    """Call ``work`` with parts of the items that make up all of them, at the same time where torch has several threads.

    Under a dispatch mode (a counter of operations) everything happens in this thread: modes do not see the others.
    """
    threads = torch.get_num_threads()
    n = min(threads, len(items))
    if n < 2 or torch._C._len_torch_dispatch_stack():
        work(items)
        return
    try:
        list(_pool(threads).map(work, [items[i::n] for i in range(n)]))
    finally:
        torch.set_num_threads(threads)  # a thread that starts sets the number for itself, and for those after it


@functools.lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "hoanalysis", _start)


def _start() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)


if hasattr(os, "register_at_fork"):  # a forked process has none of these threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
