"""Small reference networks: LeNet5, VGG11Prime, MLP and a GPT, with readable parameter names.

Two parameterizations of a linear or convolutional layer with weight W, bias b and fan-in n::

    standard:  y =           W x + b,   W ~ N(0, gain^2 / n)
    ntk:       y = gain/sqrt(n) W x + b,   W ~ N(0, 1)

(Jacot et al. 2018; the two are compared in the experiments of arXiv 2312.03885.) Biases start at zero in both. The gain
is sqrt(2) in front of a ReLU (He et al. 2015) or a GELU and 1 elsewhere. A standard layer with weight gain/sqrt(n) W is
the same function as an ntk layer with weight W; only the gradients, and so the learning rates, differ. Both draw their
weights in the same order, so under one seed both start as the same function. Seeding is the caller's:
``torch.manual_seed``.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hoanalysis.errors import ModelError, nearest

ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "relu": (F.relu, math.sqrt(2)),
    "tanh": (torch.tanh, 1.0),
    "gelu": (F.gelu, math.sqrt(2)),
    "identity": (lambda x: x, 1.0),
}
PARAMETERIZATIONS = ("standard", "ntk")


class NTKLinear(nn.Linear):
    """y = scale W x + b; the input is scaled, so that W stays a plain factor of a product."""

    scale = 1.0

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(self.scale * input, self.weight, self.bias)


class NTKConv2d(nn.Conv2d):
    """y = scale W * x + b, with * the convolution; the input is scaled."""

    scale = 1.0

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(self.scale * input, self.weight, self.bias)


def _choose(name: str, options: Sequence[str], what: str) -> str:
    if name not in options:
        raise ModelError(f"there is no {what} {name!r}", do=nearest(str(name), options))
    return name


def _activation(name: str) -> tuple[Callable[[Tensor], Tensor], float]:
    return ACTIVATIONS[_choose(name, tuple(ACTIVATIONS), "activation")]


def _initialise(layer: nn.Linear | nn.Conv2d, gain: float) -> None:
    """Draw the weight as the module's docstring says, and zero the bias."""
    scale = gain / math.sqrt(layer.weight[0].numel())
    if isinstance(layer, NTKLinear | NTKConv2d):
        layer.scale, scale = scale, 1.0
    nn.init.normal_(layer.weight, std=scale)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _linear(n_in: int, n_out: int, gain: float, parameterization: str) -> nn.Linear:
    ntk = _choose(parameterization, PARAMETERIZATIONS, "parameterization") == "ntk"
    layer = (NTKLinear if ntk else nn.Linear)(n_in, n_out)
    _initialise(layer, gain)
    return layer


def _conv(n_in: int, n_out: int, size: int, gain: float, parameterization: str, padding: int = 0) -> nn.Conv2d:
    ntk = _choose(parameterization, PARAMETERIZATIONS, "parameterization") == "ntk"
    layer = (NTKConv2d if ntk else nn.Conv2d)(n_in, n_out, size, padding=padding)
    _initialise(layer, gain)
    return layer


