"""Linear nodes: the tangent is the same op on the folded stack, and there are no terms of higher order.

Piecewise linear ops (ReLU, max-pooling, clamp, where) are linear with their mask or index held fixed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hoanalysis.derivatives.tangents.groups import flat
from hoanalysis.derivatives.tangents.rules.base import Key, Local, operand, replaced, rule
from hoanalysis.derivatives.tangents.shapes import spread, sum_to

aten = torch.ops.aten


class Linear(Local):
    """Any linear op: pushed by `torch.vmap`, pulled by its vector-Jacobian product. The explicit ones are faster."""

    def __init__(self, op: Callable, args: tuple, kwargs: dict[str, Any], keys: tuple, order: int) -> None:
        self.op, self.args, self.kwargs = op, args, kwargs
        self.value = op(*args, **kwargs)

    def _at(self, key: Key, x: Tensor) -> Tensor:
        args, kwargs = replaced(self.args, self.kwargs, {key: x})
        return self.op(*args, **kwargs)

    def _input(self, key: Key) -> Tensor:
        return operand(self.args, self.kwargs, key)

    def push(self, key: Key, stack: Tensor) -> Tensor:
        return torch.vmap(lambda x: self._at(key, x))(stack)

    def pull(self, key: Key, stack: Tensor) -> Tensor:
        back = torch.func.vjp(lambda x: self._at(key, x), torch.zeros_like(self._input(key)))[1]
        return torch.vmap(lambda y: back(y)[0])(stack)


rule(
    aten.gather.default,
    aten.index_select.default,
    aten.index.Tensor,
    aten.avg_pool1d.default,
    aten.avg_pool2d.default,
    aten.avg_pool3d.default,
    aten._adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool1d.default,
    aten.cumsum.default,
    aten.flip.default,
    aten.roll.default,
    aten.tril.default,
    aten.triu.default,
    aten.upsample_nearest2d.default,
    aten.upsample_nearest2d.vec,
    aten.upsample_bilinear2d.default,
    aten.upsample_bilinear2d.vec,
    aten.im2col.default,
    aten.repeat.default,
    aten.diagonal.default,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
)(Linear)


@rule(aten.constant_pad_nd.default)
class Pad(Linear):
    """A border of a fixed number: of zeros, for the tangents."""

    def _at(self, key: Key, x: Tensor) -> Tensor:
        return self.op(x, self.args[1])


class Placed(Linear):
    """Entries of one tensor put into another: linear in both together, each tangent with zeros for the other."""

    def _at(self, key: Key, x: Tensor) -> Tensor:
        args = [torch.zeros_like(a) if isinstance(a, Tensor) and a.is_floating_point() else a for a in self.args]
        args[key] = x  # type: ignore[call-overload]
        return self.op(*args, **self.kwargs)


rule(
    aten.select_scatter.default,
    aten.slice_scatter.default,
    aten.diagonal_scatter.default,
    aten.scatter.src,
    aten.scatter_add.default,
    aten.index_put.default,
    aten.index_add.default,
    aten.index_copy.default,
)(Placed)


@rule(aten.masked_scatter.default)
class MaskedScatter(Placed):
    """`torch.vmap` has no batched form of it."""

    def push(self, key: Key, stack: Tensor) -> Tensor:
        return torch.stack([self._at(key, x) for x in stack])

    def pull(self, key: Key, stack: Tensor) -> Tensor:
        back = torch.func.vjp(lambda x: self._at(key, x), torch.zeros_like(self._input(key)))[1]
        return torch.stack([back(y)[0] for y in stack])


@rule(
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.lift_fresh.default,
    aten.resolve_conj.default,
    aten.resolve_neg.default,
)
class Reshape(Linear):
    """The same entries in the same order under another shape."""

    def push(self, key: Key, stack: Tensor) -> Tensor:
        return stack.reshape(len(stack), *self.value.shape)

    def pull(self, key: Key, stack: Tensor) -> Tensor:
        return stack.reshape(len(stack), *self.args[0].shape)


@rule(aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device)
class Cast(Linear):
    """Another floating dtype. Tangents and adjoints have the dtype of their value."""

    def push(self, key: Key, stack: Tensor) -> Tensor:
        return stack.to(self.value.dtype)

    def pull(self, key: Key, stack: Tensor) -> Tensor:
        return stack.to(self.args[0].dtype)


@rule(aten.permute.default, aten.transpose.int, aten.t.default, aten.numpy_T.default, aten.movedim.int)
class Permute(Linear):
    """The same axes in another order."""

    def __init__(self, op: Callable, args: tuple, kwargs: dict[str, Any], keys: tuple, order: int) -> None:
        super().__init__(op, args, kwargs, keys, order)
        axes = torch.empty(tuple(range(1, self.args[0].dim() + 1)), device="meta")  # axis i is the one of length i + 1
        moved = op(axes, *args[1:], **kwargs)
        self.axes = [n - 1 for n in moved.shape]
        self.inverse = [self.axes.index(i) for i in range(len(self.axes))]

    def push(self, key: Key, stack: Tensor) -> Tensor:
        return stack.permute(0, *(i + 1 for i in self.axes))

    def pull(self, key: Key, stack: Tensor) -> Tensor:
        return stack.permute(0, *(i + 1 for i in self.inverse))


@rule(aten.expand.default, aten.broadcast_to.default)
class Expand(Linear):
    """Repetition along new or unit axes."""

    def push(self, key: Key, stack: Tensor) -> Tensor:
        return spread(stack, self.value.shape)

    def pull(self, key: Key, stack: Tensor) -> Tensor:
        return sum_to(stack, self.args[0].shape)


@rule(aten.select.int, aten.slice.Tensor, aten.narrow.default)
class Window(Linear):
    """A part of the input, contiguous along one axis."""

    def _window(self, stack: Tensor) -> Tensor:
        axis = self.args[1] if len(self.args) > 1 else 0
        axis = axis + 1 if axis >= 0 else axis
        return self.op(stack, axis, *self.args[2:], **self.kwargs)

    def push(self, key: Key, stack: Tensor) -> Tensor:
        return self._window(stack)

    def pull(self, key: Key, stack: Tensor) -> Tensor:
        whole = stack.new_zeros(len(stack), *self.args[0].shape)
        self._window(whole).copy_(stack)
        return whole


@rule(aten.cat.default)
class Concatenate(Linear):
    """Inputs side by side along one axis."""

    def __init__(self, op: Callable, args: tuple, kwargs: dict[str, Any], keys: tuple, order: int) -> None:
        super().__init__(op, args, kwargs, keys, order)
        axis = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        self.axis = axis % self.value.dim()
        ends = [0]
        for part in args[0]:
            ends.append(ends[-1] + (part.shape[self.axis] if part.dim() == self.value.dim() else 0))
        self.starts = ends

    def _window(self, key: Key, whole: Tensor) -> Tensor:
        start, end = self.starts[key[1]], self.starts[key[1] + 1]
        return whole.narrow(self.axis + 1, start, end - start)

    def push(self, key: Key, stack: Tensor) -> Tensor:
        whole = stack.new_zeros(len(stack), *self.value.shape)
        self._window(key, whole).copy_(stack)
        return whole

    def pull(self, key: Key, stack: Tensor) -> Tensor:
        return self._window(key, stack)


@rule(aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim)
class Sum(Linear):
    """Sum or mean over some axes."""

    def __init__(self, op: Callable, args: tuple, kwargs: dict[str, Any], keys: tuple, order: int) -> None:
        super().__init__(op, args, kwargs, keys, order)
        x = args[0]
        axes = args[1] if len(args) > 1 else kwargs.get("dim")
        axes = [axes] if isinstance(axes, int) else axes
        self.axes = [a % max(x.dim(), 1) for a in axes] if axes and x.dim() else list(range(x.dim()))
        self.kept = [1 if i in self.axes else n for i, n in enumerate(x.shape)]
        self.factor = self.value.numel() / max(x.numel(), 1) if "mean" in str(op) else 1.0

    def push(self, key: Key, stack: Tensor) -> Tensor:
        total = stack.sum([a + 1 for a in self.axes]) if self.axes else stack
        total = total.to(self.value.dtype).reshape(len(stack), *self.value.shape)
        return total * self.factor if self.factor != 1.0 else total

    def pull(self, key: Key, stack: Tensor) -> Tensor:
        x = self.args[0]
        stack = stack * self.factor if self.factor != 1.0 else stack
        return stack.to(x.dtype).reshape(len(stack), *self.kept).expand(len(stack), *x.shape)


@rule(aten.add.Tensor, aten.sub.Tensor, aten.rsub.Scalar, aten.rsub.Tensor, aten.add.Scalar, aten.sub.Scalar)
class Add(Linear):
    """a + alpha b with broadcasting; sub and rsub are sums with other signs."""

    def __init__(self, op: Callable, args: tuple, kwargs: dict[str, Any], keys: tuple, order: int) -> None:
        super().__init__(op, args, kwargs, keys, order)
        alpha = kwargs.get("alpha", args[2] if len(args) > 2 else 1)
        name = op._schema.name.removeprefix("aten::")  # type: ignore[attr-defined]
        self.factor = {"add": (1, alpha), "sub": (1, -alpha), "rsub": (-alpha, 1)}[name]

    def push(self, key: Key, stack: Tensor) -> Tensor:
        out = spread(stack.to(self.value.dtype), self.value.shape)
        return out * self.factor[key] if self.factor[key] != 1 else out

    def pull(self, key: Key, stack: Tensor) -> Tensor:
        out = sum_to(stack, self.args[key].shape).to(self.args[key].dtype)
        return out * self.factor[key] if self.factor[key] != 1 else out


class Scale(Linear):
    """Multiplication by a fixed tensor, number or mask of the input's shape."""

    factor: Any

    def push(self, key: Key, stack: Tensor) -> Tensor:
        return stack * self.factor

    def pull(self, key: Key, stack: Tensor) -> Tensor:
        return stack * self.factor


