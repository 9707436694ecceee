"""Rescaling the tensors of a model changes nothing that is said about it, and two partitions give known methods.

A model whose tensor s enters as alpha_s T_s is the same function at T_s = theta_s / alpha_s. Its gradient is alpha_s
g_s, so that along it U^s moves theta by alpha_s^2 g_s: rates go down by alpha_s^2, and the step in theta stays.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import hoanalysis as ho
from hoanalysis.analysis.regularizer import regularizer

NAMES = ["w1", "b1", "w2", "b2"]


class Scaled(nn.Module):
    """A tanh network of two layers, tensor s entering as alpha_s T_s."""

    def __init__(self, alpha: list[float]) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.alpha = dict(zip(NAMES, alpha, strict=True))
        for name, shape in zip(NAMES, [(4, 3), (4,), (3, 4), (3,)], strict=True):
            value = torch.randn(shape, generator=g, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(value / self.alpha[name]))

    def forward(self, x: Tensor) -> Tensor:
        w1, b1, w2, b2 = (self.alpha[n] * getattr(self, n) for n in NAMES)
        return torch.tanh(x @ w1.T + b1) @ w2.T + b2


def data() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(24, 3, generator=g, dtype=torch.float64), torch.randint(0, 3, (24,), generator=g)
    return [(x[i : i + 6], y[i : i + 6]) for i in range(0, 24, 6)]


def summarized(model: nn.Module, **kwargs):
    problem = ho.Problem(model, data(), F.cross_entropy)
    return ho.summarize(problem, 3, keep_batches=4, progress=False, **kwargs)


FACTORS = [np.random.default_rng(seed).uniform(0.1, 10, 4).tolist() for seed in range(3)]
STEPS = {
    "plain": lambda ds: ds.ho.learning_rates(),
    "ridge": lambda ds: ds.ho.learning_rates("ridge", 0.3),
    "r": lambda ds: ds.ho.learning_rates("r", 0.7),
    "cubic": lambda ds: ds.ho.learning_rates("cubic", 2.0),
    "taylor": lambda ds: ds.ho.taylor_step(),
}


@pytest.fixture(scope="module")
def plain():
    return summarized(Scaled([1.0] * 4))


@pytest.mark.parametrize("alpha", FACTORS)
def test_what_rescaling_tensors_leaves_unchanged(plain, alpha):
    ds, c = summarized(Scaled(alpha)), np.array(alpha) ** 2
    for name, rates in STEPS.items():
        before, after = rates(plain), rates(ds)
        for variable in ("learning_rates", "learning_rates_se"):
            size = np.abs(before[variable].values).max()
            np.testing.assert_allclose(
                after[variable].values * c, before[variable].values, rtol=1e-8, atol=1e-8 * size, err_msg=name
            )
    ratios = [regularizer(one).values / np.diag(one.D2.values) for one in (plain, ds)]
    np.testing.assert_allclose(ratios[1], ratios[0], rtol=1e-8)
    np.testing.assert_allclose(ds.ho.scale_free().values, plain.ho.scale_free().values, rtol=1e-8, atol=1e-10)
    for share in ("off_diagonal", "off_block"):
        np.testing.assert_allclose(ds.ho.shares()[share].item(), plain.ho.shares()[share].item(), rtol=1e-8)
        raw = [one.ho.shares()[f"{share}_raw"].item() for one in (plain, ds)]
        assert abs(raw[1] / raw[0] - 1) > 0.01
    before, after = plain.ho.triples(), ds.ho.triples()
    assert after.group.tolist() == before.group.tolist()
    np.testing.assert_allclose(after.scale_free, before.scale_free, rtol=1e-8)
    measures = [one.ho.curvature().condition_scale_free.item() for one in (plain, ds)]
    np.testing.assert_allclose(measures[1], measures[0], rtol=1e-8)


@pytest.mark.parametrize("how", STEPS)
def test_the_function_after_the_step_is_the_same(plain, how):
    outputs = []
    for alpha, ds in (([1.0] * 4, plain), (FACTORS[0], summarized(Scaled(FACTORS[0])))):
        model, rates = Scaled(alpha), STEPS[how](ds).learning_rates
        x, y = (torch.cat(parts) for parts in zip(*data(), strict=True))
        gradient = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        moved = {
            n: (p - float(rates.sel(group=n)) * g).detach()
            for (n, p), g in zip(model.named_parameters(), gradient, strict=True)
        }
        outputs.append(functional_call(model, moved, (x,)))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-8, atol=1e-8)
    assert (outputs[0] - Scaled([1.0] * 4)(x)).abs().max() > 1e-3


def raw_third(model: nn.Module, name: str) -> Tensor:
    """d^3 L / dT_s^3 of one tensor, all entries, by nested torch."""
    x, y = (torch.cat(parts) for parts in zip(*data(), strict=True))
    value = getattr(model, name).detach()

    def loss(flat: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, {name: flat.view(value.shape)}, (x,)), y)

    return torch.func.jacfwd(torch.func.hessian(loss))(value.ravel()).detach()


def test_the_max_norm_reading_of_r_is_not_invariant(plain):
    alpha = FACTORS[0]
    ds = summarized(Scaled(alpha))
    for s, name in enumerate(NAMES):
        ratios = []
        for factors, one in (([1.0] * 4, plain), (alpha, ds)):
            third = raw_third(Scaled(factors), name)
            ratios.append(float(third.abs().max()) ** (2 / 3) / one.D2.values[s, s])
        np.testing.assert_allclose(ratios[1] / ratios[0], alpha[s] ** -2, rtol=1e-8)
        assert abs(ratios[1] / ratios[0] - 1) > 0.1


def test_merged_is_recomputed():
    groups = {"first": ["w1", "b1"], "second": ["w2", "b2"]}
    coarser = ho.Partition.canonical(Scaled([1.0] * 4)).merge(groups)
    merged = summarized(Scaled([1.0] * 4)).ho.merge(groups)
    coarse = summarized(Scaled([1.0] * 4), partition=coarser)
    for d in (1, 2, 3):
        for name in (f"D{d}", f"D{d}_se"):
            size = np.abs(coarse[name].values).max()
            np.testing.assert_allclose(merged[name].values, coarse[name].values, rtol=1e-12, atol=1e-12 * size)
    for name in ("learning_rates", "learning_rates_se"):
        a, b = (one.ho.learning_rates("cubic")[name].values for one in (merged, coarse))
        np.testing.assert_allclose(a, b, rtol=1e-9)


def test_laplace_of_a_linear_gaussian_model_is_its_exact_posterior():
    g = torch.Generator().manual_seed(4)
    x = torch.randn(60, 4, generator=g, dtype=torch.float64)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5], [3.0]], dtype=torch.float64)
    y = y + torch.randn(60, 1, generator=g, dtype=torch.float64)
    tau = 0.8
    posterior = np.linalg.inv(x.numpy().T @ x.numpy() + tau * np.eye(4))  # noise of variance 1, prior of precision tau
    mode = posterior @ x.numpy().T @ y.numpy()
    model = nn.Linear(4, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(mode.T))
    batches = [(x[:20], y[:20]), (x[20:], y[20:])]
    problem = ho.Problem(model, batches, lambda out, target: ((out - target) ** 2).mean() / 2)
    ds = ho.summarize(problem, 2, direction="weights", partition="discrete", progress=False)
    found = ds.ho.laplace(tau)
    np.testing.assert_allclose(found.covariance.values * (mode @ mode.T), posterior, rtol=1e-10)
    sd, signs = np.sqrt(np.diag(posterior)), np.sign(mode @ mode.T)
    np.testing.assert_allclose(found.correlation.values * signs, posterior / np.outer(sd, sd), rtol=1e-9)


def convex() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """Logistic regression with overlapping classes: strictly convex."""
    g = torch.Generator().manual_seed(2)
    x = torch.randn(40, 3, generator=g, dtype=torch.float64)
    y = (x[:, :1] + 1.5 * torch.randn(40, 1, generator=g, dtype=torch.float64) > 0).double()
    torch.manual_seed(3)
    return nn.Linear(3, 1).double(), [(x[:20], y[:20]), (x[20:], y[20:])]


def derivatives(model: nn.Module, batches) -> tuple[np.ndarray, np.ndarray]:
    """Gradient and Hessian of logistic regression from their formulas."""
    x, y = (torch.cat(parts).numpy() for parts in zip(*batches, strict=True))
    full = np.column_stack([x, np.ones(len(x))])
    p = 1 / (1 + np.exp(-full @ np.append(model.weight.detach().numpy(), model.bias.detach().numpy())))
    return full.T @ (p - y[:, 0]) / len(x), full.T @ (full * (p * (1 - p))[:, None]) / len(x)


def test_trivial_partition_is_cauchys_step_and_discrete_is_newtons():
    model, batches = convex()
    problem = ho.Problem(model, batches, F.binary_cross_entropy_with_logits)
    g, h = derivatives(model, batches)
    trivial = ho.summarize(problem, 2, partition="trivial", progress=False).ho.learning_rates()
    np.testing.assert_allclose(trivial.learning_rates.values, [g @ g / (g @ h @ g)], rtol=1e-10)
    discrete = ho.summarize(problem, 2, partition="discrete", progress=False)
    step = discrete.ho.learning_rates().learning_rates.values * g
    np.testing.assert_allclose(step, np.linalg.solve(h, g), rtol=1e-10)
    assert discrete.ho.learning_rates().status.item().startswith("ok")
    np.testing.assert_allclose(np.sort(discrete.ho.spectrum().values), np.linalg.eigvalsh(h), rtol=1e-9)
    np.testing.assert_allclose(discrete.ho.curvature().condition.item(), np.linalg.cond(h), rtol=1e-9)
