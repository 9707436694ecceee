"""`SummaryNewton` beside SGD with momentum, Adam, L-BFGS and SOAP: trained, stored, and what a step costs.

    python benchmarks/optimizers.py            # every run that is not there yet, then data/optimizers/study.nc
    python benchmarks/optimizers.py --gather   # the Dataset of the runs that are there
    python benchmarks/optimizers.py --cost lenet5 [--order 3]   # mean cost over 10 cycles with period 10, in SGD steps
    python benchmarks/optimizers.py --oracle 10   # what measuring steps on LeNet-5/MNIST gain, and could have

A run is a (task, method, setting, seed). Its result is a file under build/optimizers/ as soon as it ends: stop the
command and call it again, and it goes on. Each method has a grid of four settings on every task, and as many steps and
runs as any other: the grid on seed 10, which nothing is reported of, then the setting of the lowest final training loss
on the seeds 0 to 2. `SummaryNewton` in its default setting is trained on these seeds whether it was chosen or not.

One thread; times are CPU seconds, so that other work on the machine adds little to them. SOAP is of pytorch_optimizer.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor, nn

import hoanalysis as ho
from hoanalysis import data, models
from hoanalysis.optim.information import Information

ROOT = Path(__file__).parents[1]
RUNS, STUDY = ROOT / "build" / "optimizers", ROOT / "data" / "optimizers" / "study.nc"
TUNED_ON, SEEDS = 10, (0, 1, 2)
MORE_SEEDS = (20, 21, 22)  # of the default beside SGD on LeNet-5/MNIST: no setting was ever looked at on them
RECORDS = 10  # of a run, evenly spaced, beside the one before its first step


@dataclass(frozen=True)
class Task:
    """``steps`` steps on the ``train`` batches; the loss is over ``train`` or its first ``looked_at`` samples."""

    model: Callable[[], nn.Module]
    train: Callable[[], data.Batches]
    test: Callable[[], data.Batches]
    steps: int
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    looked_at: int = 1_000


MNIST = {"train": partial(data.mnist5k, "train", 100), "test": partial(data.mnist5k, "test", 500)}
CONTEXT = 32
TEXT = partial(data.text, context=CONTEXT, batch_size=32)


def cifar10(split: str, samples: int) -> data.Batches:
    return data.cifar10(ROOT / "data", split, batch_size=100, max_samples=samples)


def gpt() -> nn.Module:
    return models.GPT(vocab_size=len(data.vocabulary()), context=CONTEXT, n_layer=2, n_head=4, width=48)


TASKS = {
    "mlp-mnist": Task(partial(models.MLP, (1024, 64, 10)), **MNIST, steps=200),
    "lenet5-mnist": Task(models.LeNet5, **MNIST, steps=200),
    "lenet5-cifar10": Task(
        partial(models.LeNet5, in_channels=3),
        partial(cifar10, "train", 10_000),
        partial(cifar10, "test", 1_000),
        steps=300,
    ),
    "gpt-docs": Task(
        gpt,
        partial(TEXT, split="train"),
        partial(TEXT, split="test", max_samples=256),
        steps=150,
        loss=models.cross_entropy_tokens,
        looked_at=256,
    ),
}


# ---- the methods: name -> (how to make it of a model, a problem and a setting; the grid) -----------------------------

Make = Callable[[nn.Module, ho.Problem, float], torch.optim.Optimizer]


def soap(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    from pytorch_optimizer import SOAP  # only in the extra

    return SOAP(model.parameters(), lr=rate, weight_decay=0.0, precondition_frequency=10)


def summary(**options: Any) -> Make:
    return lambda model, problem, damping: ho.optim.SummaryNewton(problem, damping=damping, **options)


DAMPING = (0.25, 0.5, 1.0, 2.0)
MOMENTUM = (0.5, 1.0, 2.0, 4.0)  # the steps of an average are shorter than Adam's
METHODS: dict[str, tuple[Make, tuple[float, ...]]] = {
    "SGD, momentum 0.9": (
        lambda model, _, rate: torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9),
        (0.003, 0.01, 0.03, 0.1),
    ),
    "Adam": (lambda model, _, rate: torch.optim.Adam(model.parameters(), lr=rate), (3e-4, 1e-3, 3e-3, 1e-2)),
    "L-BFGS": (
        lambda model, _, rate: torch.optim.LBFGS(model.parameters(), lr=rate, max_iter=2, history_size=10),
        (0.03, 0.1, 0.3, 1.0),
    ),
    "SOAP": (lambda model, _, rate: soap(model, rate), (1e-3, 3e-3, 1e-2, 3e-2)),
    "SummaryNewton": (summary(), DAMPING),
    "SummaryNewton, momentum": (summary(direction="momentum"), MOMENTUM),
    "SummaryNewton, momentum, layer": (summary(direction="momentum", partition="layer"), MOMENTUM),
    "SummaryNewton, momentum, trivial": (summary(direction="momentum", partition="trivial"), MOMENTUM),
    "SummaryNewton, momentum, separable": (summary(direction="momentum", curvature="separable"), DAMPING),
    "SummaryNewton, gradient": (summary(direction="gradient"), MOMENTUM),
    "SummaryNewton, as in the paper": (
        summary(direction="gradient", curvature="signed", average=0.0, slope="measured", backtracking=8),
        DAMPING,
    ),
    "SummaryNewton, r, clipped": (summary(regularization="r", negative="clip"), DAMPING),
    "SummaryNewton, ridge": (summary(regularization="ridge"), DAMPING),
}
OURS = tuple(name for name in METHODS if name.startswith("SummaryNewton"))
#: On lenet5-mnist: one option of the default changed at a time, at damping 1.
SENSITIVITY: dict[str, dict[str, Any]] = {
    f"SummaryNewton, {name}={value}": {name: value}
    for name, values in {
        "epsilon": (0.1, 10.0),
        "period": (3, 30),
        "average": (0.0, 0.95),
        "slope": ("measured", "steps"),
        "negative": ("clip",),
        "rates_momentum": (0.8,),
        "backtracking": (8,),
        "batches": (4,),
        "curvature": ("signed",),
    }.items()
    for value in values
}


def make(method: str) -> tuple[Make, tuple[float, ...]]:
    return METHODS[method] if method in METHODS else (summary(**SENSITIVITY[method]), (1.0,))


# ---- one run ---------------------------------------------------------------------------------------------------------


def endless(batches: data.Batches, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(batches.n_samples, generator=generator).split(batches.batch_size):
            yield batches.x[index], batches.y[index]


@torch.no_grad()
def evaluate(model: nn.Module, batches: data.Batches, loss: Callable[[Tensor, Tensor], Tensor]) -> tuple[float, float]:
    total, right, targets = 0.0, 0, 0
    for x, y in batches:
        output = model(x)
        total += loss(output, y).item() * len(x)
        right += int((output.argmax(-1) == y).sum())
        targets += y.numel()
    return total / batches.n_samples, right / targets


def train(name: str, method: str, setting: float, seed: int) -> dict[str, Any]:
    """One run. ``work``: CPU seconds of its steps over the mean CPU seconds of its forward and backward passes alone,
    which makes gradient-equivalents of any method's steps."""
    task, (make_optimizer, _) = TASKS[name], make(method)
    torch.manual_seed(seed)
    model, batches, test = task.model(), task.train(), task.test()
    problem = ho.Problem(model, batches, task.loss)
    optimizer = make_optimizer(model, problem, setting)
    looked_at = data.Batches(batches.x[: task.looked_at], batches.y[: task.looked_at], 500)
    passes: list[float] = []

    def closure(x: Tensor, y: Tensor) -> Tensor:
        start = time.process_time()
        optimizer.zero_grad()
        value = task.loss(model(x), y)
        value.backward()
        passes.append(time.process_time() - start)
        return value

    rows: list[dict[str, Any]] = []
    seconds = 0.0

    def record(step: int) -> None:
        loss, _ = evaluate(model, looked_at, task.loss)
        test_loss, accuracy = evaluate(model, test, task.loss)
        rates = getattr(optimizer, "rates", {})
        work = seconds / float(np.mean(passes)) if passes else 0.0
        rows.append(
            {"step": step, "seconds": seconds, "work": work, "loss": loss, "test_loss": test_loss, "accuracy": accuracy}
            | {"rates": {k: v * optimizer.param_groups[0]["lr"] for k, v in rates.items()}}
        )

    record(0)
    stream = endless(batches, seed)
    for step in range(1, task.steps + 1):
        x, y = next(stream)
        start = time.process_time()
        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(partial(closure, x, y))
        else:
            closure(x, y)
            optimizer.step()
        seconds += time.process_time() - start
        if step % (task.steps // RECORDS) == 0:
            record(step)
    return {"task": name, "method": method, "setting": setting, "seed": seed, "rows": rows}


def path(name: str, method: str, setting: float, seed: int) -> Path:
    return RUNS / name / f"{method.replace(', ', '-').replace(' ', '-')}-{setting:g}-{seed}.json"


def done(name: str, method: str, setting: float, seed: int) -> dict[str, Any]:
    """The result of a run, trained if it is not there yet."""
    file = path(name, method, setting, seed)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        result = train(name, method, setting, seed)
        part = file.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(result))
        part.rename(file)
        last = result["rows"][-1]
        print(
            f"{name}  {method}  {setting:g}  seed {seed}  loss {last['loss']:.4f}  {last['accuracy']:.3f}", flush=True
        )
    return json.loads(file.read_text())


