"""Passes over all parameters, in pieces that stay in the cache.

A step that does not measure is a gradient and such passes, and each pass over tensors of many megabytes waits for the
memory. Several operations on one piece wait once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from hoanalysis.directions import group_sums
from hoanalysis.partitions import Partition

PIECE = 2**17  # entries: a few such pieces fit into the last level of the cache


def pieces(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """The same parts of tensors of one shape, as flat views; the tensors themselves where these have none in common."""
    if tensors[0].numel() <= PIECE or any(t.device.type != "cpu" or not t.is_contiguous() for t in tensors):
        return [tensors]
    return zip(*(t.view(-1).split(PIECE) for t in tensors), strict=True)


def group_inner(a: Mapping[str, Tensor], b: Mapping[str, Tensor], partition: Partition) -> np.ndarray:
    """a^s . b^s for each group, shape (S,): products and sums of a piece in the tensors' precision, at least float32,
    and sums over pieces in float64."""
    total = np.zeros(len(partition))
    for name, x in a.items():
        group, wide = partition.assignment[name], torch.promote_types(x.dtype, torch.float32)
        if isinstance(group, int):
            total[group] += sum(float((x_.to(wide) * y_.to(wide)).sum()) for x_, y_ in pieces(x, b[name]))
        else:
            total += group_sums({name: x.to(wide) * b[name].to(wide)}, partition)
    return total
