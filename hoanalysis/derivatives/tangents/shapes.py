"""Broadcasting with a tangent axis in front."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def lift(stack: Tensor, ndim: int) -> Tensor:
    """A stack (k, *shape) as (k, 1, .., 1, *shape) with ``ndim`` axes behind the first, so that it broadcasts."""
    missing = ndim - (stack.dim() - 1)
    return stack.reshape(len(stack), *[1] * missing, *stack.shape[1:]) if missing > 0 else stack


def spread(stack: Tensor, shape: Sequence[int]) -> Tensor:
    """A stack of tensors that broadcast to ``shape`` as a stack of that shape; a view."""
    if tuple(stack.shape[1:]) == tuple(shape):
        return stack
    return lift(stack, len(shape)).expand(len(stack), *shape)


def sum_to(stack: Tensor, shape: Sequence[int]) -> Tensor:
    """The transpose of `spread`: sums over the axes along which ``shape`` was repeated."""
    if tuple(stack.shape[1:]) == tuple(shape):
        return stack
    extra = stack.dim() - 1 - len(shape)
    axes = [1 + i for i in range(extra)]
    axes += [1 + extra + i for i, n in enumerate(shape) if n == 1 and stack.shape[1 + extra + i] != 1]
    return (stack.sum(axes) if axes else stack).reshape(len(stack), *shape)