def chosen(name: str, method: str) -> float:
    """The setting of the lowest final training loss on the tuning seed; one that is not finite loses."""
    final = {setting: done(name, method, setting, TUNED_ON)["rows"][-1]["loss"] for setting in make(method)[1]}
    return min(final, key=lambda s: final[s] if math.isfinite(final[s]) else math.inf)


def runs(tasks: list[str], methods: list[str]) -> None:
    torch.set_num_threads(1)
    for name in tasks:
        for method in methods:
            best = chosen(name, method)
            for setting in {best, 1.0} if method == "SummaryNewton" else {best}:
                for seed in SEEDS:
                    done(name, method, setting, seed)
        if name == "lenet5-mnist":
            for seed in MORE_SEEDS:
                done(name, "SGD, momentum 0.9", 0.01, seed)
                done(name, "SummaryNewton", 1.0, seed)
            for seed in SEEDS:
                done(name, "SGD, momentum 0.9", 0.01, seed)
                for setting in DAMPING:
                    done(name, "SummaryNewton", setting, seed)
                for method in SENSITIVITY:
                    done(name, method, 1.0, seed)


# ---- the Dataset -----------------------------------------------------------------------------------------------------

VARIABLES = {
    "step": ("optimizer step", "1"),
    "seconds": ("CPU time of the steps, one thread", "s"),
    "work": ("gradient-equivalents: CPU time over that of a mean forward and backward pass", "1"),
    "loss": ("training loss, over the samples that the task looks at", "nats"),
    "test_loss": ("test loss", "nats"),
    "accuracy": ("test accuracy", "1"),
}


