"""Independent ways to the same derivatives. Nothing here is shared with the engines.

``by_forward_mode``   torch.func: jacfwd(.. jacfwd(grad(f)))          any model whose operations torch gets right
``by_polynomial_fit`` first-order gradients at Chebyshev points        smooth models; no higher autodiff at all
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.polynomial import chebyshev, polynomial
from torch import Tensor
from torch.func import functional_call, grad, jacfwd


def along_groups(
    loss_of: Callable[[Mapping[str, Tensor]], Tensor],
    parameters: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
    groups: list[list[str]],
) -> Callable[[Tensor], Tensor]:
    """f(eta) = L(theta + sum_s eta_s U^s) for whole-tensor groups given as lists of names."""

    def f(eta: Tensor) -> Tensor:
        moved = dict(parameters)
        for s, names in enumerate(groups):
            for n in names:
                moved[n] = parameters[n] + eta[s] * direction[n]
        return loss_of(moved)

    return f


def model_loss(model: torch.nn.Module, x: Tensor, y: Tensor, loss: Callable) -> Callable:
    """L of a plain (model, x, y), for `along_groups`."""
    return lambda parameters: loss(functional_call(model, dict(parameters), (x,)), y)


def by_forward_mode(f: Callable[[Tensor], Tensor], s: int, order: int) -> list[Tensor]:
    """[D1, .., D^order] at 0, by one reverse and then forward sweeps."""
    eta, out, fn = torch.zeros(s, dtype=torch.float64), [], grad(f)
    for _ in range(order):
        out.append(fn(eta))
        fn = jacfwd(fn)
    return out


def by_polynomial_fit(f: Callable[[Tensor], Tensor], c: Tensor, order: int, radius: float, points: int = 24) -> Tensor:
    """d^k/dt^k f(t c) at 0 for k = 1..order, fitted to first derivatives at Chebyshev points of [-radius, radius]."""
    t = radius * chebyshev.chebpts1(points)
    slopes = []
    for value in t:
        at = torch.tensor(float(value), dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(f(at * c), at)
        slopes.append(float(slope))
    fitted = polynomial.Polynomial(chebyshev.cheb2poly(chebyshev.chebfit(t / radius, slopes, points - 1)))
    return torch.tensor([float(fitted.deriv(k)(0.0)) / radius**k if k else float(fitted(0.0)) for k in range(order)])


def contracted(tensor: Tensor, c: Tensor) -> Tensor:
    """sum over all indices of D[s1..sd] c_s1 .. c_sd."""
    for _ in range(tensor.dim()):
        tensor = tensor @ c
    return tensor


def random_like(tensors: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """A direction of normal entries, scaled to the size of each tensor's entries so that no order dominates."""
    g = torch.Generator().manual_seed(seed)
    return {n: 0.3 * torch.randn(t.shape, generator=g, dtype=torch.float64) for n, t in tensors.items()}


def weighted(values: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error of batches (first axis) by the formula of the schema, in plain numpy."""
    n = len(weights)
    w = weights.reshape(-1, *[1] * (values.ndim - 1))
    mean = (w * values).sum(0) / w.sum()
    return mean, np.sqrt(n / (n - 1) * (w**2 * (values - mean) ** 2).sum(0)) / weights.sum()
