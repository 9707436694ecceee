"""What users bring: recurrent and convolutional networks, language-model blocks, re-parameterized weights, routed
experts, graphs, and losses that couple the samples of a batch; all small, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from hoanalysis.partitions import Partition
from hoanalysis.problem import Problem, State


class Recurrent(nn.Module):
    """The last output of a recurrent layer of any kind."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.rnn = kind(3, 4, batch_first=True, **options)
        self.head = nn.Linear(4 * (2 if options.get("bidirectional") else 1), 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class UNet(nn.Module):
    """Down, up by a transposed convolution and by interpolation, and skips that are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU())
        self.down = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1), nn.GELU())
        self.bottom = nn.Sequential(
            nn.AvgPool2d(2), nn.Conv2d(6, 6, 3, padding=1), nn.Tanh(), nn.Upsample(scale_factor=2)
        )
        self.up = nn.ConvTranspose2d(12, 4, 2, 2)
        self.last = nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        down = self.down(first)
        return self.last(torch.cat([self.up(torch.cat([self.bottom(down), down], 1)), first], 1))


class ConvNeXt(nn.Module):
    """A depthwise convolution, LayerNorm over channels, an inverted bottleneck and a layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 6, 2, 2), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.norm, self.wide, self.narrow = nn.LayerNorm(6), nn.Linear(6, 12), nn.Linear(12, 6)
        self.scale, self.head = nn.Parameter(torch.full((6,), 0.7)), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        x = x + (self.scale * self.narrow(F.gelu(self.wide(y)))).permute(0, 3, 1, 2)
        return self.head(x.mean([-2, -1]))


class RMSNorm(nn.Module):
    """As language models write it out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Llama(nn.Module):
    """One block: rotary positions, grouped-query attention, SwiGLU, RMSNorm."""

    def __init__(self, width: int = 8, heads: int = 4, groups: int = 2, length: int = 5) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, width // heads
        self.embed, self.head = nn.Embedding(7, width), nn.Linear(width, 7, bias=False)
        self.q = nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(width, groups * self.size, bias=False) for _ in range(2))
        self.o = nn.Linear(width, width, bias=False)
        self.gate, self.up = (nn.Linear(width, 12, bias=False) for _ in range(2))
        self.down = nn.Linear(12, width, bias=False)
        self.norm1, self.norm2, self.norm = RMSNorm(width), RMSNorm(width), nn.RMSNorm(width)
        angle = torch.arange(length)[:, None] * torch.tensor([1.0]).repeat(self.size)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def _rotated(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * self.cos + torch.cat([-second, first], -1) * self.sin

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (-1, self.size)).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(self.heads // self.groups, dim=1) for t in (self._rotated(k), v))
        y = F.scaled_dot_product_attention(self._rotated(q), k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return self.head(self.norm(x + self.down(F.silu(self.gate(y)) * self.up(y))))


class Experts(nn.Module):
    """The best two of four experts for each sample, found by masks of data-dependent size and added up in place."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(4, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)) for _ in range(4))
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        share, chosen = self.router(x).softmax(-1).topk(2, dim=-1)
        share = share / share.sum(-1, keepdim=True)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            row, place = (chosen == i).nonzero(as_tuple=True)
            y.index_add_(0, row, share[row, place, None] * expert(x[row]))
        return self.head(x + y)