def gather() -> xr.Dataset:
    """All runs that are there, over (run, record); ``rates`` is (run, record, group), NaN where there is none."""
    results = [json.loads(file.read_text()) for file in sorted(RUNS.glob("*/*.json"))]
    shape = (len(results), RECORDS + 1)
    found = {
        k: (("run", "record"), np.array([[row[k] for row in r["rows"]] for r in results], float).reshape(shape))
        for k in VARIABLES
    }
    kept = [r for r in results if r["method"] in OURS and r["seed"] in SEEDS]
    labels = sorted({label for r in kept for label in r["rows"][-1]["rates"]})
    rates = np.full((*shape, len(labels)), np.nan)
    for i, r in enumerate(results):
        if r in kept:
            frame = pd.DataFrame([row["rates"] for row in r["rows"]]).reindex(columns=labels)
            rates[i] = frame.to_numpy(float)
    ds = xr.Dataset(
        {**found, "rates": (("run", "record", "group"), rates.astype("float32"))},
        coords={
            "group": labels,
            **{k: ("run", [str(r[k]) for r in results]) for k in ("task", "method")},
            **{k: ("run", [r[k] for r in results]) for k in ("setting", "seed")},
        },
        attrs={
            "torch_version": str(torch.__version__),
            "tuned_on": TUNED_ON,
            "seeds": list(SEEDS),
            "torch_threads": 1,
            "creation_library_version": ho.__version__,
        },
    )
    for k, (long_name, units) in VARIABLES.items():
        ds[k].attrs = {"long_name": long_name, "units": units}
    ds["rates"].attrs = {"long_name": "learning rate of a group, with the damping", "units": "1"}
    return ds


# ---- what limits a step ----------------------------------------------------------------------------------------------


