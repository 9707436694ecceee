"""Ops taken apart by hand: norms and attention, for which torch's own higher derivatives are wrong or missing, losses,
and what has several outputs. Each function receives the builder ``b`` and emits simpler ops, exact at every order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hoanalysis.derivatives.tangents.graph import TangentsUnsupported
from hoanalysis.derivatives.tangents.rules.normalize import normalize
from hoanalysis.derivatives.tangents.rules.product import scale_shift

aten = torch.ops.aten
DECOMPOSITIONS: dict[Callable, Callable] = {}
MEAN, SUM = 1, 2  # at::Reduction


def decomposition(*ops: Callable) -> Callable[[Callable], Callable]:
    """Register a function ``f(b, *args, **kwargs)`` that emits ``op(*args, **kwargs)`` in simpler ops."""

    def register(f: Callable) -> Callable:
        for op in ops:
            DECOMPOSITIONS[op] = f
        return f

    return register


def _shape(b: Any, x: Any) -> list[int]:
    return list(b.value(x).shape)


def _affine(b: Any, y: Any, weight: Any, bias: Any, shape: Sequence[int] | None = None) -> Any:
    weight, bias = (c if c is None or shape is None else b(aten.view.default, c, list(shape)) for c in (weight, bias))
    if weight is not None and bias is not None:
        return b(scale_shift, y, weight, bias)
    y = y if weight is None else b(aten.mul.Tensor, y, weight)
    return y if bias is None else b(aten.add.Tensor, y, bias)


# ---- norms ----------------------------------------------------------------------------------------------------------


@decomposition(aten.layer_norm.default)
def layer_norm(
    b: Any, x: Any, shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Any:
    return _affine(b, b(normalize, x, len(shape), eps, True), weight, bias)


@decomposition(aten.native_layer_norm.default)
def native_layer_norm(b: Any, x: Any, shape: Sequence[int], weight: Any, bias: Any, eps: float) -> Any:
    return layer_norm(b, x, shape, weight, bias, eps), None, None


@decomposition(aten.rms_norm.default)
def rms_norm(b: Any, x: Any, shape: Sequence[int], weight: Any = None, eps: float | None = None) -> Any:
    eps = torch.finfo(b.value(x).dtype).eps if eps is None else eps
    return _affine(b, b(normalize, x, len(shape), eps, False), weight, None)


@decomposition(aten.group_norm.default)
def group_norm(b: Any, x: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any) -> Any:
    shape = _shape(b, x)
    parts = b(aten.reshape.default, x, [shape[0], groups, -1])
    y = b(aten.reshape.default, b(normalize, parts, 1, eps, True), shape)
    return _affine(b, y, weight, bias, [-1] + [1] * (len(shape) - 2))


@decomposition(aten.instance_norm.default)
def instance_norm(
    b: Any, x: Any, weight: Any, bias: Any, mean: Any, var: Any, use_input: bool, momentum: float, eps: float, *_: Any
) -> Any:
    if not use_input:
        return batch_norm(b, x, weight, bias, mean, var, False, momentum, eps)
    return group_norm(b, x, _shape(b, x)[1], weight, bias, eps)


@decomposition(aten.batch_norm.default)
def batch_norm(
    b: Any, x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float, *_: Any
) -> Any:
    shape = _shape(b, x)
    channels = [-1] + [1] * (len(shape) - 2)
    if training:  # the running statistics are updated on the problem's copies, and the loss does not see them
        swap = [1, 0, *range(2, len(shape))]
        rows = b(aten.permute.default, x, swap)
        y = b(normalize, rows, len(shape) - 1, eps, True)
        return _affine(b, b(aten.permute.default, y, swap), weight, bias, channels)
    scale = b(aten.rsqrt.default, b(aten.add.Scalar, var, eps))
    y = b(aten.sub.Tensor, x, b(aten.view.default, mean, channels))
    y = b(aten.mul.Tensor, y, b(aten.view.default, scale, channels))
    return _affine(b, y, weight, bias, channels)


@decomposition(aten._weight_norm.default)
def weight_norm(b: Any, v: Any, g: Any, axis: int = 0) -> Any:
    n = len(_shape(b, v))
    axes = [i for i in range(n) if axis == -1 or i != axis % n]
    norm = b(aten.sqrt.default, b(aten.sum.dim_IntList, b(aten.square.default, v), axes, True))
    return b(aten.mul.Tensor, v, b(aten.mul.Tensor, g, b(aten.reciprocal.default, norm)))


@decomposition(aten.linalg_vector_norm.default)
def vector_norm(b: Any, x: Any, ord: float = 2, axes: Any = None, keepdim: bool = False, **_: Any) -> Any:
    axes = list(range(len(_shape(b, x)))) if axes is None else axes
    if ord == 1:
        return b(aten.sum.dim_IntList, b(aten.abs.default, x), axes, keepdim)
    if ord != 2:
        return None
    square = b(aten.sum.dim_IntList, b(aten.square.default, x), axes, keepdim)
    zero, one = (b.constant(b.value(square).new_full((), c)) for c in (0.0, 1.0))
    at_zero = b(aten.eq.Scalar, b(aten.detach.default, square), 0)  # its kink, with derivatives 0 as torch's first
    return b(aten.where.self, at_zero, zero, b(aten.sqrt.default, b(aten.where.self, at_zero, one, square)))


# ---- attention ------------------------------------------------------------------------------------------------------


@decomposition(aten.scaled_dot_product_attention.default)
def attention(
    b: Any,
    q: Any,
    k: Any,
    v: Any,
    mask: Any = None,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if dropout > 0:
        raise TangentsUnsupported("attention with active dropout")
    if enable_gqa:
        repeats = _shape(b, q)[-3] // _shape(b, k)[-3]
        k, v = (b(aten.repeat_interleave.self_int, x, repeats, -3) for x in (k, v))
    scale = 1 / math.sqrt(_shape(b, q)[-1]) if scale is None else scale
    q = b(aten.mul.Scalar, q, scale)
    scores = b(aten.matmul.default, q, b(aten.transpose.int, k, -2, -1))
    like = b.value(scores)
    if causal:
        n, m = like.shape[-2:]
        allowed = torch.ones(n, m, dtype=torch.bool, device=like.device).tril()
        bias = torch.zeros(n, m, dtype=like.dtype, device=like.device).masked_fill(~allowed, -math.inf)
        scores = b(aten.add.Tensor, scores, b.constant(bias))
    elif mask is not None and b.value(mask).dtype == torch.bool:
        zeros = b.constant(torch.zeros((), dtype=like.dtype, device=like.device))
        minus = b.constant(torch.full((), -math.inf, dtype=like.dtype, device=like.device))
        scores = b(aten.add.Tensor, scores, b(aten.where.self, mask, zeros, minus))
    elif mask is not None:
        scores = b(aten.add.Tensor, scores, mask)
    softmax = aten.softmax.int if mask is None else aten._safe_softmax.default  # 0 in rows that are masked in full
    return b(aten.matmul.default, b(softmax, scores, -1), v)


@decomposition(aten.repeat_interleave.self_int)
def repeat_interleave(b: Any, x: Any, repeats: int, axis: int | None = None, **_: Any) -> Any:
    n = len(_shape(b, x))
    if axis is None:
        x, axis, n = b(aten.reshape.default, x, [-1]), 0, 1
    axis %= n
    shape = _shape(b, x)
    x = b(aten.unsqueeze.default, x, axis + 1)
    x = b(aten.expand.default, x, [*shape[: axis + 1], repeats, *shape[axis + 1 :]])
    return b(aten.reshape.default, x, [*shape[:axis], shape[axis] * repeats, *shape[axis + 1 :]])


# ---- losses ---------------------------------------------------------------------------------------------------------


def _reduce(b: Any, x: Any, reduction: int) -> Any:
    return b(aten.mean.default, x) if reduction == MEAN else b(aten.sum.default, x) if reduction == SUM else x


@decomposition(aten.cross_entropy_loss.default)
def cross_entropy(
    b: Any, x: Any, target: Any, weight: Any = None, reduction: int = MEAN, ignore: int = -100, smoothing: float = 0.0
) -> Any:
    shape = _shape(b, x)
    axis = 0 if len(shape) == 1 else 1
    classes = shape[axis]
    logp = b(aten.log_softmax.int, x, axis)
    along = [classes if i == axis else 1 for i in range(len(shape))]
    spread = None if weight is None else b(aten.view.default, weight, along)
    if b.value(target).is_floating_point():  # probabilities: divided by the number of targets, whatever the weights
        p = target
        if smoothing:
            p = b(aten.add.Scalar, b(aten.mul.Scalar, target, 1 - smoothing), smoothing / classes)
        if spread is not None:
            p = b(aten.mul.Tensor, p, spread)
        each = b(aten.neg.default, b(aten.sum.dim_IntList, b(aten.mul.Tensor, logp, p), [axis]))
        return _reduce(b, each, reduction)
    nll = b(aten.nll_loss_nd.default, logp, target, weight, reduction, ignore)
    if not smoothing:
        return nll
    kept = b(aten.unsqueeze.default, b(aten.ne.Scalar, target, ignore), axis)
    even = logp if spread is None else b(aten.mul.Tensor, logp, spread)
    even = b(aten.mul.Tensor, even, b(aten._to_copy.default, kept, dtype=b.value(x).dtype))
    even = b(aten.neg.default, b(aten.sum.dim_IntList, even, [axis]))
    if reduction:
        even = b(aten.sum.default, even)
    if reduction == MEAN:  # the sum of the targets' weights: what nll_loss divides by, too
        ones = b(aten.full_like.default, x, -1.0)
        even = _divide(b, even, b(aten.nll_loss_nd.default, ones, target, weight, SUM, ignore))
    terms = (b(aten.mul.Scalar, nll, 1 - smoothing), b(aten.mul.Scalar, even, smoothing / classes))
    return b(aten.add.Tensor, *terms)


@decomposition(aten.mse_loss.default)
def mse_loss(b: Any, x: Any, y: Any, reduction: int = MEAN) -> Any:
    return _reduce(b, b(aten.square.default, b(aten.sub.Tensor, x, y)), reduction)


@decomposition(aten.l1_loss.default)
def l1_loss(b: Any, x: Any, y: Any, reduction: int = MEAN) -> Any:
    return _reduce(b, b(aten.abs.default, b(aten.sub.Tensor, x, y)), reduction)


@decomposition(aten.huber_loss.default)
def huber_loss(b: Any, x: Any, y: Any, reduction: int = MEAN, delta: float = 1.0) -> Any:
    """d^2/2 where |d| <= delta, delta (|d| - delta/2) elsewhere."""
    d = b(aten.sub.Tensor, x, y)
    size = b(aten.abs.default, d)
    square = b(aten.mul.Scalar, b(aten.square.default, d), 0.5)
    line = b(aten.mul.Scalar, b(aten.sub.Scalar, size, delta / 2), delta)
    return _reduce(b, b(aten.where.self, b(aten.le.Scalar, size, delta), square, line), reduction)


@decomposition(aten.smooth_l1_loss.default)
def smooth_l1_loss(b: Any, x: Any, y: Any, reduction: int = MEAN, beta: float = 1.0) -> Any:
    if beta == 0:
        return l1_loss(b, x, y, reduction)
    return b(aten.mul.Scalar, huber_loss(b, x, y, reduction, beta), 1 / beta)


@decomposition(aten.binary_cross_entropy_with_logits.default)
def bce_with_logits(b: Any, x: Any, y: Any, weight: Any = None, pos_weight: Any = None, reduction: int = MEAN) -> Any:
    """(1 - y) x - (1 + (pos_weight - 1) y) log sigmoid(x)."""
    each = b(aten.neg.default, b(aten.log_sigmoid.default, x))
    if pos_weight is not None:
        excess = b(aten.mul.Tensor, b(aten.sub.Scalar, pos_weight, 1), y)
        each = b(aten.mul.Tensor, each, b(aten.add.Scalar, excess, 1))
    each = b(aten.add.Tensor, b(aten.mul.Tensor, x, b(aten.rsub.Scalar, y, 1)), each)
    if weight is not None:
        each = b(aten.mul.Tensor, each, weight)
    return _reduce(b, each, reduction)


# ---- arithmetic -----------------------------------------------------------------------------------------------------


@decomposition(aten.div.Tensor)
def _divide(b: Any, x: Any, y: Any) -> Any:
    if not hasattr(b.value(y), "shape"):
        return b(aten.div.Scalar, x, y)
    dtype = torch.result_type(b.value(x), b.value(y))
    if b.value(y).dtype != dtype and dtype.is_floating_point:  # counts, say: 1/y would be of the default dtype
        y = b(aten._to_copy.default, y, dtype=dtype)
    return b(aten.mul.Tensor, x, b(aten.reciprocal.default, y))


@decomposition(aten.matmul.default)
def matmul(b: Any, x: Any, y: Any) -> Any:
    """Vectors as matrices of one row or column; None where there is nothing to do."""
    n, m = len(_shape(b, x)), len(_shape(b, y))
    if n > 1 and m > 1:
        return None
    out = b(
        aten.matmul.default,
        x if n > 1 else b(aten.unsqueeze.default, x, 0),
        y if m > 1 else b(aten.unsqueeze.default, y, 1),
    )
    out = out if m > 1 else b(aten.squeeze.dim, out, -1)
    return out if n > 1 else b(aten.squeeze.dim, out, -1 if m == 1 else -2)


@decomposition(aten.mv.default, aten.dot.default, aten.vdot.default)
def vector_product(b: Any, x: Any, y: Any) -> Any:
    return matmul(b, x, y)


def _cast_first(op: Callable) -> Callable:
    def softmax(b: Any, x: Any, axis: int, dtype: torch.dtype | None = None) -> Any:
        """In another dtype, the cast as a node of its own; None where there is nothing to do."""
        if dtype is None or dtype == b.value(x).dtype:
            return None
        return b(op, b(aten._to_copy.default, x, dtype=dtype), axis)

    return softmax


for _op in (aten.softmax.int, aten.log_softmax.int):
    decomposition(_op)(_cast_first(_op))


@decomposition(aten.logsumexp.default)
def logsumexp(b: Any, x: Any, axes: Sequence[int], keepdim: bool = False) -> Any:
    top = b(aten.amax.default, b(aten.detach.default, x), axes, True)
    total = b(aten.sum.dim_IntList, b(aten.exp.default, b(aten.sub.Tensor, x, top)), axes, True)
    out = b(aten.add.Tensor, b(aten.log.default, total), top)
    return out if keepdim else b(aten.squeeze.dims, out, axes)


@decomposition(aten.var.correction)
def variance(b: Any, x: Any, axes: Any = None, *, correction: float | None = None, keepdim: bool = False) -> Any:
    shape = _shape(b, x)
    axes = list(range(len(shape))) if axes is None else [a % len(shape) for a in axes]
    centred = b(aten.sub.Tensor, x, b(aten.mean.dim, x, axes, True))
    total = b(aten.sum.dim_IntList, b(aten.square.default, centred), axes, keepdim)
    count = math.prod(shape[a] for a in axes) - (1 if correction is None else correction)
    return b(aten.mul.Scalar, total, 1 / count)


@decomposition(aten.std.correction)
def deviation(b: Any, x: Any, axes: Any = None, **kwargs: Any) -> Any:
    return b(aten.sqrt.default, variance(b, x, axes, **kwargs))


@decomposition(aten.addmm.default)
def addmm(b: Any, c: Any, x: Any, y: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    product = b(aten.mm.default, x, y)
    product = product if alpha == 1 else b(aten.mul.Scalar, product, alpha)
    return b(aten.add.Tensor, product, c if beta == 1 else b(aten.mul.Scalar, c, beta))


@decomposition(aten.baddbmm.default)
def baddbmm(b: Any, c: Any, x: Any, y: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    product = b(aten.bmm.default, x, y)
    product = product if alpha == 1 else b(aten.mul.Scalar, product, alpha)
    return b(aten.add.Tensor, product, c if beta == 1 else b(aten.mul.Scalar, c, beta))


@decomposition(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
def conv(
    b: Any, x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Any:
    n = len(_shape(b, weight)) - 2
    full = [
        list(v) * n if len(v) == 1 else list(v)
        for v in ([s] if isinstance(s, int) else s for s in (stride, padding, dilation))
    ]
    if len(_shape(b, x)) == n + 1:
        x = b(aten.unsqueeze.default, x, 0)
        y = b(aten.convolution.default, x, weight, bias, *full, False, [0] * n, groups)
        return b(aten.squeeze.dim, y, 0)
    return b(aten.convolution.default, x, weight, bias, *full, False, [0] * n, groups)


# ---- several outputs, and identities --------------------------------------------------------------------------------


@decomposition(aten.expand_as.default, aten.view_as.default, aten.reshape_as.default)
def shaped_as(b: Any, x: Any, other: Any) -> Any:
    """Only the shape of ``other`` matters: its own tangents must not enter."""
    shape = _shape(b, other)
    if math.prod(shape) == math.prod(_shape(b, x)) and len(shape) and _shape(b, x) != shape:
        return b(aten.reshape.default, x, shape)
    return b(aten.expand.default, x, shape)


@decomposition(aten.type_as.default)
def type_as(b: Any, x: Any, other: Any) -> Any:
    return b(aten._to_copy.default, x, dtype=b.value(other).dtype)


@decomposition(aten._prelu_kernel.default)
def prelu(b: Any, x: Any, slope: Any) -> Any:
    return b(aten.where.self, b(aten.gt.Scalar, b(aten.detach.default, x), 0), x, b(aten.mul.Tensor, x, slope))


@decomposition(aten.bilinear.default)
def bilinear(b: Any, x: Any, y: Any, weight: Any, bias: Any = None) -> Any:
    out = b(aten.einsum.default, "...i,oij,...j->...o", [x, weight, y])
    return out if bias is None else b(aten.add.Tensor, out, bias)


@decomposition(aten.embedding_bag.default, aten.embedding_bag.padding_idx)
def embedding_bag(
    b: Any, weight: Any, index: Any, offsets: Any, by_frequency: bool = False, mode: int = 0, sparse: bool = False,
    each: Any = None, last: bool = False, padding: int | None = None,
) -> Any:  # fmt: skip
    """Sums or means of rows; the bags are found anew for every batch. Four outputs, of which the first counts."""
    if mode == 2 or by_frequency or padding is not None:
        raise TangentsUnsupported("an embedding bag of maxima, with a padding index or scaled by frequency")
    rows = b(aten.embedding.default, weight, index)
    if each is not None:
        rows = b(aten.mul.Tensor, rows, b(aten.unsqueeze.default, each, -1))
    starts = b(aten.slice.Tensor, offsets, 0, 0, -1) if last else offsets
    place = b(aten.arange.default, _shape(b, index)[0])
    bag = b(aten.sub.Scalar, b(aten.searchsorted.Tensor, starts, place, right=True), 1)
    zeros = b(aten.new_zeros.default, weight, [_shape(b, starts)[0], _shape(b, weight)[1]])
    total = b(aten.index_add.default, zeros, 0, bag, rows)
    if mode == 1:
        counts = b(aten.index_add.default, b(aten.new_zeros.default, weight, [_shape(b, starts)[0]]), 0, bag,
                   b(aten.new_ones.default, weight, _shape(b, index)))  # fmt: skip
        total = b(aten.div.Tensor, total, b(aten.unsqueeze.default, b(aten.clamp_min.default, counts, 1), -1))
    return total, None, None, None


@decomposition(aten.glu.default)
def glu(b: Any, x: Any, axis: int = -1) -> Any:
    first, second = chunk(b, x, 2, axis)
    return b(aten.mul.Tensor, first, b(aten.sigmoid.default, second))


@decomposition(aten.unbind.int)
def unbind(b: Any, x: Any, axis: int = 0) -> Any:
    return tuple(b(aten.select.int, x, axis, i) for i in range(_shape(b, x)[axis]))


@decomposition(aten.split_with_sizes.default, aten.split.sizes, aten.unsafe_split_with_sizes.default)
def split_with_sizes(b: Any, x: Any, sizes: Sequence[int], axis: int = 0) -> Any:
    out, start = [], 0
    for n in sizes:
        out.append(b(aten.slice.Tensor, x, axis, start, start + n))
        start += n
    return tuple(out)


@decomposition(aten.split.Tensor, aten.unsafe_split.Tensor)
def split(b: Any, x: Any, size: int, axis: int = 0) -> Any:
    n = _shape(b, x)[axis]
    return split_with_sizes(b, x, [min(size, n - i) for i in range(0, n, size)] or [0], axis)


@decomposition(aten.chunk.default, aten.unsafe_chunk.default)
def chunk(b: Any, x: Any, chunks: int, axis: int = 0) -> Any:
    return split(b, x, max(1, -(-_shape(b, x)[axis] // chunks)), axis)


# ---- a choice by value, whose place is held fixed -------------------------------------------------------------------


@decomposition(aten.topk.default)
def topk(b: Any, x: Any, k: int, axis: int = -1, *more: Any) -> Any:
    index = b.fixed(aten.topk.default, x, k, axis, *more)[1]
    return b(aten.gather.default, x, axis, index), index


@decomposition(aten.sort.default)
def sort(b: Any, x: Any, axis: int = -1, descending: bool = False) -> Any:
    index = b.fixed(aten.sort.default, x, axis, descending)[1]
    return b(aten.gather.default, x, axis, index), index


@decomposition(aten.sort.stable)
def stable_sort(b: Any, x: Any, *, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    index = b(aten.argsort.stable, b(aten.detach.default, x), stable=bool(stable), dim=dim, descending=descending)
    return b(aten.gather.default, x, dim, index), index


def _chosen(op: Callable) -> Callable:
    names = [a.name for a in op._schema.arguments]  # type: ignore[attr-defined]

    def choose(b: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        """The entry at the index that the op finds."""
        given = {"dim": -1, "keepdim": False, **dict(zip(names[1:], args, strict=False)), **kwargs}
        axis, keepdim = given["dim"], given["keepdim"]
        index = b.fixed(op, x, *(given[n] for n in names[1:]))[1]
        at = index if keepdim else b(aten.unsqueeze.default, index, axis)
        value = b(aten.gather.default, x, axis, at)
        return (value if keepdim else b(aten.squeeze.dim, value, axis)), index

    return choose


for _op in (aten.max.dim, aten.min.dim, aten.median.dim, aten.nanmedian.dim, aten.mode.default, aten.kthvalue.default):
    decomposition(_op)(_chosen(_op))


@decomposition(aten.maximum.default)
def maximum(b: Any, x: Any, y: Any) -> Any:
    """The larger; where both are, half of each, as torch differentiates it."""
    return _either(b, x, y, aten.gt.Tensor)


@decomposition(aten.minimum.default)
def minimum(b: Any, x: Any, y: Any) -> Any:
    return _either(b, x, y, aten.lt.Tensor)


def _either(b: Any, x: Any, y: Any, before: Callable) -> Any:
    p, q = b(aten.detach.default, x), b(aten.detach.default, y)
    half = b(aten.mul.Scalar, b(aten.add.Tensor, x, y), 0.5)
    rest = b(aten.where.self, b(before, q, p), y, half)
    return b(aten.where.self, b(before, p, q), x, rest)


@decomposition(aten.clamp.Tensor)
def clamp(b: Any, x: Any, low: Any = None, high: Any = None) -> Any:
    """With bounds that are differentiated themselves; None where they are fixed."""
    if not (b.is_live(low) or b.is_live(high)):
        return None
    if low is not None:
        x = b(aten.where.self, b(aten.lt.Tensor, b(aten.detach.default, x), b(aten.detach.default, low)), low, x)
    if high is not None:
        x = b(aten.where.self, b(aten.gt.Tensor, b(aten.detach.default, x), b(aten.detach.default, high)), high, x)
    return x


@decomposition(aten.masked_fill.Tensor)
def masked_fill(b: Any, x: Any, mask: Any, value: Any) -> Any:
    """With a value that is differentiated itself; None where it is fixed."""
    return b(aten.where.self, mask, value, x) if b.is_live(value) else None


@decomposition(aten.prod.default)
def prod(b: Any, x: Any, *, dtype: torch.dtype | None = None) -> Any:
    x = x if dtype is None else b(aten._to_copy.default, x, dtype=dtype)
    return prod_along(b, b(aten.reshape.default, x, [-1]), 0)


@decomposition(aten.prod.dim_int)
def prod_along(b: Any, x: Any, axis: int, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    """Halves times halves: right at zeros as well, where torch's own second derivatives are not."""
    x = x if dtype is None else b(aten._to_copy.default, x, dtype=dtype)
    while (n := _shape(b, x)[axis]) > 1:
        halves = [b(aten.slice.Tensor, x, axis, i * (n // 2), (i + 1) * (n // 2)) for i in (0, 1)]
        pairs = b(aten.mul.Tensor, *halves)
        x = b(aten.cat.default, [pairs, b(aten.slice.Tensor, x, axis, n - 1, n)], axis) if n % 2 else pairs
    if not _shape(b, x)[axis]:
        return None
    return x if keepdim else b(aten.squeeze.dim, x, axis)


@decomposition(aten.cumprod.default)
def cumprod(b: Any, x: Any, axis: int, *, dtype: torch.dtype | None = None) -> Any:
    """Each entry times the one 1, 2, 4, .. places before it."""
    x = x if dtype is None else b(aten._to_copy.default, x, dtype=dtype)
    n, step = _shape(b, x)[axis], 1
    while step < n:
        first, last = b(aten.slice.Tensor, x, axis, 0, step), b(aten.slice.Tensor, x, axis, step, n)
        before = b(aten.slice.Tensor, x, axis, 0, n - step)
        x, step = b(aten.cat.default, [first, b(aten.mul.Tensor, last, before)], axis), 2 * step
    return x


@decomposition(aten.embedding.default)
def embedding(b: Any, weight: Any, index: Any, padding: int = -1, by_frequency: bool = False, *_: Any) -> Any:
    """None: it has a rule."""
    if by_frequency:
        raise TangentsUnsupported("an embedding whose gradient is scaled by frequency")
    return None


@decomposition(aten.stack.default)
def stack(b: Any, tensors: Sequence[Any], axis: int = 0) -> Any:
    axis %= len(_shape(b, tensors[0])) + 1
    return b(aten.cat.default, [b(aten.unsqueeze.default, t, axis) for t in tensors], axis)


@decomposition(aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)
def dropout(b: Any, x: Any, p: float, train: bool) -> Any:
    if train and p > 0:
        raise TangentsUnsupported("dropout is active")
    return x
