"""The engines side by side, in units of one gradient of the same batch.

    python benchmarks/engines.py                       # all models and engines, table to the terminal
    python benchmarks/engines.py --model lenet --repeats 9 --out docs/engines   # one model, beside those stored there

Each row is one quantity (D2, D2 with the diagonal of D3, full D3) of one model, each column an engine:

    tangents, nested    a warm call of ho.summarize with a given direction and self_check=False
    torch.func          jacfwd(grad(f)) and jacfwd(jacfwd(grad(f))) of f(eta): forward over reverse, vectorised over eta
    curvlinops          U^T H U, with its HessianLinearOperator applied to the S columns U^s

All calls of a model are interleaved in every repeat and medians are taken, so that noise hits them alike; short ones
are timed five times a turn. An engine whose call takes longer than ``--patience`` seconds is timed once. Of nested on
D3 of the GPT (3,081 backward passes) a few subtrees are computed and compared, and the time is scaled by the number of
passes; ``share`` tells. Where torch's own derivatives are wrong (norms, see docs/engine.md) torch.func and curvlinops
are timed all the same; their relative error is in the Dataset.
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
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd
from torch.utils.flop_counter import FlopCounterMode

import hoanalysis as ho
from hoanalysis.derivatives import nested
from hoanalysis.derivatives.common import Request, displaced
from hoanalysis.derivatives.primitives import primitive_operations
from hoanalysis.models import GPT, LeNet5, VGG11Prime, cross_entropy_tokens
from hoanalysis.partitions import Partition

QUANTITIES = ("D2", "D2 + diag D3", "D3")
ENGINES = ("tangents", "nested", "torch.func", "curvlinops")
OFTEN, SHORT = 5, 0.5  # calls in a row, at every turn, of what takes less than so many seconds, where it is not nested


@dataclass
class Workload:
    """A model, one batch and a direction."""

    name: str
    model: nn.Module
    batch: tuple[Tensor, Tensor]
    loss: Callable
    quantities: tuple[str, ...] = QUANTITIES
    subtrees: int | None = None  # of nested on D3, where the whole takes hours

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
        return {str(k): ds.variables[k].values for k in ds.data_vars}

    def nested_subtrees(self) -> dict[str, np.ndarray]:
        """D3 by the nested engine where the first index is one of a few, NaN elsewhere."""
        partition, state = Partition.canonical(self.model), self.problem.state()
        eta = torch.zeros(len(partition), dtype=torch.float64, requires_grad=True)
        with primitive_operations():
            loss = self.problem.batch_value(displaced(state.parameters, self.u, partition, eta), state, self.batch)
        found = _Subtrees(eta, self.first_indices()).run(loss).tensors[3].numpy()
        kept = np.isin(np.arange(len(eta)), self.first_indices())
        smallest = np.minimum.reduce(np.meshgrid(*[np.arange(len(eta))] * 3, indexing="ij"))
        return {"D3": np.where(kept[smallest], found, np.nan)}

    def first_indices(self) -> list[int]:
        """Spread evenly over the groups."""
        assert self.subtrees is not None
        return [int((i + 0.5) * len(self.theta) / self.subtrees) for i in range(self.subtrees)]

    def share(self, quantity: str, engine: str) -> float:
        """Of the backward passes of a whole call, those that are made."""
        if (quantity, engine) != ("D3", "nested") or self.subtrees is None:
            return 1.0
        size = len(self.theta)
        return sum(1 + size - t for t in self.first_indices()) / sum(1 + size - t for t in range(size))

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
        for q in (q for q in quantities if q in self.quantities):
            for e in engines:
                if self.share(q, e) < 1:
                    calls[q, e] = self.nested_subtrees
                elif e == "tangents" or (e == "nested" and (q == "D2" or self.name == "lenet")):
                    calls[q, e] = lambda q=q, e=e: self.summarize(q, e)
                elif e == "torch.func" and q != "D2 + diag D3" and self.name == "lenet":
                    calls[q, e] = lambda q=q: self.torch_func(q)
                elif e == "curvlinops" and q == "D2" and self.name != "gpt":
                    calls[q, e] = lambda q=q: self.curvlinops(q)
        return calls


class _Subtrees(nested._Recursion):
    """The recursion to D3 where the first index is one of some."""

    def __init__(self, eta: Tensor, first: list[int]) -> None:
        super().__init__(eta, Request(3))
        self.first = first

    def _descend(self, row: Tensor, prefix: tuple[int, ...]) -> None:
        if prefix:
            return super()._descend(row, prefix)
        for t in self.first:
            self._descend(self._row(row[t], True), (t,))


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
    return _gpt(batch, quantities=QUANTITIES[:2])


def gpt_one(batch: int = 1) -> Workload:
    """The same on one sample, for D3."""
    return _gpt(batch, quantities=QUANTITIES[2:], subtrees=3)


def _gpt(batch: int, **options: Any) -> Workload:
    model = GPT(vocab_size=64, context=128, n_layer=6, n_head=8, width=256)
    tokens = torch.randint(0, 64, (batch, 129))
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return Workload("gpt", model, (x, y), cross_entropy_tokens, **options)


def _images(name: str, model: nn.Module, batch: int) -> Workload:
    return Workload(name, model, (torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))), F.cross_entropy)


MODELS = {"lenet": lenet, "vgg": vgg, "gpt": gpt, "gpt-one": gpt_one}


def measure(w: Workload, engines: list[str], quantities: list[str], repeats: int, patience: float) -> xr.Dataset:
    """Medians in gradients, FLOPs in gradients, and relative errors against ``tangents``."""
    calls = {("gradient", "autograd"): w.gradient, **w.calls(engines, quantities)}
    seconds: dict[tuple[str, str], list[float]] = {k: [] for k in calls}
    results: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    again: dict[tuple[str, str], int] = {}
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
        again[key] = 1 if key[1] in ("nested", "torch.func") else OFTEN
    for _ in range(repeats):
        for key, call in calls.items():
            if seconds[key] and seconds[key][0] > patience:
                continue
            for _ in range(again[key]):
                start = time.perf_counter()
                call()
                seconds[key].append(time.perf_counter() - start)
                if seconds[key][-1] > SHORT:
                    break
    gradient = float(np.median(seconds["gradient", "autograd"]))
    flops = {k: _flops(calls[k]) for k in calls if k[1] in ("autograd", "tangents")}
    shape = (len(quantities), len(engines))
    table, low, high, calls_timed, count, error, third, share = (np.full(shape, np.nan) for _ in range(8))
    for i, q in enumerate(quantities):
        for j, e in enumerate(engines):
            if (q, e) not in calls:
                continue
            share[i, j] = w.share(q, e)
            table[i, j] = np.median(seconds[q, e]) / gradient / share[i, j]
            low[i, j], high[i, j] = np.quantile(seconds[q, e], (0.25, 0.75)) / gradient / share[i, j]
            calls_timed[i, j] = len(seconds[q, e])
            count[i, j] = flops.get((q, e), np.nan) / flops["gradient", "autograd"]
            if (q, e) == ("D3", "tangents"):
                third[i, j] = table[i, j] * _contraction(calls[q, e])
            name = "D3_diag" if q == "D2 + diag D3" else q
            ours, theirs = results[q, "tangents"][name], results[q, e][name]
            there = np.isfinite(theirs)
            error[i, j] = np.linalg.norm((theirs - ours)[there]) / np.linalg.norm(ours[there])
    dims = ("quantity", "engine")
    return xr.Dataset(
        {
            "gradients": (dims, table, {"long_name": "median time", "units": "gradients"}),
            "lower": (dims, low, {"long_name": "lower quartile", "units": "gradients"}),
            "upper": (dims, high, {"long_name": "upper quartile", "units": "gradients"}),
            "calls": (dims, calls_timed, {"long_name": "calls that were timed", "units": "1"}),
            "share": (dims, share, {"long_name": "share of its passes that were made", "units": "1"}),
            "flops": (dims, count, {"long_name": "floating-point operations", "units": "gradients"}),
            "contraction": (dims, third, {"long_name": "of it, the contractions to D3", "units": "gradients"}),
            "difference": (dims, error, {"long_name": "relative difference from tangents", "units": "1"}),
            "gradient_seconds": ((), gradient, {"long_name": "one gradient", "units": "s"}),
        },
        {
            "quantity": np.array(quantities, dtype=object),
            "engine": np.array(engines, dtype=object),
            "groups": len(w.theta),
            "batch": len(w.batch[0]),
        },
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
            if not row.gradients.notnull().any():
                continue
            cells = [_cell(row.sel(engine=e)) for e in ds.engine.values]
            head = f"{model} | {int(m.groups)} | {int(m.batch)} | {float(m.gradient_seconds) * 1e3:.0f} ms"
            lines.append(f"| {head} | {q} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(found: xr.Dataset) -> str:
    """A median and its quartiles, in gradients."""
    if not np.isfinite(found.gradients):
        return ""
    text = f"{float(found.gradients):,.3g}" if found.gradients < 1e3 else f"{float(found.gradients):,.0f}"
    if found.calls > 2:
        text += f" ({float(found.lower):.3g} to {float(found.upper):.3g})"
    if np.isfinite(found.contraction):
        text += f", contraction {float(found.contraction):.3g}"
    return text + (f", from {float(found.share):.0%} of its passes" if found.share < 1 else "")


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
        measured.append(ds.assign_coords(model=np.array(name, dtype=object)))
        print(markdown(xr.concat(measured[-1:], "model", coords="different", compat="equals")))
    ds = xr.concat(measured, "model", coords="different", compat="equals")
    ds.attrs = {
        "torch_version": str(torch.__version__),
        "torch_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if args.out:
        stored = args.out.with_suffix(".nc")
        if stored.exists():
            with xr.open_dataset(stored, engine="h5netcdf") as before:
                others = [before.sel(model=[m]).load() for m in before.model.values if m not in args.model]
            both = [*others, ds]
            ds = xr.concat(both, "model", "all", "different", "equals", join="outer", combine_attrs="override")
            ds = ds.sel(model=[m for m in MODELS if m in ds.model], engine=[e for e in ENGINES if e in ds.engine])
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.with_suffix(".md").write_text(markdown(ds))
        ds.drop_encoding().to_netcdf(stored, engine="h5netcdf")  # names longer than those before would be cut
        picture(ds, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
