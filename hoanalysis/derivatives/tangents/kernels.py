"""Matrix products of stacks by the fastest kernel that torch carries for them."""

from __future__ import annotations

import platform

import torch
from torch import Tensor
from torch.nn import functional as F

WORTH = 2**23  # multiply-adds from which a convolution repays its call
PIECE = 2**22  # entries of a result that is copied to where it belongs: a piece stays in the last cache
LONGEST = 2**20  # rows of one convolution: oneDNN counts the entries of an image in 32 bits


def by_rows(a: Tensor, w: Tensor) -> Tensor:
    """a w^T for rows ``a`` of shape (.., K) and a matrix ``w`` (O, K), of shape (.., O).

    On x86 in float32 it is taken as a convolution with windows of one pixel, which is oneDNN's, while `torch.mm` is
    MKL's: MKL uses the widest vectors of Intel's CPUs alone. On an AMD Zen 5 (two cores) oneDNN does 450 GFLOP/s and
    MKL 185; on Intel's it was not measured.
    """
    rows = a.reshape(-1, a.shape[-1])
    if not _convolves(rows, w):
        out = torch.mm(rows, w.mT)
    elif len(rows) <= LONGEST:
        out = _convolved(rows, w)
    else:
        by_rows_into(rows, w, out := rows.new_empty(len(rows), len(w)))
    return out.view(*a.shape[:-1], len(w))


def by_rows_into(a: Tensor, w: Tensor, out: Tensor) -> None:
    """`by_rows` written to ``out``."""
    rows, into = a.reshape(-1, a.shape[-1]), out.view(-1, len(w))
    if not _convolves(rows, w):
        torch.mm(rows, w.mT, out=into)
        return
    for part, place in zip(*_pieces(rows, into), strict=True):
        place.copy_(_convolved(part, w))


def by_rows_onto(a: Tensor, w: Tensor, out: Tensor) -> None:
    """`by_rows` added to ``out``."""
    rows, onto = a.reshape(-1, a.shape[-1]), out.view(-1, len(w))
    if not _convolves(rows, w):
        onto.addmm_(rows, w.mT)
        return
    for part, place in zip(*_pieces(rows, onto), strict=True):
        place += _convolved(part, w)


def _pieces(rows: Tensor, out: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    step = min(LONGEST, max(1, PIECE // out.shape[1]))
    return rows.split(step), out.split(step)


def _convolved(rows: Tensor, w: Tensor) -> Tensor:
    """The rows as the pixels of one image with the channels last, which is how they lie in memory."""
    image = rows.contiguous().view(1, len(rows), 1, -1).permute(0, 3, 1, 2)
    return F.conv2d(image, w[:, :, None, None]).permute(0, 2, 3, 1).reshape(len(rows), len(w))


def _convolves(rows: Tensor, w: Tensor) -> bool:
    onednn = torch.backends.mkldnn
    return (
        rows.dtype == w.dtype == torch.float32
        and rows.device.type == "cpu"
        and rows.numel() * len(w) >= WORTH
        and platform.machine() in ("x86_64", "AMD64")
        and onednn.is_available()
        and bool(onednn.enabled)
    )