def oracle(seed: int) -> pd.DataFrame:
    """A row for each measuring step of the first default (momentum, no rho): ``gain`` is by how much the loss of 1,000
    images falls, ``expected`` what their own D1 and D2 say of it, ``best`` the multiple of the rates at which these are
    lowest, ``possible`` the gain of the rates that the same solve makes of their D1 to D3, ``curvature`` the largest
    H-bar_ss of the optimizer over theirs."""
    task, rows = TASKS["lenet5-mnist"], []
    torch.manual_seed(seed)
    model, batches = task.model(), task.train()
    damping = 1.4  # 0.7 of the solution
    problem = ho.Problem(model, batches, task.loss)
    optimizer = ho.optim.SummaryNewton(problem, direction="momentum", slope="steps", damping=damping)
    images = data.Batches(batches.x[:1_000], batches.y[:1_000], 250)
    everything = Information(
        ho.Problem(model, images, task.loss), optimizer.partition, optimizer.information.request, batches=4
    )
    measure = optimizer._measure

    def measured(u: dict[str, Tensor]) -> None:
        measure(u)
        known, eta = everything.measure(u), damping * optimizer._eta
        g, h = known.tensors["D1"], known.tensors["D2"]
        h_diagonal = optimizer.information._scaled(optimizer.information._sums, known.norms)["D2"].diagonal()
        row = {"step": optimizer._steps, "gain": -everything.change(u, eta), "expected": g @ eta - eta @ h @ eta / 2}
        row |= {
            "best": g @ eta / (eta @ h @ eta),
            "possible": -everything.change(u, damping * optimizer.descent.rates(known)[0]),
        }
        rows.append(row | {"curvature": np.max(h_diagonal / h.diagonal())})

    optimizer._measure = measured
    stream = endless(batches, seed)
    for _ in range(task.steps):
        x, y = next(stream)
        optimizer.zero_grad()
        task.loss(model(x), y).backward()
        optimizer.step()
    return pd.DataFrame(rows).set_index("step")


def print_oracle(seed: int) -> None:
    torch.set_num_threads(1)
    rows = oracle(seed)
    print(rows.round(4).to_string())
    for start, end in ((10, 20), (30, 100), (110, 190)):
        part = rows.loc[start:end].sum()
        print(f"steps {start} to {end}: {part.gain / part.possible:.0%} of what the whole information would gain")


# ---- what a step costs -----------------------------------------------------------------------------------------------


def cost(model: nn.Module, train: data.Batches, cycles: int, options: dict[str, Any]) -> np.ndarray:
    """Seconds of a cycle of 10 steps of `SummaryNewton` over those of SGD, the two in turns, shape (cycles,)."""
    batches, ratios = list(train), []
    problem = ho.Problem(model, batches, F.cross_entropy)
    ours = ho.optim.SummaryNewton(problem, period=10, damping=1e-3, **options)
    sgd = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def cycle(optimizer: torch.optim.Optimizer) -> float:
        start = time.perf_counter()
        for i in range(10):
            x, y = batches[i % len(batches)]
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        return time.perf_counter() - start

    for optimizer in (sgd, ours):  # the capture of the program, once for a training
        cycle(optimizer)
    for _ in range(cycles):
        ratios.append((lambda base: cycle(ours) / base)(cycle(sgd)))
    return np.array(ratios)


#: The options that come with "cubic", for another regularization.
WITHOUT_D3 = {"curvature": "absolute", "slope": "confirmed", "average": 0.8, "backtracking": 0}


def print_cost(which: str, order: int, cycles: int, batch_size: int) -> None:
    torch.manual_seed(0)
    if which == "lenet5":
        model, train = models.LeNet5(), data.mnist5k("train", batch_size=batch_size, max_samples=10 * batch_size)
    else:
        model, train = models.VGG11Prime(), cifar10("train", 10 * batch_size)
        train = data.Batches(train.x, train.y, batch_size)
    options = {} if order == 3 else {"regularization": None, "direction": "adam", **WITHOUT_D3}
    ratios = cost(model, train, cycles, options)
    error = ratios.std(ddof=1) / math.sqrt(len(ratios))
    what = "D2 and the diagonal of D3" if order == 3 else "D2"
    print(
        f"{which}, {what}, batches of {batch_size}, {torch.get_num_threads()} threads: {ratios.mean():.3f} SGD steps, ",
        end="",
    )
    print(f"standard error {error:.3f} over {cycles} cycles; median {np.median(ratios):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--gather", action="store_true")
    parser.add_argument("--cost", choices=("lenet5", "vgg11"))
    parser.add_argument("--oracle", type=int, metavar="SEED")
    parser.add_argument("--order", type=int, choices=(2, 3), default=2)
    parser.add_argument("--cycles", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=100)
    options = parser.parse_args()
    if options.cost:
        return print_cost(options.cost, options.order, options.cycles, options.batch_size)
    if options.oracle is not None:
        return print_oracle(options.oracle)
    if not options.gather:
        runs(options.tasks, options.methods)
    STUDY.parent.mkdir(parents=True, exist_ok=True)
    ds = gather()
    ds.to_netcdf(STUDY, engine="h5netcdf", encoding={k: {"zlib": True} for k in ds.data_vars})
    print(f"{ds.sizes['run']} runs in {STUDY.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