@rule(aten.neg.default)
class Negate(Scale):
    """-x."""

    factor = -1


@rule(
    aten.relu.default,
    aten.relu6.default,
    aten.leaky_relu.default,
    aten.clamp.default,
    aten.clamp_min.default,
    aten.clamp_max.default,
    aten.hardtanh.default,
    aten.abs.default,
    aten.hardsigmoid.default,
    aten.threshold.default,
    aten.clamp.Tensor,
    aten.hardshrink.default,
    aten.softshrink.default,
)
class PiecewiseLinear(Scale):
    """Elementwise and piecewise linear: the slope at x is held fixed. It is torch's own, also at the kinks."""

    def __init__(self, op: Callable, args: tuple, kwargs: dict[str, Any], keys: tuple, order: int) -> None:
        x = args[0]
        if op is aten.relu.default:
            self.value = torch.relu(x)
            self.factor = aten.threshold_backward.default(x.new_ones(()).expand_as(x), self.value, 0)
        else:
            x = x.detach().clone()
            with torch.enable_grad():
                x.requires_grad_()
                y = op(x, *args[1:], **kwargs)
                self.factor = torch.autograd.grad(y.sum(), x)[0]
            self.value = y.detach()


@rule(aten.where.self)
class Where(Linear):
    """One of two, by a fixed mask."""

    def push(self, key: Key, stack: Tensor) -> Tensor:
        zero = torch.zeros((), dtype=stack.dtype, device=stack.device)
        mask, stack = self.args[0], spread(stack, self.value.shape)
        return torch.where(mask, stack, zero) if key == 1 else torch.where(mask, zero, stack)

    def pull(self, key: Key, stack: Tensor) -> Tensor:
        zero = torch.zeros((), dtype=stack.dtype, device=stack.device)
        kept = torch.where(self.args[0], stack, zero) if key == 1 else torch.where(self.args[0], zero, stack)
        return sum_to(kept, self.args[key].shape)


@rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
class MaskedFill(Linear):
    """Entries replaced by a fixed number."""

    def push(self, key: Key, stack: Tensor) -> Tensor:
        return spread(stack, self.value.shape).masked_fill(self.args[1], 0)

    def pull(self, key: Key, stack: Tensor) -> Tensor:
        return sum_to(stack.masked_fill(self.args[1], 0), self.args[0].shape)


@rule(aten.embedding.default)
class Embedding(Linear):
    """Rows of a table. The scaling of gradients by frequency is an optimizer's matter and refused at capture."""

    def push(self, key: Key, stack: Tensor) -> Tensor:
        return self._seen(stack[:, self.args[1]])

    def _seen(self, stack: Tensor) -> Tensor:
        """Without the padding row: torch gives it no gradient, although the forward pass reads it."""
        padding = self.args[2] if len(self.args) > 2 else -1
        return stack * (self.args[1] != padding).to(stack.dtype)[..., None] if padding >= 0 else stack

    def pull(self, key: Key, stack: Tensor) -> Tensor:
        k, width = len(stack), stack.shape[-1]
        flat = self._seen(stack).reshape(k, -1, width)
        return stack.new_zeros(k, *self.args[0].shape).index_add_(1, self.args[1].reshape(-1), flat)


@rule(aten.nll_loss.default, aten.nll_loss_nd.default, aten.nll_loss2d.default)
class NegativeLogLikelihood(Linear):
    """-log p picked by a fixed target, weighted and reduced: linear in log p."""

    def __init__(self, op: Callable, args: tuple, kwargs: dict[str, Any], keys: tuple, order: int) -> None:
        super().__init__(op, args, kwargs, keys, order)
        with torch.enable_grad():
            x = args[0].detach().requires_grad_()
            value = self._at(0, x)
            self.scalar = value.dim() == 0
            self.slope = torch.autograd.grad(value, x)[0] if self.scalar else x

    def push(self, key: Key, stack: Tensor) -> Tensor:
        if not self.scalar:
            return super().push(key, stack)
        return flat(stack) @ self.slope.flatten()

    def pull(self, key: Key, stack: Tensor) -> Tensor:
        if not self.scalar:
            return super().pull(key, stack)
        return stack.reshape(len(stack), *[1] * self.slope.dim()) * self.slope


