"""The counterexample of Dinh et al. 2017: rescaling two layers moves the Hessian, not the function."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hoanalysis as ho
from hoanalysis.analysis.example import example
from hoanalysis.analysis.flatness import TOTALS
from hoanalysis.errors import SchemaError

ALPHA = 50.0


def network(alpha: float = 1.0) -> nn.Module:
    """relu(W1 x + b1) times alpha, and W2 divided by alpha: the same function for every alpha > 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        for p in (model[0].weight, model[0].bias):
            p.mul_(alpha)
        model[2].weight.div_(alpha)
    return model


def data():
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(24, 4, generator=g, dtype=torch.float64), torch.randint(0, 3, (24,), generator=g)
    return [(x[i : i + 8], y[i : i + 8]) for i in range(0, 24, 8)]


def full_hessian(model: nn.Module) -> np.ndarray:
    """By nested reverse mode over the flattened parameters, nothing of ours."""
    names = [n for n, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    x, y = (torch.cat(parts) for parts in zip(*data(), strict=True))

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = torch.split(flat, [s.numel() for s in shapes])
        state = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, state, (x,)), y)

    flat = torch.cat([p.detach().ravel() for p in model.parameters()])
    return torch.autograd.functional.hessian(loss, flat).numpy()


def test_rescaling_two_layers_fools_the_hessian_and_not_the_flatness():
    plain, scaled = network(), network(ALPHA)
    x = data()[0][0]
    torch.testing.assert_close(scaled(x), plain(x))
    hessians = [full_hessian(m) for m in (plain, scaled)]
    assert np.trace(hessians[1]) > 100 * np.trace(hessians[0])
    assert np.linalg.eigvalsh(hessians[1])[-1] > 100 * np.linalg.eigvalsh(hessians[0])[-1]
    found = [
        ho.summarize(
            ho.Problem(m, data(), F.cross_entropy), 2, direction="weights", keep_batches=4, progress=False
        ).ho.flatness()
        for m in (plain, scaled)
    ]
    for name in ("sharpness", *TOTALS):
        for suffix in ("", "_se"):
            a, b = (f[f"{name}{suffix}"].values for f in found)
            np.testing.assert_allclose(b, a, rtol=1e-8, atol=1e-12)
    theta = [p.detach().numpy().ravel() for p in plain.parameters()]
    at = np.cumsum([0, *map(len, theta)])
    blocks = [
        [theta[s] @ hessians[0][at[s] : at[s + 1], at[t] : at[t + 1]] @ theta[t] for t in range(6)] for s in range(6)
    ]
    np.testing.assert_allclose(found[0].sharpness.values, np.diag(blocks), rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(found[0].total.item(), np.trace(blocks), rtol=1e-8)
    np.testing.assert_allclose(found[0].joint.item(), np.sum(blocks), rtol=1e-8)
    np.testing.assert_allclose(found[0].largest.item(), np.linalg.eigvals(blocks).real.max(), rtol=1e-8)


def test_errors_are_a_delete_one_jackknife():
    ds = example(2).assign_attrs(direction="weights")
    found = ds.ho.flatness()

    def totals(h):
        return np.array([np.trace(h), h.sum(), np.linalg.eigvals(h).real.max()])

    w, total, n, squares = ds.weight.values, ds.weight.values.sum(), ds.sizes["batch"], 0.0
    for b in range(n):
        keep = np.arange(n) != b
        other = totals(ds.D2_batch.values[keep].sum(0) / w[keep].sum())
        squares = squares + ((total - w[b]) / total * (other - totals(ds.D2.values))) ** 2
    errors = np.sqrt(n / (n - 1) * squares)
    np.testing.assert_allclose([found[f"{name}_se"].item() for name in TOTALS], errors, rtol=1e-7)
    np.testing.assert_array_equal(found.sharpness_se.values, np.diag(ds.D2_se.values))


def test_statuses_advise():
    ds = example(2).assign_attrs(direction="weights")
    ds.D1[:] = 0.01
    assert ds.ho.flatness().status.item().startswith("ok")
    ds.D2[1, :] = ds.D2[:, 1] = ds.D1[1] = 0.0
    assert "scale-invariant: the loss does not depend on the scale of 'layer0.bias'" in ds.ho.flatness().status.item()
    ds.D2[0, 0] = -3.0
    assert "curves downwards along the scale of 'layer0.weight'" in ds.ho.flatness().status.item()
    ds.D1[2] = 1e4
    assert "not at a minimum" in ds.ho.flatness().status.item()
    ds = example(2, steps=2).assign_attrs(direction="weights")
    ds.D1[1], ds.D2[1] = np.nan, np.nan
    found = ds.ho.flatness()
    assert found.status.values[1].startswith("not computed")
    assert np.isnan(found.total.values[1])
    with pytest.raises(SchemaError, match="direction='weights'"):
        example().ho.flatness()
