"""The full Hessian through products against the one that torch.func forms, and against arithmetic."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from safetensors.torch import save_file
from torch import nn
from torch.func import functional_call, hessian

import hoanalysis as ho
from hoanalysis.errors import ArgumentError, NumericsError
from hoanalysis.hessian import DENSE, Hessian
from tests import oracles

SIZES = (9, 4, 12, 7)


def make_model(hidden: int = 4, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, hidden), nn.Tanh(), nn.Linear(hidden, 3)).double()


def make_batches(seed: int = 1) -> list:
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 3, generator=g).double(), torch.randint(0, 3, (n,), generator=g)) for n in SIZES]


def problem_of(model: nn.Module, batches: list, reduction: str = "mean") -> ho.Problem:
    if reduction == "mean":
        return ho.Problem(model, batches, F.cross_entropy)
    return ho.Problem(
        model, batches, batch_loss=lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="sum"),
        batch_size=lambda b: len(b[1]), reduction="sum",
    )  # fmt: skip


def dense(model: nn.Module, batch: tuple) -> np.ndarray:
    """The Hessian of the mean loss of one batch, by torch.func, parameters flattened in order."""
    names, shapes = zip(*((n, p.shape) for n, p in model.named_parameters()), strict=True)
    flat = torch.cat([p.detach().ravel() for p in model.parameters()])

    def loss(vector: torch.Tensor) -> torch.Tensor:
        pieces = vector.split([s.numel() for s in shapes])
        given = {n: v.reshape(s) for n, v, s in zip(names, pieces, shapes, strict=True)}
        return F.cross_entropy(functional_call(model, given, (batch[0],)), batch[1])

    return hessian(loss)(flat).numpy()


HIDDEN = {"formed": 2, "Lanczos": 12}  # 17 and 87 parameters


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("hidden", HIDDEN.values(), ids=HIDDEN)
def test_against_the_dense_hessian(hidden: int, reduction: str) -> None:
    model, batches = make_model(hidden), make_batches()
    each = np.stack([dense(model, b) for b in batches])
    weights, scale = np.array(SIZES, dtype=float), sum(SIZES) if reduction == "sum" else 1.0
    whole = scale * np.einsum("b,bij->ij", weights, each) / weights.sum()
    values, vectors = np.linalg.eigh(whole)
    ds = ho.curvature(problem_of(model, batches, reduction), probes=300, tolerance=1e-10, progress=False)
    assert (len(whole) <= DENSE) == (hidden == 2)
    assert int(ds.parameters) == len(whole)
    assert int(ds.n_batches) == 4
    assert str(ds.status.item()) == "ok"
    for name, i in (("largest", -1), ("lowest", 0)):
        np.testing.assert_allclose(ds[name], values[i], rtol=1e-9)
        assert float(ds[f"{name}_residual"]) <= 1e-5 * abs(values[i])
        x = np.einsum("bij,i,j->b", each, vectors[:, i], vectors[:, i])
        np.testing.assert_allclose(ds[f"{name}_se"], scale * oracles.weighted(x, weights)[1], rtol=1e-4)
    # 100 probes span all parameters: the trace is exact
    np.testing.assert_allclose(ds.trace, np.trace(whole), rtol=1e-9)
    assert float(ds.trace_probe_se) == 0
    traces = np.einsum("bii->b", each)
    np.testing.assert_allclose(ds.trace_se, scale * oracles.weighted(traces, weights)[1], rtol=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_products_are_those_of_the_dense_hessian(seed: int) -> None:
    model, batches = make_model(5), make_batches()
    weights = np.array(SIZES, dtype=float)
    each = np.stack([dense(model, b) for b in batches])
    whole = np.einsum("b,bij->ij", weights, each) / weights.sum()
    problem = problem_of(model, batches)
    vectors = np.random.default_rng(seed).normal(size=(len(whole), 3))
    product, quadratics, got = Hessian(problem, problem.state()).product_and_quadratics(vectors)
    np.testing.assert_allclose(product, whole @ vectors, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(quadratics, np.einsum("bij,im,jm->bm", each, vectors, vectors), rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(got, weights)


def test_the_trace_is_within_its_error_and_the_error_is_honest() -> None:
    """Over many seeds the estimates scatter around the trace as their errors say."""
    model, batches = make_model(12), make_batches()
    problem, weights = problem_of(model, batches), np.array(SIZES, dtype=float)
    exact = sum(w * np.trace(dense(model, b)) for w, b in zip(weights, batches, strict=True)) / weights.sum()
    runs = [ho.curvature(problem, probes=24, seed=s, tolerance=1.0, progress=False) for s in range(30)]
    estimates, errors = (np.array([float(r[k]) for r in runs]) for k in ("trace", "trace_probe_se"))
    spread = estimates.std(ddof=1)
    assert abs(estimates.mean() - exact) < 4 * spread / np.sqrt(len(runs))
    assert 0.6 < np.median(errors) / spread < 1.6
    assert spread < 0.2 * abs(exact)


def test_the_spectrum_of_the_summaries_lies_within() -> None:
    model, batches = make_model(12), make_batches()
    problem = problem_of(model, batches)
    ds = ho.curvature(problem, progress=False)
    for direction in ("gradient", "weights", "random"):
        values = ho.summarize(problem, 2, direction=direction, progress=False).ho.spectrum().values
        assert values.max() <= float(ds.largest) * (1 + 1e-3)
        assert values.min() >= float(ds.lowest) - 1e-3 * abs(float(ds.lowest))


def test_the_discrete_partition_has_the_same_ends() -> None:
    model, batches = make_model(2), make_batches()
    problem = problem_of(model, batches)
    ds = ho.curvature(problem, progress=False)
    values = ho.summarize(problem, 2, direction="random", partition="discrete", progress=False).ho.spectrum().values
    np.testing.assert_allclose([values.min(), values.max()], [ds.lowest, ds.largest], rtol=1e-8)


class Quadratic(nn.Module):
    """L = theta' A theta / 2 + the data's mean, A diagonal and known; one parameter is not used."""

    def __init__(self, diagonal: list[float]) -> None:
        super().__init__()
        self.register_buffer("a", torch.tensor(diagonal).double())
        self.theta, self.idle = nn.Parameter(torch.ones(len(diagonal)).double()), nn.Parameter(torch.ones(2).double())

    def forward(self, x):
        return x[:, 0] + (self.a * self.theta**2).sum() / 2


@pytest.mark.parametrize("size", [3, 60])
def test_a_quadratic_and_a_parameter_that_is_not_used(size: int) -> None:
    diagonal = np.linspace(-2.0, 5.0, size)
    problem = ho.Problem(Quadratic(diagonal.tolist()), [(x, y) for x, y in make_batches()],
                         lambda out, y: out.mean())  # fmt: skip
    ds = ho.curvature(problem, probes=300, tolerance=1e-9, progress=False)
    assert int(ds.parameters) == size + 2
    np.testing.assert_allclose([ds.lowest, ds.largest, ds.trace], [-2, 5, diagonal.sum()], rtol=1e-8)
    np.testing.assert_allclose([ds.lowest_se, ds.largest_se, ds.trace_se], 0, atol=1e-12)


def test_a_loss_that_is_linear_in_its_parameters_is_flat() -> None:
    model = nn.Linear(3, 1).double()
    problem = ho.Problem(model, make_batches(), lambda out, y: out.mean())
    ds = ho.curvature(problem, progress=False)
    np.testing.assert_array_equal([ds.lowest, ds.largest, ds.trace], 0)


def test_of_checkpoints_and_runs(tmp_path) -> None:
    for step in (0, 10):
        save_file(dict(make_model(12, seed=step).state_dict()), tmp_path / f"m_{step}.safetensors")
    run, problem = ho.open_run(tmp_path), problem_of(make_model(12), make_batches())
    ds = ho.curvature(problem, checkpoint=run, progress=False)
    assert ds.step.values.tolist() == [0, 10]
    for i, path in enumerate(run.paths):
        one = ho.curvature(problem, checkpoint=path, progress=False)
        xr.testing.assert_allclose(ds.isel(step=i, drop=True), one)
    assert float(ds.largest[0]) != float(ds.largest[1])
    for name in ds.variables:
        assert ds[name].attrs["long_name"], name
        assert "units" in ds[name].attrs, name
    ds.to_netcdf(tmp_path / "ds.nc", engine="h5netcdf")
    xr.testing.assert_equal(xr.load_dataset(tmp_path / "ds.nc", engine="h5netcdf"), ds)


def test_single_precision_is_near() -> None:
    model, batches = make_model(12), make_batches()
    exact = ho.curvature(problem_of(model, batches), progress=False, probes=300)
    single = [(x.float(), y) for x, y in batches]
    ds = ho.curvature(problem_of(make_model(12).float(), single), progress=False, probes=300)
    for name in ("largest", "trace"):
        np.testing.assert_allclose(ds[name], exact[name], rtol=3e-3)
    again = ho.curvature(problem_of(make_model(12).float(), single), dtype=torch.float64, progress=False, probes=300)
    np.testing.assert_allclose(again.trace, exact.trace, rtol=1e-6)


def test_what_does_not_converge_is_nan_and_said() -> None:
    problem = problem_of(make_model(12), make_batches())
    ds = ho.curvature(problem, max_products=1, tolerance=1e-14, progress=False)
    assert np.isnan(ds.lowest)
    assert "lowest not converged to 1e-14 after 1 restarts" in str(ds.status.item())
    assert np.isfinite(ds.trace)


def test_one_end_that_converged_is_kept() -> None:
    """One eigenvalue far out and a crowd at the other end, which Lanczos cannot tell apart in a few products."""
    for sign, name in ((1, "largest"), (-1, "lowest")):
        diagonal = sign * np.append(np.linspace(0, 1e-3, 400), 50.0)
        problem = ho.Problem(Quadratic(diagonal.tolist()), make_batches(), lambda out, y: out.mean())
        ds = ho.curvature(problem, max_products=40, tolerance=1e-12, progress=False)
        other = {"largest": "lowest", "lowest": "largest"}[name]
        np.testing.assert_allclose(ds[name], sign * 50, rtol=1e-9)
        assert np.isnan(ds[other])
        assert str(ds.status.item()).startswith(f"{other} not converged")


def test_errors_are_named() -> None:
    model = make_model(12)
    with pytest.raises(ArgumentError, match="probes >= 3"):
        ho.curvature(problem_of(model, make_batches()), probes=2)
    problem = ho.Problem(nn.Linear(3, 1).double(), [(torch.zeros(4, 3).double(), torch.zeros(4))],
                         lambda out, y: (out - out.detach()).abs().sqrt().mean())  # fmt: skip
    with pytest.raises(NumericsError, match="Hessian is not finite"):
        ho.curvature(problem, progress=False)
