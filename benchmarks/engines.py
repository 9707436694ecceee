"""The engines side by side, in units of one gradient of the same batch.

    python benchmarks/engines.py                       # all models and engines, table to the terminal
    python benchmarks/engines.py --model lenet --repeats 9 --out docs/engines

Each row is one quantity (D2, D2 with the diagonal of D3, full D3) of one model, each column an engine:

    tangents, nested    a warm call of ho.summarize with a given direction and self_check=False
    torch.func          jacfwd(grad(f)) and jacfwd(jacfwd(grad(f))) of f(eta): forward over reverse, vectorised over eta
    curvlinops          U^T H U, with its HessianLinearOperator applied to the S columns U^s

All calls of a model are interleaved in every repeat and medians are taken, so that noise hits them alike.
An engine whose call takes longer than ``--patience`` seconds is timed once. Where torch's own derivatives are wrong
(norms, see docs/engine.md) torch.func and curvlinops are timed all the same; their relative error is in the Dataset.
With ``--out NAME`` the table is written to NAME.md, the Dataset to NAME.nc and a picture to NAME.png.
"""

from __future__ import annotations

import argparse
import cProfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd
from torch.utils.flop_counter import FlopCounterMode

import hoanalysis as ho
from hoanalysis.models import GPT, LeNet5, VGG11Prime, cross_entropy_tokens

QUANTITIES = ("D2", "D2 + diag D3", "D3")
ENGINES = ("tangents", "nested", "torch.func", "curvlinops")


@dataclass
class Workload:
    """A model, one batch and a direction."""

    name: str
    model: nn.Module
    batch: tuple[Tensor, Tensor]
    loss: Callable

    def __post_init__(self) -> None:
        self.problem = ho.Problem(self.model, [self.batch], self.loss, batch_size=lambda batch: len(batch[0]))
        self.theta = {n: p.detach() for n, p in self.model.named_parameters()}
        self.u = dict(zip(self.theta, self.gradient(), strict=True))

    def gradient(self) -> tuple[Tensor, ...]:
        x, y = self.batch
        return torch.autograd.grad(self.loss(self.model(x), y), list(self.model.parameters()))

    def summarize(self, quantity: str, engine: str) -> dict[str, np.ndarray]:
        order, diagonal = {"D2": (2, None), "D2 + diag D3": (2, 3), "D3": (3, None)}[quantity]
        ds = ho.summarize(
            self.problem, order, diagonal=diagonal, direction=self.u, engine=engine, self_check=False, progress=False
        )
        return {str(k): ds[k].values for k in ds.data_vars}

    def torch_func(self, quantity: str) -> dict[str, np.ndarray]:
        x, y = self.batch

        def f(eta: Tensor) -> Tensor:
            moved = {n: p + eta[i] * self.u[n] for i, (n, p) in enumerate(self.theta.items())}
            return self.loss(functional_call(self.model, moved, (x,)), y)

        eta = torch.zeros(len(self.theta))
        derivative = jacfwd(grad(f)) if quantity == "D2" else jacfwd(jacfwd(grad(f)))
        return {quantity: derivative(eta).numpy()}

    def curvlinops(self, quantity: str) -> dict[str, np.ndarray]:
        from curvlinops import HessianLinearOperator

        parameters = list(self.model.parameters())
        columns = torch.zeros(sum(p.numel() for p in parameters), len(parameters))
        start = 0
        for s, v in enumerate(self.u.values()):
            columns[start : start + v.numel(), s] = v.flatten()
            start += v.numel()
        loss = _FlatCrossEntropy() if self.loss is cross_entropy_tokens else nn.CrossEntropyLoss()
        hessian = HessianLinearOperator(self.model, loss, parameters, [self.batch], check_deterministic=False)
        return {"D2": (columns.T @ (hessian @ columns)).numpy()}

    def calls(self, engines: list[str], quantities: list[str]) -> dict[tuple[str, str], Callable]:
        calls: dict[tuple[str, str], Callable] = {}
        for q in quantities:
            for e in engines:
                if e in ("tangents", "nested"):
                    calls[q, e] = lambda q=q, e=e: self.summarize(q, e)
                elif e == "torch.func" and (q == "D2" or (q == "D3" and self.name == "lenet")):
                    calls[q, e] = lambda q=q: self.torch_func(q)
                elif e == "curvlinops" and q == "D2":
                    calls[q, e] = lambda q=q: self.curvlinops(q)
        return calls