def _in_quarters(x: Tensor, options: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a pooling is that of windows of 2 x 2 side by side."""
    given: list[Any] = [*options, *[[2, 2], [0, 0], [1, 1], False][len(options) - 1 :]]
    kernel, stride, *others = given
    sizes = [list(s) if isinstance(s, (list, tuple)) else [s, s] for s in (kernel, stride or kernel)]
    plain = sizes == [[2, 2], [2, 2]] and others in ([[0, 0], [1, 1], False], [0, 1, False])
    even = x.shape[-1] % 2 == 0 and x.shape[-2] % 2 == 0
    return plain and not kwargs and even and x.shape[-1] < 2**15


def _largest_of_four(x: Tensor) -> tuple[Tensor, Tensor]:
    """Values and flat places: the first of the largest, as torch has it, in half the time or less."""
    width = x.shape[-1]
    a, b, c, d = (x[..., i::2, j::2].contiguous() for i in (0, 1) for j in (0, 1))
    top, bottom = torch.maximum(a, b), torch.maximum(c, d)
    low = _exceeds(bottom, top)
    right = _exceeds(b, a).lerp_(_exceeds(d, c), low)  # torch.where is ten times slower
    within = right.add_(low, alpha=width).long()
    corner = torch.arange(0, x.shape[-2], 2)[:, None] * width + torch.arange(0, width, 2)
    return torch.maximum(top, bottom), within.add_(corner.to(x.device))


def _exceeds(x: Tensor, y: Tensor) -> Tensor:
    """1 where x > y and 0 elsewhere, as numbers: torch compares to flags in four times the time."""
    return torch.gt(x, y, out=torch.empty_like(x, dtype=torch.float32))


@rule(aten.max_pool2d.default)
class MaxPool2d(Linear):
    """The largest of each window, with its place held fixed."""

    def __init__(self, op: Callable, args: tuple, kwargs: dict[str, Any], keys: tuple, order: int) -> None:
        self.args = args
        if _in_quarters(args[0], args[1:], kwargs):
            self.value, index = _largest_of_four(args[0])
        else:
            self.value, index = F.max_pool2d(args[0], *args[1:], **kwargs, return_indices=True)
        self.index = index.flatten(-2)

    def push(self, key: Key, stack: Tensor) -> Tensor:
        index = self.index.expand(len(stack), *self.index.shape)
        return torch.gather(stack.flatten(-2), -1, index).view(len(stack), *self.value.shape)

    def pull(self, key: Key, stack: Tensor) -> Tensor:
        index = self.index.expand(len(stack), *self.index.shape)
        whole = stack.new_zeros(len(stack), *self.args[0].shape)
        whole.flatten(-2).scatter_add_(-1, index, stack.flatten(-2))
        return whole
