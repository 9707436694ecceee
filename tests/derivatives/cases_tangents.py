"""Architectures and losses for the tests of the engine, and an oracle that shares no code with it.

The oracle is the paper's recursion: nested reverse mode over eta, with norms, attention and squared error written in
primitives, because torch's own higher derivatives of those are wrong or missing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from hoanalysis import models
from hoanalysis.derivatives.common import displaced
from hoanalysis.partitions import Partition
from hoanalysis.problem import Problem, State


def _layer_norm(x, shape, weight=None, bias=None, eps=1e-5):
    axes = tuple(range(-len(shape), 0))
    c = x - x.mean(axes, keepdim=True)
    y = c / ((c * c).mean(axes, keepdim=True) + eps).sqrt()
    return (y if weight is None else y * weight) + (0 if bias is None else bias)


def _channels(y, weight, bias):
    shape = [1, -1] + [1] * (y.dim() - 2)
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def _batch_norm(x, mean, var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    shape, axes = [1, -1] + [1] * (x.dim() - 2), [0, *range(2, x.dim())]
    if training:
        mean = x.mean(axes)
        var = ((x - mean.view(shape)) ** 2).mean(axes)
    return _channels((x - mean.view(shape)) / (var.view(shape) + eps).sqrt(), weight, bias)


def _group_norm(x, groups, weight=None, bias=None, eps=1e-5):
    parts = x.reshape(len(x), groups, -1)
    return _channels(_layer_norm(parts, parts.shape[-1:], eps=eps).reshape(x.shape), weight, bias)


def _instance_norm(x, running_mean=None, running_var=None, weight=None, bias=None, *_, **__):
    return _group_norm(x, x.shape[1], weight, bias)


def _weight_norm(v, g, dim=0):
    return v * (g / (v * v).sum([i for i in range(v.dim()) if i != dim], keepdim=True).sqrt())


def _attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    scores = torch.einsum("...qd,...kd->...qk", q, k) / math.sqrt(q.shape[-1])
    if is_causal:
        scores = scores + torch.full(scores.shape[-2:], -math.inf, dtype=q.dtype).triu(1)
    if attn_mask is None:
        e = (scores - scores.detach().amax(-1, keepdim=True)).exp()
        return torch.einsum("...qk,...kd->...qd", e / e.sum(-1, keepdim=True), v)
    allowed = attn_mask if attn_mask.dtype == torch.bool else attn_mask > -math.inf
    scores = scores if attn_mask.dtype == torch.bool else scores + attn_mask.where(allowed, 0.0)
    e = scores.exp() * allowed
    return torch.einsum("...qk,...kd->...qd", e / e.sum(-1, keepdim=True).where(allowed.any(-1, keepdim=True), 1.0), v)


def _mse(x, y, size_average=None, reduce=None, reduction="mean", weight=None):
    return ((x - y) * (x - y)).mean()


def _normalize(x, p=2.0, dim=1, eps=1e-12, out=None):
    zero = (x == 0).all(dim, keepdim=True)  # moving a zero vector is moving 0 / eps; here none of them moves
    return x / torch.where(zero, 1.0, (torch.where(zero, 1.0, x) ** 2).sum(dim, keepdim=True).sqrt())


class Primitives(TorchFunctionMode):
    """Norms, attention and squared error in primitives."""

    replaced = {  # noqa: RUF012
        F.layer_norm: _layer_norm,
        F.batch_norm: _batch_norm,
        F.group_norm: _group_norm,
        F.instance_norm: _instance_norm,
        torch._weight_norm: _weight_norm,
        F.embedding_bag: lambda index, weight, *_, **__: weight[index].sum(1),
        F.scaled_dot_product_attention: _attention,
        F.mse_loss: _mse,
        F.normalize: _normalize,
    }

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.multi_head_attention_forward:
            with sdpa_kernel(SDPBackend.MATH):
                return func(*args, **(kwargs or {}))
        return self.replaced.get(func, func)(*args, **(kwargs or {}))


def nested(
    problem: Problem, state: State, u: dict[str, Tensor], partition: Partition, batch: Any, c: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """D1, D2, and D3 contracted once with ``c``, by nested reverse mode: 2 S backward passes.

    A symmetric tensor is determined by its contractions, and an error shows in a random one.
    """
    eta = torch.zeros(len(partition), dtype=torch.float64, requires_grad=True)

    def grad(y: Tensor) -> Tensor:
        if not y.requires_grad:
            return torch.zeros_like(eta)
        g = torch.autograd.grad(y, eta, create_graph=True, allow_unused=True)[0]
        return torch.zeros_like(eta) if g is None else g

    with Primitives():
        first = grad(problem.batch_value(displaced(state.parameters, u, partition, eta), state, batch))
        second = torch.stack([torch.autograd.grad(y, eta, retain_graph=True, allow_unused=True)[0] for y in first])
        third = torch.stack([grad(y) for y in grad(first @ c)])
    return first.detach(), second.detach(), third.detach()


# ---- architectures --------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two convolutions with BatchNorm and a skip; the second block halves the resolution."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out)
        self.conv2, self.norm2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False), nn.BatchNorm2d(n_out)
        self.skip = nn.Identity() if stride == 1 else nn.Conv2d(n_in, n_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.skip(x))


def resnet() -> nn.Module:
    stem = [nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)]
    net = nn.Sequential(
        *stem, Residual(4, 4, 1), Residual(4, 6, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)
    )
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_mean, -0.3, 0.3)
            nn.init.uniform_(m.running_var, 0.5, 2)
    return net.eval()


class ViT(nn.Module):
    """Patches, a class token, one block of full attention with a GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.position = nn.Parameter(torch.randn(1, 5, 8))
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        q, k, v = (t.view(len(x), 5, 2, 4).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head((x + self.mlp(self.norm2(x)))[:, 0])


class CrossAttention(nn.Module):
    """Queries from one half of the input, keys and values from the other, each through layers of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 8, bias=False))
        self.key, self.value = nn.Linear(4, 8), nn.Linear(4, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.query(x[:, 0]), self.key(x[:, 1, :5]), self.value(x[:, 1, :5])
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k, v))
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril(2)
        return self.head(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2).mean(1))


class Masked(nn.Module):
    """Attention with a mask that leaves some positions nothing to look at, of words or of numbers that are added."""

    def __init__(self, added: bool) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 5)
        allowed = torch.rand(9, 9) > 0.3
        allowed[[0, 1, 2, 3, 6]] = False
        allowed[:, 4] = False
        mask = torch.randn(9, 9).masked_fill(~allowed, -math.inf) if added else allowed
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        return self.head(y.transpose(1, 2).flatten(2).sum(1))


class Gated(nn.Module):
    """Attention whose queries, keys and values are each used once more, between the scores and the output."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        scores = q @ k.mT
        gates = torch.sigmoid(q) + torch.tanh(k) * torch.cos(v)
        return self.head((gates * (scores.softmax(-1) @ v)).transpose(1, 2).flatten(2).sum(1))


class Directions(nn.Module):
    """Only the directions of hidden vectors count, some of which are zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.normalize(self.first(x) * (torch.arange(len(x)) % 3 > 0)[:, None], dim=-1))


class Autoencoder(nn.Module):
    """Convolutions down, transposed convolutions up."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, 3, 3, 2, 1), nn.Tanh(), nn.Conv2d(3, 4, 3, 2, 1), nn.SiLU())
        self.up = nn.Sequential(
            nn.ConvTranspose2d(4, 3, 2, 2), nn.LeakyReLU(0.1), nn.ConvTranspose2d(3, 1, 2, 2), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


class Tied(nn.Module):
    """One weight three times: twice directly, once transposed and rescaled."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.g = nn.Parameter(torch.randn(5, 5) / 2), nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x @ self.w)
        x = torch.tanh(F.linear(x, self.w * self.g.exp()[:, None]))
        return x @ (self.w.T / 2.0)


@dataclass
class Case:
    """A model with one batch and a loss, built under a fixed seed in float64."""

    model: nn.Module
    batch: Any
    loss: Callable
    partition: Partition | None = None

    def ready(self) -> tuple[Problem, State, dict[str, Tensor], Partition]:
        # how batches are weighted does not matter to the derivatives of one
        problem = Problem(self.model, [self.batch], loss=self.loss, batch_size=lambda _: 1.0)
        state = problem.state()
        direction = {n: torch.randn_like(p) for n, p in state.parameters.items()}
        return problem, state, direction, self.partition or Partition.canonical(self.model)


def _images(n: int, channels: int, size: int, classes: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, channels, size, size), torch.randint(0, classes, (n,))


def _tokens(vocabulary: int, n: int, length: int) -> tuple[Tensor, Tensor]:
    return torch.randint(0, vocabulary, (n, length)), torch.randint(0, vocabulary, (n, length))


def _mlp(activation: str, parameterization: str = "standard") -> Case:
    model = models.MLP([5, 7, 6, 4], activation, parameterization)
    return Case(model, (torch.randn(9, 5), torch.randint(0, 4, (9,))), F.cross_entropy)


def _autoencoder() -> Case:
    x = torch.rand(3, 1, 8, 8)
    return Case(Autoencoder(), (x, x), F.mse_loss)


def _gpt() -> Case:
    model = models.GPT(7, 6, 2, 2, 8, tie=True)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return Case(model, _tokens(7, 2, 6), models.cross_entropy_tokens)


ARCHITECTURES: dict[str, Callable[[], Case]] = {
    "mlp tanh": lambda: _mlp("tanh"),
    "mlp relu": lambda: _mlp("relu"),
    "mlp gelu": lambda: _mlp("gelu"),
    "mlp tanh ntk": lambda: _mlp("tanh", "ntk"),
    "lenet": lambda: Case(models.LeNet5(), _images(3, 1, 32, 10), F.cross_entropy),
    "vgg narrow": lambda: Case(models.VGG11Prime(width=1 / 64), _images(4, 3, 32, 10), F.cross_entropy),
    "resnet": lambda: Case(resnet(), _images(3, 3, 8, 5), F.cross_entropy),
    "resnet train": lambda: Case(resnet().train(), _images(3, 3, 8, 5), F.cross_entropy),
    "vit": lambda: Case(ViT(), _images(3, 3, 8, 5), F.cross_entropy),
    "gpt tied": _gpt,
    "cross attention": lambda: Case(
        CrossAttention(), (torch.randn(3, 2, 7, 4), torch.randint(0, 5, (3,))), F.cross_entropy
    ),
    "masked in full": lambda: Case(
        Masked(added=False), (torch.randn(3, 9, 4), torch.randint(0, 5, (3,))), F.cross_entropy
    ),
    "masked in full, added": lambda: Case(
        Masked(added=True), (torch.randn(3, 9, 4), torch.randint(0, 5, (3,))), F.cross_entropy
    ),
    "gated attention": lambda: Case(Gated(), (torch.randn(3, 7, 4), torch.randint(0, 5, (3,))), F.cross_entropy),
    "directions": lambda: Case(Directions(), (torch.randn(7, 4), torch.randint(0, 5, (7,))), F.cross_entropy),
    "autoencoder": _autoencoder,
    "tied": lambda: Case(Tied(), (torch.randn(4, 5), torch.randn(4, 5)), F.mse_loss),
    "group norm": lambda: Case(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(144, 5)),
        _images(3, 3, 8, 5),
        F.cross_entropy,
    ),
}


# ---- losses ---------------------------------------------------------------------------------------------------------

_WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.3], dtype=torch.float64)


def _classes(masked: bool = False) -> Tensor:
    y = torch.randint(0, 4, (9,))
    return torch.where(torch.arange(9) % 3 == 0, -100, y) if masked else y


def _log_softmax_nll(x: Tensor, y: Tensor) -> Tensor:
    return F.nll_loss(F.log_softmax(x, 1), y, weight=_WEIGHT)


def _over_a_count(x: Tensor, y: Tensor) -> Tensor:
    kept = y != -100
    return (F.cross_entropy(x, y, reduction="none") * kept).sum() / kept.sum()


LOSSES: dict[str, tuple[Callable, Callable[[], Tensor]]] = {
    "over a count": (_over_a_count, lambda: _classes(True)),
    "ignore_index": (F.cross_entropy, lambda: _classes(True)),
    "class weights": (functools.partial(F.cross_entropy, weight=_WEIGHT), _classes),
    "label smoothing": (functools.partial(F.cross_entropy, label_smoothing=0.2), lambda: _classes(True)),
    "smoothing, weights": (
        functools.partial(F.cross_entropy, weight=_WEIGHT, label_smoothing=0.2),
        lambda: _classes(True),
    ),
    "probabilities": (
        functools.partial(F.cross_entropy, weight=_WEIGHT, label_smoothing=0.1),
        lambda: torch.rand(9, 4).softmax(1),
    ),
    "sum": (functools.partial(F.cross_entropy, reduction="sum"), _classes),
    "mse": (F.mse_loss, lambda: torch.randn(9, 4)),
    "bce with logits": (
        functools.partial(F.binary_cross_entropy_with_logits, pos_weight=_WEIGHT),
        lambda: torch.rand(9, 4),
    ),
    "nll": (_log_softmax_nll, _classes),
    "huber": (functools.partial(F.huber_loss, delta=0.7), lambda: torch.randn(9, 4)),
}


def loss_case(name: str) -> Case:
    loss, target = LOSSES[name]
    return Case(models.MLP([5, 6, 4], "tanh"), (torch.randn(9, 5), target()), loss)
