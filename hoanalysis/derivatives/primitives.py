"""Norms and attention written in primitives, because torch's own higher derivatives of them are wrong or missing.

Under `primitive_operations` every call of ``torch.nn.functional.layer_norm``, ``batch_norm`` and the like is answered
by arithmetic whose derivatives autograd gets right at every order; fused attention runs on its MATH formula, recurrent
layers off the mkldnn path. tests/derivatives/test_wrong_derivatives.py shows, per operation, the true value, what
nested torch gives, and what we give.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


class primitive_operations(TorchFunctionMode):
    """Within this context, the operations of the table below run as primitives."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        replacement = _REPLACEMENTS.get(func)
        if replacement is not None:
            return replacement(*args, **(kwargs or {}))
        if func is F.multi_head_attention_forward:  # what it calls inside does not come here
            with sdpa_kernel(SDPBackend.MATH):
                return func(*args, **(kwargs or {}))
        if func in _RECURRENT:
            with without_mkldnn():
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def without_mkldnn() -> Iterator[None]:
    """Recurrent layers on torch's own kernels, the only ones with a double backward. Touches no other flag."""
    (enabled, *_) = torch.backends.mkldnn.set_flags(_enabled=False)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=enabled)


def _standardized(x: Tensor, dims: list[int], eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) over ``dims``, with the biased variance that norms use."""
    centred = x - x.mean(dims, keepdim=True)
    return centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    if weight is not None:
        x = x * weight.reshape(shape)
    return x if bias is None else x + bias.reshape(shape)


def layer_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    dims = list(range(-len(normalized_shape), 0))
    return _affine(_standardized(input, dims, eps), weight, bias, tuple(normalized_shape))


def rms_norm(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    dims = list(range(-len(normalized_shape), 0))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    x = input * (input.square().mean(dims, keepdim=True) + eps).rsqrt()
    return x if weight is None else x * weight


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    grouped = input.reshape(input.shape[0], num_groups, -1)
    x = _standardized(grouped, [-1], eps).reshape(input.shape)
    return _affine(x, weight, bias, _per_channel(input))


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Running statistics are not updated: they belong to the user's model."""
    shape = _per_channel(input)
    if training:
        x = _standardized(input, [i for i in range(input.dim()) if i != 1], eps)
    else:
        assert running_mean is not None
        assert running_var is not None
        x = (input - running_mean.reshape(shape)) * (running_var.reshape(shape) + eps).rsqrt()
    return _affine(x, weight, bias, shape)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    x = _standardized(input, list(range(2, input.dim())), eps)
    return _affine(x, weight, bias, _per_channel(input))


def _per_channel(x: Tensor) -> tuple[int, ...]:
    return (1, -1, *[1] * (x.dim() - 2))


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """g v / |v|, the norm over every axis but ``dim`` (all of them for -1)."""
    dims = [i for i in range(v.dim()) if dim == -1 or i != dim % v.dim()]
    return v * (g * v.square().sum(dims, keepdim=True).rsqrt())


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(Q K^T scale + mask) V; ``dropout_p`` is 0 in every call that has a derivative."""
    if dropout_p:
        return F.dropout(
            scaled_dot_product_attention(query, key, value, attn_mask, 0.0, is_causal, scale, enable_gqa), dropout_p
        )
    if enable_gqa:
        key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
        value = value.repeat_interleave(query.size(-3) // value.size(-3), -3)
    scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    scores = (query * scale) @ key.transpose(-2, -1)
    if is_causal:
        keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~keep, -torch.inf)
    if attn_mask is not None:
        masked = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if masked else scores + attn_mask
        nothing = (scores == -torch.inf).all(
            -1, keepdim=True
        )  # rows masked in full: zeros, as torch's own kernels give
        return scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0) @ value
    return scores.softmax(-1) @ value


def normalize(input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Tensor | None = None) -> Tensor:
    """x / max(|x|, eps). The norm has a kink at zero that the maximum hides, where torch's second derivative is NaN."""
    if p != 2 or out is not None:
        return F.normalize(input, p, dim, eps, out)
    square = input.square().sum(dim, keepdim=True)
    zero = square == 0
    norm = square.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)
    return input / norm.clamp_min(eps)


def embedding_bag(
    input: Tensor, weight: Tensor, offsets: Tensor | None = None, max_norm: float | None = None, norm_type: float = 2,
    scale_grad_by_freq: bool = False, mode: str = "mean", sparse: bool = False,
    per_sample_weights: Tensor | None = None, include_last_offset: bool = False, padding_idx: int | None = None,
) -> Tensor:  # fmt: skip
    """Sums or means of rows of a table: torch has no second derivative of it. Other forms are left to torch."""
    if mode == "max" or max_norm is not None or padding_idx is not None:
        return F.embedding_bag(
            input, weight, offsets, max_norm, norm_type, scale_grad_by_freq, mode, sparse, per_sample_weights,
            include_last_offset, padding_idx,
        )  # fmt: skip
    if input.dim() == 2:
        offsets = torch.arange(0, input.numel(), input.shape[1], device=input.device)
    assert offsets is not None
    starts = offsets[:-1] if include_last_offset and input.dim() == 1 else offsets
    bag = torch.searchsorted(starts, torch.arange(input.numel(), device=input.device), right=True) - 1
    rows = weight[input.flatten()]
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.flatten()[:, None]
    total = rows.new_zeros(len(starts), weight.shape[1]).index_add(0, bag, rows)
    if mode == "sum":
        return total
    counts = torch.bincount(bag, minlength=len(starts)).clamp(min=1)
    return total / counts[:, None]


_REPLACEMENTS: dict[Any, Callable[..., Tensor]] = {
    F.layer_norm: layer_norm,
    torch.layer_norm: lambda x, s, w=None, b=None, eps=1e-5, cudnn=True: layer_norm(x, s, w, b, eps),
    F.rms_norm: rms_norm,
    torch.rms_norm: rms_norm,
    F.group_norm: group_norm,
    torch.group_norm: lambda x, n, w=None, b=None, eps=1e-5, cudnn=True: group_norm(x, n, w, b, eps),
    F.batch_norm: batch_norm,
    torch.batch_norm: lambda x, w, b, mean, var, training, momentum, eps, cudnn: batch_norm(
        x, mean, var, w, b, training, momentum, eps
    ),
    F.instance_norm: instance_norm,
    torch.instance_norm: lambda x, w, b, mean, var, use, momentum, eps, cudnn: instance_norm(
        x, mean, var, w, b, use, momentum, eps
    ),
    F.scaled_dot_product_attention: scaled_dot_product_attention,
    F.normalize: normalize,
    torch._weight_norm: weight_norm,
    F.embedding_bag: embedding_bag,
}
_RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}
