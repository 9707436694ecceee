"""The data of a checkpoint in shards, so that several workers can share it.

A shard is a contiguous run of whole blocks of batches, and the blocks are those of ``keep_batches`` over the whole
data: sums over the shards are sums over the data, with the kept blocks of a run without shards. How many there are is a
setting, never the number of workers: the sums of the shards are added in their order, whoever computed them, and
another cut has other last bits.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass


@dataclass(frozen=True)
class Shard:
    """Batches ``first`` .. ``stop`` of the data (all that follow for None), of which ``block`` make a kept block."""

    first: int = 0
    stop: int | None = None
    block: int = 1


WHOLE = Shard()


def block_length(batches: int, keep_batches: int) -> int:
    """Batches in a block: the smallest power of 2 that makes at most ``keep_batches`` of them; 1 where none are kept.

    >>> block_length(40, 20), block_length(41, 20), block_length(41, 0)
    (2, 4, 1)
    """
    kept, length = keep_batches - keep_batches % 2, 1
    while kept and -(-batches // length) > kept:
        length *= 2
    return length


def cut(batches: int, shards: int, keep_batches: int = 0) -> list[Shard]:
    """At most so many shards of about equal length, none of them empty.

    >>> cut(10, 3)
    [Shard(first=0, stop=3, block=1), Shard(first=3, stop=6, block=1), Shard(first=6, stop=10, block=1)]
    >>> [(s.first, s.stop) for s in cut(10, 3, keep_batches=4)]
    [(0, 4), (4, 8), (8, 10)]
    """
    length = block_length(batches, keep_batches)
    blocks = -(-batches // length)
    n = min(shards, blocks)
    edges = [min(length * (blocks * k // n), batches) for k in range(n + 1)]
    return [Shard(a, b, length) for a, b in itertools.pairwise(edges)]
