"""The properties of Section 3.1 of the paper, measured against independent calculations, and what D2 and D3 cost.

    python benchmarks/properties.py --out data/paper-figures/properties.nc
    python benchmarks/properties.py --starts --out data/paper-figures/invariance.nc

The second command repeats the invariance from several checkpoints and with several dampings (about five minutes).

Needs CIFAR-10 in data/. Each statistic is one of claims.toml, where its formula stands. Everything but the costs is in
float64. Times are CPU seconds on one thread, in pairs with a gradient of the same batch; their errors are those of the
mean over the repeats.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import measuring
import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor, nn

import hoanalysis as ho
from hoanalysis import data, models

REPEATS = 5
STEPS, BATCH, DAMPING = 20, 125, 0.1
STARTS, DAMPINGS = (1, 3, 11, 21), (0.1, 0.3)  # epochs of lenet5-cifar10, and dampings, of --starts
Rates = Callable[[xr.Dataset], Tensor]


# ---- limits of the partition ----------------------------------------------------------------------------------------


def cauchy(model: nn.Module, batches: data.Batches) -> float:
    """|eta - g.g / (g.Hg)| / |eta|, Hg by double backward over all samples at once."""
    problem = ho.Problem(model, batches, F.cross_entropy)
    eta = ho.summarize(problem, 2, partition="trivial", progress=False).ho.learning_rates().learning_rates.item()
    parameters = list(model.parameters())
    g = torch.autograd.grad(F.cross_entropy(model(batches.x), batches.y), parameters, create_graph=True)
    fixed = [v.detach() for v in g]
    square = sum((a * b).sum() for a, b in zip(g, fixed, strict=True))
    hg = torch.autograd.grad(square, parameters)
    gg, ghg = (sum(float((a * b).sum()) for a, b in zip(fixed, other, strict=True)) for other in (fixed, hg))
    return abs(eta - gg / ghg) / abs(eta)


def newton(batches: data.Batches) -> float:
    """|step - H^-1 g| / |H^-1 g| of a tanh network with one output and squared error, whose Hessian is regular."""
    torch.manual_seed(0)
    model = models.MLP((batches.x[0].numel(), 3, 1)).double()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return ((output[:, 0] - target) ** 2).mean()

    ds = ho.summarize(ho.Problem(model, batches, loss), 2, partition="discrete", progress=False)
    u = torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss(model(batches.x), batches.y), list(model.parameters()))]
    )
    step = torch.from_numpy(ds.ho.learning_rates().learning_rates.values) * u
    sizes = [p.numel() for p in model.parameters()]

    def flat_loss(flat: Tensor) -> Tensor:
        pieces = zip(model.named_parameters(), flat.split(sizes), strict=True)
        weights = {n: v.view(p.shape) for (n, p), v in pieces}
        return loss(torch.func.functional_call(model, weights, (batches.x,)), batches.y)

    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    expected = torch.linalg.solve(torch.func.hessian(flat_loss)(theta), u)
    return float((step - expected).norm() / expected.norm())


# ---- invariance -----------------------------------------------------------------------------------------------------


def plain(ds: xr.Dataset) -> Tensor:
    return torch.from_numpy(ds.ho.learning_rates().learning_rates.values)


def regularized(ds: xr.Dataset) -> Tensor:
    return torch.from_numpy(ds.ho.learning_rates("r").learning_rates.values)


def sgd(ds: xr.Dataset) -> Tensor:
    """One rate for all tensors, as a control: this trajectory does depend on the parameterization."""
    return torch.full((ds.sizes["group"],), 0.05 / DAMPING, dtype=torch.float64)


RATES = {"invariance": plain, "invariance_r": regularized}


def scales(model: nn.Module) -> dict[str, float]:
    """By what a parameter of the ntk form has to be multiplied to be that of the standard form."""
    factor = {name: getattr(module, "scale", 1.0) for name, module in model.named_modules()}
    return {n: factor[n.rpartition(".")[0]] if n.endswith("weight") else 1.0 for n, _ in model.named_parameters()}


def trajectory(
    make: Callable[[str], nn.Module], start: dict[str, Tensor], form: str, batches, rates: Rates, damping: float
) -> list[Tensor]:
    """The parameters after each step, mapped to the standard form, from a start in the standard form.

    Step k is theta_s - damping eta_s g_s, H-bar eta = g-bar, everything from batch k.
    """
    model = make(form).double()
    factor = scales(model)
    model.load_state_dict({n: t.double() / factor[n] for n, t in start.items()})
    out = []
    for _, batch in zip(range(STEPS), batches, strict=False):
        problem = ho.Problem(model, [batch], F.cross_entropy)
        eta = rates(ho.summarize(problem, 2, diagonal=3, progress=False)).nan_to_num()
        gradient = torch.autograd.grad(F.cross_entropy(model(batch[0]), batch[1]), list(model.parameters()))
        with torch.no_grad():
            for p, e, g in zip(model.parameters(), eta, gradient, strict=True):
                p -= damping * e * g
        out.append(torch.cat([factor[n] * p.detach().flatten() for n, p in model.named_parameters()]))
    return out


def invariance(
    make: Callable[[str], nn.Module], start: dict[str, Tensor], batches, rates: Rates, damping: float = DAMPING
) -> tuple[float, float]:
    """The largest |theta_std - map(theta_ntk)| / |theta_std| over the steps, and how far the trajectory went."""
    standard, ntk = (trajectory(make, start, form, batches, rates, damping) for form in models.PARAMETERIZATIONS)
    origin = torch.cat([t.double().flatten() for t in start.values()])
    apart = max(float((a - b).norm() / a.norm()) for a, b in zip(standard, ntk, strict=True))
    return apart, float((standard[-1] - origin).norm() / origin.norm())


def lenet(form: str) -> nn.Module:
    return models.LeNet5(in_channels=3, parameterization=form)


def start_of(root: Path, epoch: int) -> dict[str, Tensor]:
    """The parameters of lenet5-cifar10 after so many epochs of 400 steps."""
    return dict(ho.load_checkpoint(root / "lenet5-cifar10" / f"step_{400 * epoch:05d}.safetensors").state_dict)


def from_several_starts(root: Path, batches: list[tuple[Tensor, Tensor]]) -> xr.Dataset:
    """The invariance with H-bar and with H-bar_reg over (epoch of the start, damping), and how far each run went."""
    found = {f"{name}{end}": np.empty((len(STARTS), len(DAMPINGS))) for name in RATES for end in ("", "_way")}
    for at in np.ndindex(len(STARTS), len(DAMPINGS)):
        start, damping = start_of(root, STARTS[at[0]]), DAMPINGS[at[1]]
        for name, rates in RATES.items():
            found[name][at], found[f"{name}_way"][at] = invariance(lenet, start, batches, rates, damping)
            print(STARTS[at[0]], damping, name, found[name][at], found[f"{name}_way"][at], flush=True)
    dims = ("epoch", "damping")
    return xr.Dataset(
        {k: (dims, v) for k, v in found.items()},
        {"epoch": list(STARTS), "damping": list(DAMPINGS)},
        {"steps": STEPS, "torch_version": str(torch.__version__)},
    )


# ---- cost -----------------------------------------------------------------------------------------------------------


class VGG20Prime(models.VGG11Prime):
    """VGG-11' with nineteen convolutions: 20 layers, S = 40."""

    CHANNELS = (64,) * 3 + (128,) * 4 + (256,) * 4 + (512,) * 8
    POOLED = (2, 6, 10, 14, 18)