class _FlatCrossEntropy(nn.CrossEntropyLoss):
    """Cross-entropy over tokens, as a class that curvlinops takes."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return super().forward(logits.flatten(0, -2), target.flatten())


def lenet(batch: int = 128) -> Workload:
    """LeNet-5 with ReLU on random images, S = 10."""
    return _images("lenet", LeNet5(in_channels=3), batch)


def vgg(batch: int = 64) -> Workload:
    """VGG-11 with one fully connected layer on random images, S = 18."""
    return _images("vgg", VGG11Prime(), batch)


def gpt(batch: int = 4) -> Workload:
    """Six blocks of width 256 with 8 heads on 128 random tokens of 64, S = 77."""
    model = GPT(vocab_size=64, context=128, n_layer=6, n_head=8, width=256)
    tokens = torch.randint(0, 64, (batch, 129))
    return Workload("gpt", model, (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()), cross_entropy_tokens)


def _images(name: str, model: nn.Module, batch: int) -> Workload:
    return Workload(name, model, (torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))), F.cross_entropy)


MODELS = {"lenet": lenet, "vgg": vgg, "gpt": gpt}


def measure(w: Workload, engines: list[str], quantities: list[str], repeats: int, patience: float) -> xr.Dataset:
    """Medians in gradients, FLOPs in gradients, and relative errors against ``tangents``."""
    calls = {("gradient", "autograd"): w.gradient, **w.calls(engines, quantities)}
    seconds: dict[tuple[str, str], list[float]] = {k: [] for k in calls}
    results: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for key, call in list(calls.items()):  # warm: captures, caches, allocator
        start = time.perf_counter()
        try:
            results[key] = call()
        except ImportError as error:
            print(f"  {key[1]} is left out: {error}")
            del calls[key], seconds[key]
            continue
        took = time.perf_counter() - start
        if took > patience and key[1] != "tangents":  # of ours most of the first call is the capture
            seconds[key].append(took)
    for _ in range(repeats):
        for key, call in calls.items():
            if seconds[key] and seconds[key][0] > patience:
                continue
            start = time.perf_counter()
            call()
            seconds[key].append(time.perf_counter() - start)
    gradient = float(np.median(seconds["gradient", "autograd"]))
    flops = {k: _flops(calls[k]) for k in calls if k[1] in ("autograd", "tangents")}
    shape = (len(quantities), len(engines))
    table, count, error, third = (np.full(shape, np.nan) for _ in range(4))
    for i, q in enumerate(quantities):
        for j, e in enumerate(engines):
            if (q, e) not in calls:
                continue
            table[i, j] = np.median(seconds[q, e]) / gradient
            count[i, j] = flops.get((q, e), np.nan) / flops["gradient", "autograd"]
            if (q, e) == ("D3", "tangents"):
                third[i, j] = table[i, j] * _contraction(calls[q, e])
            name = "D3_diag" if q == "D2 + diag D3" else q
            ours, theirs = results[q, "tangents"][name], results[q, e][name]
            error[i, j] = np.linalg.norm(theirs - ours) / np.linalg.norm(ours)
    dims = ("quantity", "engine")
    return xr.Dataset(
        {
            "gradients": (dims, table, {"long_name": "median time", "units": "gradients"}),
            "flops": (dims, count, {"long_name": "floating-point operations", "units": "gradients"}),
            "contraction": (dims, third, {"long_name": "of it, the contractions to D3", "units": "gradients"}),
            "difference": (dims, error, {"long_name": "relative difference from tangents", "units": "1"}),
            "gradient_seconds": ((), gradient, {"long_name": "one gradient", "units": "s"}),
        },
        {"quantity": quantities, "engine": engines, "groups": len(w.theta), "batch": len(w.batch[0])},
    )


def _flops(call: Callable) -> float:
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def _contraction(call: Callable) -> float:
    """The share of a call that goes into the contractions of stacks to D3, the rules' method `third`."""
    profile = cProfile.Profile()
    profile.runcall(call)
    found = [
        (function.co_name, entry.totaltime)
        for entry in profile.getstats()
        if not isinstance(function := entry.code, str) and "tangents" in function.co_filename
    ]
    total = max(entry.totaltime for entry in profile.getstats())
    return sum(seconds for name, seconds in found if name == "third") / total


def markdown(ds: xr.Dataset) -> str:
    """The table of docs/engine.md."""
    lines = ["| model | S | batch | one gradient | quantity | " + " | ".join(map(str, ds.engine.values)) + " |"]
    lines.append("|---" * (5 + ds.sizes["engine"]) + "|")
    for model in ds.model.values:
        m = ds.sel(model=model)
        for q in ds.quantity.values:
            row = m.sel(quantity=q)
            cells = [
                (f"{v:.3g}" if np.isfinite(v) else "") + (f" (contraction {c:.3g})" if np.isfinite(c) else "")
                for v, c in zip(row.gradients.values, row.contraction.values, strict=True)
            ]
            head = f"{model} | {int(m.groups)} | {int(m.batch)} | {float(m.gradient_seconds) * 1e3:.0f} ms"
            lines.append(f"| {head} | {q} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def picture(ds: xr.Dataset, path: Path) -> None:
    """Bars in gradients, one panel a model, on a logarithmic scale."""
    import matplotlib

    matplotlib.use("agg")
    import seaborn as sns

    frame = ds.gradients.to_dataframe().reset_index().dropna(subset="gradients")
    grid = sns.catplot(
        frame, x="quantity", y="gradients", hue="engine", col="model", kind="bar", height=3.2, aspect=1.1
    )
    grid.set(yscale="log").set_axis_labels("", "time [gradients]").set_titles("{col_name}")
    for ax in grid.axes.flat:
        for bars in ax.containers:
            ax.bar_label(bars, fmt="%.3g", fontsize=7)
    grid.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--engine", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--quantity", nargs="+", choices=QUANTITIES, default=list(QUANTITIES))
    parser.add_argument("--batch", type=int, help="instead of each model's own")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--patience", type=float, default=60.0, help="seconds above which a call is timed once")
    parser.add_argument("--out", type=Path, help="NAME of NAME.md, NAME.nc and NAME.png")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
    engines = list(dict.fromkeys(["tangents", *args.engine]))
    measured = []
    for name in args.model:
        torch.manual_seed(0)
        workload = MODELS[name](**({"batch": args.batch} if args.batch else {}))
        ds = measure(workload, engines, args.quantity, args.repeats, args.patience)
        measured.append(ds.assign_coords(model=name))
        print(markdown(xr.concat(measured[-1:], "model")))
    ds = xr.concat(measured, "model")
    ds.attrs = {
        "torch_version": str(torch.__version__),
        "torch_threads": torch.get_num_threads(),
        "repeats": args.repeats,
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.with_suffix(".md").write_text(markdown(ds))
        ds.to_netcdf(args.out.with_suffix(".nc"), engine="h5netcdf")
        picture(ds, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