class Messages(nn.Module):
    """Two rounds of messages along the edges of a graph, by gather and scatter."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.update, self.head = nn.Linear(8, 4), nn.GRUCell(4, 4), nn.Linear(4, 5)
        self.register_buffer("source", torch.tensor([0, 1, 2, 3, 4, 0, 2]))
        self.register_buffer("target", torch.tensor([1, 2, 3, 4, 0, 3, 5]))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            m = torch.tanh(self.message(torch.cat([x[self.source], x[self.target]], 1)))
            total = torch.zeros_like(x).scatter_add(0, self.target[:, None].expand_as(m), m)
            x = self.update(total, x)
        return self.head(x)


class Reused(nn.Module):
    """The same layer over and over, until a number that depends on the weights is small."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.slope, self.mix, self.head = (
            nn.Linear(4, 4),
            nn.PReLU(4),
            nn.Bilinear(4, 4, 4),
            nn.Linear(4, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        z = x
        for _ in range(5):
            new = self.slope(self.layer(z)) / 2 + x
            if (new - z).norm() < 0.5:
                break
            z = new
        return self.head(self.mix(z, x))


class Sequence(nn.Module):
    """Convolutions over time with BatchNorm in training, and an embedding bag."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.conv, self.norm = nn.EmbeddingBag(7, 6, mode="sum"), nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.norm(self.conv(x))).amax(-1)
        return self.head(torch.cat([y, self.bag((x[:, 0].abs() * 3).long().clamp(max=6))], 1))


def normed(kind: Callable[..., nn.Module], **options: Any) -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 5))
    for m in (net[0], net[2]):
        kind(m, **options)
    return net


class Pair(nn.Module):
    """Two encoders of two views."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        self.right = nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 3))
        self.log_scale = nn.Parameter(torch.tensor(1.0))


def contrastive(model: Pair, batch: dict[str, Tensor]) -> Tensor:
    """As in CLIP: every sample against all others of the batch, with a temperature that is learned."""
    left, right = F.normalize(model.left(batch["left"]), dim=-1), F.normalize(model.right(batch["right"]), dim=-1)
    logits = model.log_scale.exp() * left @ right.T
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class VAE(nn.Module):
    """Means and log-variances of a code, and a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Sequential(nn.Linear(2, 5), nn.ELU(), nn.Linear(5, 6))


def evidence(model: VAE, batch: dict[str, Tensor]) -> Tensor:
    """Reconstruction and divergence; the noise comes with the batch."""
    mean, log_variance = model.encoder(batch["x"]).chunk(2, dim=-1)
    code = mean + batch["noise"] * (0.5 * log_variance).exp()
    divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1)
    fit = F.binary_cross_entropy_with_logits(model.decoder(code), batch["x"], reduction="none").sum(1)
    return (fit + divergence).mean()


def weighted(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Labels with weights of their own, and a margin between the right class and the best other."""
    x, y, weight = batch
    scores = model(x)
    right = scores.gather(1, y[:, None])[:, 0]
    other = scores.masked_fill(F.one_hot(y, scores.shape[1]).bool(), -math.inf).logsumexp(1)
    return (weight * F.softplus(other - right)).sum() / weight.sum()


def _pair(model: nn.Module, x: Tensor, y: Tensor, loss: Callable = F.cross_entropy) -> tuple[nn.Module, Any, Callable]:
    return model, (x, y), lambda m, b: loss(m(b[0]), b[1])


def _classes(n: int) -> Tensor:
    return torch.randint(0, 5, (n,))


def _series() -> tuple[Tensor, Tensor]:
    return torch.randn(3, 6, 3), _classes(3)


def _tokens(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


def _images(n: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, 8, 8), _classes(n)


def _rows(n: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 4), _classes(n)


def _sharp(model: nn.Module) -> nn.Module:
    """Weights large enough that nothing is nearly linear."""
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.6)
    return model


MODELS: dict[str, Callable[[], tuple[nn.Module, Any, Callable]]] = {
    "lstm": lambda: _pair(Recurrent(nn.LSTM), *_series()),
    "lstm, two layers, both ways": lambda: _pair(Recurrent(nn.LSTM, num_layers=2, bidirectional=True), *_series()),
    "gru": lambda: _pair(Recurrent(nn.GRU), *_series()),
    "rnn": lambda: _pair(Recurrent(nn.RNN), *_series()),
    "u-net": lambda: _pair(UNet(), x := torch.rand(2, 1, 8, 8), x.flip(-1), F.mse_loss),
    "convnext": lambda: _pair(ConvNeXt(), *_images()),
    "llama": lambda: _pair(_sharp(Llama()), torch.randint(0, 7, (2, 5)), torch.randint(0, 7, (2, 5)), _tokens),
    "experts": lambda: _pair(_sharp(Experts()), *_rows(8)),
    "messages": lambda: _pair(_sharp(Messages()), *_rows()),
    "reused weights": lambda: _pair(Reused(), *_rows()),
    "batch norm 1d, embedding bag": lambda: _pair(Sequence(), torch.randn(4, 3, 7), _classes(4)),
    "instance norm": lambda: _pair(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.ELU(), nn.Flatten(), nn.Linear(144, 5)),
        *_images(),
    ),
    "weight norm": lambda: _pair(normed(parametrizations.weight_norm), *_rows()),
    "spectral norm": lambda: _pair(normed(parametrizations.spectral_norm).eval(), *_rows()),
    "spectral norm, training": lambda: _pair(normed(parametrizations.spectral_norm), *_rows()),
    "multihead attention": lambda: _pair(
        nn.Sequential(
            nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), nn.Flatten(), nn.Linear(20, 5)
        ),
        torch.randn(3, 5, 4),
        _classes(3),
    ),
    "pixel shuffle": lambda: _pair(
        nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Softplus(), nn.PixelShuffle(2), nn.Hardswish()),
        torch.rand(2, 1, 4, 4),
        torch.rand(2, 1, 8, 8),
        F.smooth_l1_loss,
    ),
    "contrastive": lambda: (Pair(), {"left": torch.randn(5, 4), "right": torch.randn(5, 5)}, contrastive),
    "vae": lambda: (VAE(), {"x": torch.rand(4, 6), "noise": torch.randn(4, 2)}, evidence),
    "weighted labels": lambda: (
        nn.Sequential(nn.Linear(4, 6), nn.Mish(), nn.Linear(6, 5)),
        (*_rows(), torch.rand(6)),
        weighted,
    ),
}


def ready(name: str) -> tuple[Problem, State, dict[str, Tensor], Partition, Any]:
    """A problem of one batch, the point, a random direction, the canonical partition and the batch."""
    model, batch, loss = MODELS[name]()
    problem = Problem(model, [batch], batch_loss=loss, batch_size=lambda _: 1.0)
    state = problem.state()
    direction = {n: torch.randn_like(p) for n, p in state.parameters.items()}
    return problem, state, direction, Partition.canonical(model), batch