def workload(
    model: nn.Module, batch: tuple[Tensor, Tensor]
) -> tuple[ho.Problem, dict[str, Tensor], Callable[[], object]]:
    """The problem of one batch, its gradient as the direction, and the call that makes that gradient."""

    def gradient() -> tuple[Tensor, ...]:
        return torch.autograd.grad(F.cross_entropy(model(batch[0]), batch[1]), list(model.parameters()))

    u = dict(zip((n for n, _ in model.named_parameters()), gradient(), strict=True))
    return ho.Problem(model, [batch], F.cross_entropy), u, gradient


def in_gradients(model: nn.Module, batch: tuple[Tensor, Tensor], order: int) -> np.ndarray:
    """CPU time of D^(1) .. D^(order) over that of a gradient of the same batch, once a repeat."""
    problem, u, gradient = workload(model, batch)

    def summaries() -> object:
        return ho.summarize(problem, order, direction=u, self_check=False, progress=False)

    summaries(), gradient()
    return np.array([measuring.cpu_seconds(summaries) / measuring.cpu_seconds(gradient) for _ in range(REPEATS)])


def solve_share(model: nn.Module, batch: tuple[Tensor, Tensor]) -> np.ndarray:
    """CPU time of solving H-bar eta = g-bar over that of a gradient, once a repeat."""
    problem, u, gradient = workload(model, batch)
    ds = ho.summarize(problem, 2, direction=u, self_check=False, progress=False)
    h, g = ds.D2.values, ds.D1.values

    def solves() -> None:
        for _ in range(100):
            np.linalg.solve(h, g)

    solves(), gradient()
    return np.array([measuring.cpu_seconds(solves) / 100 / measuring.cpu_seconds(gradient) for _ in range(REPEATS)])