class MLP(nn.Module):
    """A multilayer perceptron: ``sizes`` = (inputs, hidden..., outputs), the activation after every layer but the last.

    Images are flattened. S = 2 (len(sizes) - 1): ``layers.0.weight``, ``layers.0.bias``, ...
    """

    def __init__(self, sizes: Sequence[int], activation: str = "tanh", parameterization: str = "standard") -> None:
        super().__init__()
        if len(sizes) < 2:
            raise ModelError(
                f"an MLP needs at least two sizes, and got {list(sizes)}", do="sizes=(inputs, ..., outputs)"
            )
        self.activation, gain = _activation(activation)
        gains = [gain] * (len(sizes) - 2) + [1.0]
        self.layers = nn.ModuleList(
            _linear(n_in, n_out, g, parameterization)
            for (n_in, n_out), g in zip(itertools.pairwise(sizes), gains, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


class LeNet5(nn.Module):
    """LeNet-5 for 32x32 images (LeCun et al. 1998, with max-pooling). S = 10, 61,706 parameters for one channel.

    conv 6@5x5, pool, conv 16@5x5, pool, fully connected 120, 84, ``n_classes``; channels and units times ``width``.
    """

    def __init__(
        self,
        in_channels: int = 1,
        n_classes: int = 10,
        activation: str = "relu",
        parameterization: str = "standard",
        width: float = 1.0,
    ) -> None:
        super().__init__()
        self.activation, gain = _activation(activation)
        c1, c2, n1, n2 = (max(1, round(width * c)) for c in (6, 16, 120, 84))
        self.conv1 = _conv(in_channels, c1, 5, gain, parameterization)
        self.conv2 = _conv(c1, c2, 5, gain, parameterization)
        self.fc1 = _linear(c2 * 5 * 5, n1, gain, parameterization)
        self.fc2 = _linear(n1, n2, gain, parameterization)
        self.fc3 = _linear(n2, n_classes, 1.0, parameterization)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.activation(self.conv1(x)), 2)
        x = F.max_pool2d(self.activation(self.conv2(x)), 2).flatten(1)
        x = self.activation(self.fc1(x))
        x = self.activation(self.fc2(x))
        return self.fc3(x)


class VGG11Prime(nn.Module):
    """VGG-11' of the paper for 32x32 images: VGG-11 with one fully connected layer and no batch norm. S = 18.

    Eight convolutions 3x3, He-initialised, with 64, 128, 256, 256, 512, 512, 512, 512 channels times ``width``,
    max-pooling after the 1st, 2nd, 4th, 6th and 8th.
    """

    CHANNELS = (64, 128, 256, 256, 512, 512, 512, 512)
    POOLED = (0, 1, 3, 5, 7)

    def __init__(
        self,
        in_channels: int = 3,
        n_classes: int = 10,
        width: float = 1.0,
        activation: str = "relu",
        parameterization: str = "standard",
    ) -> None:
        super().__init__()
        self.activation, gain = _activation(activation)
        channels = [in_channels, *(max(1, round(width * c)) for c in self.CHANNELS)]
        self.convs = nn.ModuleList(
            _conv(n_in, n_out, 3, gain, parameterization, padding=1) for n_in, n_out in itertools.pairwise(channels)
        )
        self.fc = _linear(channels[-1], n_classes, 1.0, parameterization)

    def forward(self, x: Tensor) -> Tensor:
        for i, conv in enumerate(self.convs):
            x = self.activation(conv(x))
            if i in self.POOLED:
                x = F.max_pool2d(x, 2)
        return self.fc(x.flatten(1))


class CausalAttention(nn.Module):
    """Multi-head self-attention in which a token sees itself and those before it; one fused projection to q, k, v."""

    def __init__(self, width: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.projection(attended.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)) with a GELU and four times the width. 12 tensors."""

    def __init__(self, width: int, n_head: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = CausalAttention(width, n_head)
        self.norm2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.contract(F.gelu(self.expand(self.norm2(x))))


class GPT(nn.Module):
    """A pre-LN decoder: tokens (B, T) -> logits (B, T, V), T <= ``context``, without dropout.

    Token and position embeddings, ``n_layer`` blocks, a final LayerNorm and a head without bias:
    S = 2 + 12 n_layer + 2 + 1, or one less with ``tie``, where the head is the token embedding. Weights and embeddings
    are N(0, 0.02^2); the projections that write to the residual stream are divided by sqrt(2 n_layer), as in GPT-2.
    """

    def __init__(self, vocab_size: int, context: int, n_layer: int, n_head: int, width: int, tie: bool = False) -> None:
        super().__init__()
        if width % n_head:
            raise ModelError(f"the width {width} is not a multiple of the {n_head} heads")
        self.context = context
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.position_embedding = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, n_head) for _ in range(n_layer))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)
        if tie:
            self.head.weight = self.token_embedding.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("projection.weight", "contract.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * n_layer) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        T = tokens.shape[1]
        if self.context < T:
            raise ModelError(f"the window has {T} tokens, and this GPT was built for context={self.context}")
        x = self.token_embedding(tokens) + self.position_embedding(torch.arange(T, device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def cross_entropy_tokens(logits: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy in nats, a mean over all tokens: logits (B, T, V), targets (B, T).

    Windows have equal lengths, so this is also the mean over windows of each window's mean.
    """
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())
