"""The direction u of a step, from the gradient of one parameter and what is kept about it.

Each is a function ``fn(gradient, state) -> u`` of tensors of one shape; ``state`` is the optimizer's dictionary of this
parameter, in which it may keep what it likes. A function of the user's own is as good: that of another method, say.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hoanalysis.errors import DirectionError, nearest
from hoanalysis.optim.passes import pieces

Update = Callable[[Tensor, dict[str, Any]], Tensor]


def gradient(g: Tensor, state: dict[str, Any]) -> Tensor:
    """u = g."""
    return g


def momentum(g: Tensor, state: dict[str, Any], beta: float = 0.9) -> Tensor:
    """u = m_t / (1 - beta^t), m_t = beta m_(t-1) + (1 - beta) g_t.

    An average and not a sum, so that u has the scale of a gradient from the first step on: learning rates hold for
    several steps, and must not meet a direction that is still growing.
    """
    if "momentum_buffer" not in state:
        state |= {"step": 0, "momentum_buffer": torch.zeros_like(g)}
    state["step"] += 1
    return state["momentum_buffer"].lerp_(g, 1 - beta) / (1 - beta ** state["step"])


def adam(g: Tensor, state: dict[str, Any], betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-5) -> Tensor:
    """u = m^ / (sqrt(v^) + eps rms), rms^2 the mean of v^ over the tensor: that of `torch.optim.Adam` without its rate.

    In Adam eps is a number in units of the gradient. Here it is a share, so that the unit of a tensor does not
    matter: u is the same for a rescaled one, and its rate, which is solved for, is not.
    """
    if "exp_avg" not in state:
        state |= {"step": 0, "exp_avg": torch.zeros_like(g), "exp_avg_sq": torch.zeros_like(g)}
    state["step"] += 1
    m, v, u = state["exp_avg"], state["exp_avg_sq"], torch.empty_like(g)
    one, two = (1 - beta ** state["step"] for beta in betas)
    wide, total = torch.promote_types(g.dtype, torch.float32), 0.0
    for g_, m_, v_ in pieces(g, m, v):
        m_.lerp_(g_, 1 - betas[0])
        total += float(v_.mul_(betas[1]).addcmul_(g_, g_, value=1 - betas[1]).sum(dtype=wide))
    # (1 - beta^t) (sqrt(v^) + eps rms), and 0 / least for a tensor that has had no gradient yet
    least = one * eps * math.sqrt(total / (two * max(g.numel(), 1))) + torch.finfo(g.dtype).tiny
    for u_, m_, v_ in pieces(u, m, v):
        torch.div(m_, v_.sqrt().mul_(one / math.sqrt(two)).add_(least), out=u_)
    return u


UPDATES: dict[str, Update] = {"gradient": gradient, "momentum": momentum, "adam": adam}


def resolve(direction: str | Update) -> Update:
    """The function of a direction given by its name, or that function itself."""
    if callable(direction):
        return direction
    if direction not in UPDATES:
        raise DirectionError(
            f"there is no direction {direction!r} to train along",
            do=f"{nearest(str(direction), UPDATES)}, or pass a function of the gradient and the parameter's state",
        )
    return UPDATES[direction]