def memory_share(batch: tuple[Tensor, Tensor]) -> float:
    """The highest rise of memory during D2 of LeNet-5 over the 4 P^2 bytes of its Hessian in float32."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = models.LeNet5(in_channels=3)
    problem, u, _ = workload(model, batch)
    call = lambda: ho.summarize(problem, 2, direction=u, self_check=False, progress=False)  # noqa: E731
    return measuring.peak_bytes(call) / (4.0 * sum(p.numel() for p in model.parameters()) ** 2)


def batch_of(batches: data.Batches, n: int) -> tuple[Tensor, Tensor]:
    return batches.x[:n], batches.y[:n]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("data"), help="where CIFAR-10 and lenet5-cifar10 are")
    parser.add_argument("--out", type=Path, default=Path("data/paper-figures/properties.nc"))
    parser.add_argument("--starts", action="store_true", help="only the invariance, from several checkpoints")
    given = parser.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    images = data.cifar10(given.root, max_samples=STEPS * BATCH, batch_size=BATCH)
    exact = data.Batches(images.x.double(), images.y, BATCH)
    if given.starts:
        torch.set_num_threads(1)
        from_several_starts(given.root, list(exact)).to_netcdf(given.out, engine="h5netcdf")
        return
    found: dict[str, float] = {"memory_share": measuring.in_own_process(memory_share, batch_of(images, 128))}
    torch.set_num_threads(1)
    start = start_of(given.root, 1)
    model = lenet("standard").double()
    model.load_state_dict(start)
    found["cauchy"] = cauchy(model, exact.take(500))
    animal = torch.isin(exact.y, torch.tensor([2, 3, 4, 5, 6, 7])).double() * 2 - 1
    small = data.Batches(F.avg_pool2d(exact.x, 8), animal, BATCH).take(500)
    found["newton"] = newton(small)
    for name, rates in {**RATES, "invariance_sgd": sgd}.items():
        found[name], found[f"{name}_way"] = invariance(lenet, start, list(exact), rates)
        print(name, found[name], found[f"{name}_way"], flush=True)
    torch.manual_seed(0)
    repeated = {"solve_share": solve_share(models.VGG11Prime(), batch_of(images, 32))}
    for order in (2, 3):
        repeated[f"d{order}_gradients"] = in_gradients(VGG20Prime(), batch_of(images, 16), order)
        print(order, repeated[f"d{order}_gradients"], flush=True)
    for name, values in repeated.items():
        found[name], found[f"{name}_se"] = float(values.mean()), float(values.std(ddof=1) / REPEATS**0.5)
    attrs = {"repeats": REPEATS, "steps": STEPS, "damping": DAMPING, "torch_version": str(torch.__version__)}
    ds = xr.Dataset({k: ((), v) for k, v in found.items()}, attrs=attrs)
    print(ds)
    ds.to_netcdf(given.out, engine="h5netcdf")


if __name__ == "__main__":
    main()
