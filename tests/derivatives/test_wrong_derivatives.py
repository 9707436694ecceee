"""Where PyTorch's own higher derivatives are wrong or missing: the true value, what torch gives, what we give.

Run with ``-s`` to see the table. On the torch version that CI pins, every row must still be wrong in torch; on another
version a row may have been repaired, which is fine, while what we give must be right on all of them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp
from torch.nn.utils.parametrizations import weight_norm

import hoanalysis as ho
from tests import oracles
from tests.cases import WrittenLayerNorm

ORDER = 3


class Written(nn.Module):
    """The definition of an operation, as a function of x and the module's own parameters."""

    def __init__(self, parameters: dict[str, Tensor], fn: Callable[..., Tensor]) -> None:
        super().__init__()
        for name, p in parameters.items():
            self.register_parameter(name.replace(".", "_"), nn.Parameter(p.detach().clone()))
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x, *self.parameters())


def standardized(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    away = x - x.mean(dims, keepdim=True)
    return away / torch.sqrt((away * away).mean(dims, keepdim=True) + 1e-5)


def channels(v: Tensor) -> Tensor:
    return v.reshape(1, -1, 1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Parameter(0.5 * torch.randn(3, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = ((x @ w).unsqueeze(1) for w in self.qkv)  # (batch, heads, positions, width), as the fast kernel asks
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)


def written_attention(x: Tensor, qkv: Tensor) -> Tensor:
    q, k, v = (x @ w for w in qkv)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    weights = torch.exp(scores - scores.amax(-1, keepdim=True).detach()) * torch.ones(scores.shape[-2:]).tril()
    return weights / weights.sum(-1, keepdim=True) @ v


class MultiheadAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def written_multihead_attention(x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor) -> Tensor:
    heads = []
    for h in range(2):
        q, k, v = (
            x @ w[2 * h : 2 * h + 2].T + b[2 * h : 2 * h + 2] for w, b in zip(w_in.chunk(3), b_in.chunk(3), strict=True)
        )
        scores = q @ k.transpose(-1, -2) / math.sqrt(2)
        weights = torch.exp(scores - scores.amax(-1, keepdim=True).detach())
        heads.append(weights / weights.sum(-1, keepdim=True) @ v)
    return torch.cat(heads, -1) @ w_out.T + b_out


class LastOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


def written_lstm(x: Tensor, wi: Tensor, wh: Tensor, bi: Tensor, bh: Tensor) -> Tensor:
    h = c = x.new_zeros(x.shape[0], 4)
    out = []
    for t in range(x.shape[1]):
        i, f, g, o = (x[:, t] @ wi.T + bi + h @ wh.T + bh).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        out.append(h)
    return torch.stack(out, 1)


def written_weight_norm(x: Tensor, bias: Tensor, g: Tensor, v: Tensor) -> Tensor:
    return x @ (g * v / torch.sqrt((v * v).sum(1, keepdim=True))).T + bias


@dataclass
class Row:
    module: Callable[[], nn.Module]
    written: Callable[..., Tensor]
    how: str  # torch's mode that fails
    fails_at: int  # the order that is looked at
    torch_gives: str  # "wrong", "raises", or "right" on this device
    dtype: torch.dtype = torch.float64  # of torch's attempt; the mkldnn kernels are for float32


LAYER_NORM = Row(lambda: nn.LayerNorm(4), lambda x, w, b: standardized(x, (-1,)) * w + b, "reverse", 3, "wrong")
INSTANCE_NORM = Row(
    lambda: nn.InstanceNorm1d(3, affine=True),
    lambda x, w, b: standardized(x, (2,)) * channels(w) + channels(b), "reverse", 3, "wrong",
)  # fmt: skip
BATCH_NORM = Row(
    lambda: nn.BatchNorm1d(3),
    lambda x, w, b: standardized(x, (0, 2)) * channels(w) + channels(b), "reverse", 3, "wrong",
)  # fmt: skip
LSTM = Row(LastOutput, written_lstm, "jvp of jvp", 1, "raises", torch.float32)

ROWS = {
    "layer_norm": LAYER_NORM,
    "layer_norm, forward over forward": replace(LAYER_NORM, how="jvp of jvp", fails_at=2),
    "layer_norm, forward over jacrev": replace(LAYER_NORM, how="jvp of jacrev", fails_at=2),
    "instance_norm": INSTANCE_NORM,
    "instance_norm, forward over jacrev": replace(INSTANCE_NORM, how="jvp of jacrev", fails_at=2),
    "batch_norm, training": BATCH_NORM,
    "batch_norm, training, forward over jacrev": replace(
        BATCH_NORM, how="jvp of jacrev", fails_at=2, torch_gives="raises"
    ),
    "weight_norm": Row(lambda: weight_norm(nn.Linear(4, 4)), written_weight_norm, "reverse", 2, "wrong"),
    "attention": Row(Attention, written_attention, "reverse", 2, "raises"),
    "multihead attention": Row(MultiheadAttention, written_multihead_attention, "reverse", 2, "raises"),
    "lstm": LSTM,
    "lstm, reverse": replace(LSTM, how="reverse", fails_at=3, torch_gives="right"),
}


def along(
    model: nn.Module, first: nn.Module, head: nn.Module, u: dict[str, Tensor], x: Tensor, dtype=torch.float64
) -> Callable:
    """t -> loss of head(model(first(x))) moved by t u: the operation has moving inputs and moving parameters."""
    parts = {"first": first, "model": model, "head": head}
    theta = {f"{k}.{n}": p.detach().to(dtype) for k, m in parts.items() for n, p in m.named_parameters()}

    def f(t: Tensor) -> Tensor:
        moved = {n: p + t * v.to(dtype) for (n, p), v in zip(theta.items(), u.values(), strict=True)}
        out = x.to(dtype)
        for part, module in parts.items():
            own = {n.removeprefix(f"{part}."): p for n, p in moved.items() if n.startswith(f"{part}.")}
            out = functional_call(module, own, (out,))
        return torch.tanh(out).square().mean()

    return f


def nested_reverse(f: Callable[[Tensor], Tensor], order: int = ORDER) -> list[float]:
    t = torch.zeros((), requires_grad=True)
    value, out = f(t), []
    for _ in range(order):
        (value,) = torch.autograd.grad(value, t, create_graph=True)
        out.append(float(value.detach()))
    return out


def nested_forward(f: Callable[[Tensor], Tensor], order: int) -> list[float]:
    def derivative(g: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda t: jvp(g, (t,), (torch.ones_like(t),))[1]

    out, g = [], f
    for _ in range(order):
        g = derivative(g)
        out.append(float(g(torch.zeros(()))))
    return out


def forward_over_jacrev(f: Callable[[Tensor], Tensor], order: int) -> list[float]:
    assert order == 2
    t = torch.zeros(())
    return [float(x) for x in jvp(jacrev(f), (t,), (torch.ones_like(t),))]


MODES = {"reverse": nested_reverse, "jvp of jvp": nested_forward, "jvp of jacrev": forward_over_jacrev}


def by_torch(how: str, f: Callable[[Tensor], Tensor], order: int) -> list[float] | str:
    try:
        return MODES[how](f, order)
    except (RuntimeError, NotImplementedError) as error:
        return f"raises {type(error).__name__}"


def verdict(given: list[float] | str, truth: list[float], order: int) -> str:
    if isinstance(given, str):
        return "raises"
    return "wrong" if abs(given[order - 1] - truth[order - 1]) > 1e-5 * abs(truth[order - 1]) else "right"


class Chain(nn.Module):
    def __init__(self, first: nn.Module, model: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.first, self.model, self.head = first, model, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.model(self.first(x)))


def tanh_square(out: Tensor, _: Tensor) -> Tensor:
    return torch.tanh(out).square().mean()


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("engine", ["nested", "tangents"])
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.row("M3")
def test_we_are_right_where_torch_is_not(name: str, engine: str) -> None:
    row = ROWS[name]
    torch.manual_seed(3)
    first, model, head = nn.Linear(4, 4), row.module(), nn.Linear(4, 4)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    written = Written(dict(model.named_parameters()), row.written)
    x = torch.randn(5, 3, 4)
    chain = Chain(first, model, head)
    u = oracles.random_like(dict(chain.named_parameters()), 11)
    ordered = {n: u[n] for part in ("first", "model", "head") for n in u if n.startswith(part)}

    truth = nested_reverse(along(written, first, head, ordered, x))
    given = by_torch(row.how, along(model, first, head, ordered, x, row.dtype), row.fails_at)
    torch_says = verdict(given, truth, row.fails_at)

    problem = ho.Problem(chain, [(x, torch.zeros(5))], tanh_square, batch_size=lambda b: len(b[0]))
    ds = ho.summarize(problem, 3, direction=u, engine=engine, progress=False)
    ours = [float(ds[f"D{d}"].sum()) for d in (1, 2, 3)]

    shown = given if isinstance(given, str) else f"{given[-1]:.6g}"
    print(f"\n{name:42} order {row.fails_at}  true {truth[row.fails_at - 1]:.6g}  torch ({row.how}) {shown}"
          f"  ours {ours[row.fails_at - 1]:.6g} ({ds.engine.item()})")  # fmt: skip
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(truth), rtol=1e-9, atol=1e-12)
    assert float(ds.self_check) < 1e-9
    assert ds.engine.item() == engine
    if torch.__version__.startswith("2.13."):
        assert torch_says == row.torch_gives


def test_mse_loss_under_forward_over_reverse() -> None:
    """F.mse_loss(reduction="mean") raises under jvp(grad); its derivatives here are those of the written mean."""
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(6, 3), torch.randn(6, 2)
    theta = {n: p.detach() for n, p in model.named_parameters()}
    u = oracles.random_like(theta, 5)
    f = oracles.along_groups(
        oracles.model_loss(model, x, y, lambda a, b: ((a - b) ** 2).mean()), theta, u, [[n] for n in theta]
    )
    truth = oracles.by_forward_mode(f, len(theta), 3)
    raw = oracles.along_groups(oracles.model_loss(model, x, y, F.mse_loss), theta, u, [[n] for n in theta])
    if torch.__version__.startswith("2.13."):
        with pytest.raises(RuntimeError):
            jvp(grad(raw), (torch.zeros(len(theta)),), (torch.ones(len(theta)),))
    ds = ho.summarize(ho.Problem(model, [(x, y)], F.mse_loss), 3, direction=u, progress=False)
    for d in (1, 2, 3):
        torch.testing.assert_close(torch.from_numpy(ds[f"D{d}"].values), truth[d - 1], rtol=1e-10, atol=1e-13)


def test_the_written_layer_norm_of_the_cases_is_layer_norm() -> None:
    x, module, written = torch.randn(3, 6), nn.LayerNorm(6), WrittenLayerNorm(6)
    torch.testing.assert_close(written(x), module(x))
