"""Does the autopsy find what was planted, and how well is a training step predicted?

    python benchmarks/postmortem.py FOLDER                    # the ten practice runs and the diverged one
    python benchmarks/postmortem.py FOLDER --what variants    # other tensors, factors, epochs, activations, seeds, Adam
    python benchmarks/postmortem.py FOLDER --what fresh       # faults drawn at random, looked at once all was fixed
    python benchmarks/postmortem.py FOLDER --what prediction  # single steps of tanh LeNets, by order and by data

Runs are trained by data/make_runs.py into FOLDER and summarized there on 512 training images (order 3 along to:next,
norms along gradient and weights; of the diverged run the slopes along the steps as well, which none of the planted
faults is told by); what is there already is not made again. Tables go to the terminal as Markdown, as
they stand in docs/postmortem.md.

A planted fault counts as found where the first alarm names it: the group and "learning rate" (or "does not move"), or
the kind. Of a healthy run any alarm is a false one.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import xarray as xr

import hoanalysis as ho
from hoanalysis import data, models
from hoanalysis.analysis.autopsy import Autopsy, autopsy
from hoanalysis.analysis.path import stored
from hoanalysis.analysis.prediction import prediction

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("make_runs", ROOT / "data" / "make_runs.py")
assert spec is not None
assert spec.loader is not None
make_runs: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_runs)
Fault = make_runs.Fault

SAMPLES, BLOCKS = 512, 16
ORDERS = {"to:next": 3, "gradient": 1, "weights": 1}
KIND = {"rate": "learning rate", "labels": "data", "momentum": "momentum", "decay": "weight decay"}


@dataclass(frozen=True)
class Planned:
    """A run: its fault, and the settings of `make_runs.practice`."""

    name: str
    fault: Any
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def activation(self) -> str:
        return self.settings.get("activation", "tanh")


def planted() -> list[Planned]:
    runs = [Planned(name, fault) for name, fault in make_runs.FAULTS.items()]
    return runs + [Planned(f"healthy-{s}", make_runs.HEALTHY, s) for s in make_runs.SEEDS]


RELU = {"activation": "relu", "rate": 0.02}
ADAM = {"rate": 1e-3, "adam": True}


def variants() -> list[Planned]:
    """Seeds from 10 on, so that none is one of those above."""
    rates = [
        ("conv1.weight", 30, 2, {}),
        ("conv2.weight", 10, 2, {}),
        ("fc1.weight", 10, 2, {}),
        ("fc1.weight", 30, 0, {}),
        ("fc2.weight", 100, 2, {}),
        ("fc3.weight", 30, 4, {}),
        ("fc1.bias", 30, 2, {}),
        ("conv2.weight", 10, 2, RELU),
        ("fc1.weight", 30, 2, RELU),
        ("fc3.weight", 100, 0, RELU),
        ("conv1.weight", 0, 0, RELU),
        ("fc3.bias", 0, 4, {}),
    ]
    faults = [(Fault("rate", float(factor), tensor, epoch), s) for tensor, factor, epoch, s in rates]
    faults += [(Fault("labels", epoch=e), s) for e, s in ((1, {}), (4, {}), (2, RELU))]
    faults += [
        (Fault("momentum", m, epoch=e), s) for m, e, s in ((1.02, 2, {}), (1.1, 2, {}), (1.05, 1, {}), (1.05, 2, RELU))
    ]
    faults += [
        (Fault("decay", f, epoch=e), s) for f, e, s in ((30.0, 0, {}), (300.0, 2, {}), (100.0, 0, {}), (100.0, 2, RELU))
    ]
    runs = [Planned(f"{s.get('activation', 'tanh')}-{_short(f)}", f, 10 + i, s) for i, (f, s) in enumerate(faults)]
    runs += [Planned(f"tanh-healthy-{s}", make_runs.HEALTHY, s) for s in range(50, 55)]
    runs += [Planned(f"relu-healthy-{s}", make_runs.HEALTHY, s, RELU) for s in range(60, 65)]
    runs += [Planned(f"adam-healthy-{s}", make_runs.HEALTHY, s, ADAM) for s in range(70, 73)]
    return runs


def fresh(count: int = 20) -> list[Planned]:
    """Faults drawn at random, from seeds that nothing was looked at with: kind, tensor, factor, epoch, activation."""
    rng = np.random.default_rng(2026)
    names = [n for n, _ in models.LeNet5().named_parameters()]
    drawn = {
        "": lambda: make_runs.HEALTHY,
        "rate": lambda: Fault("rate", float(rng.choice([10, 30, 100])), str(rng.choice(names)), int(rng.integers(5))),
        "still": lambda: Fault("rate", 0.0, str(rng.choice(names)), int(rng.integers(5))),
        "labels": lambda: Fault("labels", epoch=int(rng.integers(1, 5))),
        "momentum": lambda: Fault("momentum", float(rng.choice([1.03, 1.05, 1.1])), epoch=int(rng.integers(1, 4))),
        "decay": lambda: Fault("decay", float(rng.choice([100, 200])), epoch=int(rng.integers(4))),
    }
    runs = []
    for i, kind in zip(range(count), itertools.cycle(["rate", "", "labels", "momentum", "decay", "", "still"])):
        fault, settings = drawn[kind](), RELU if rng.random() < 0.5 else {}
        name = _short(fault) if fault.kind else "healthy"
        runs.append(Planned(f"fresh-{i}-{settings.get('activation', 'tanh')}-{name}", fault, 100 + i, settings))
    return runs + [Planned(f"fresh-adam-healthy-{s}", make_runs.HEALTHY, s, ADAM) for s in range(130, 133)]


def _short(fault: Any) -> str:
    number = (
        f"-x{fault.factor:g}" if fault.kind in ("rate", "decay") else f"-{fault.factor:g}" * (fault.kind == "momentum")
    )
    return f"{fault.kind}{number}{'-' * bool(fault.tensor)}{fault.tensor}-epoch{fault.epoch}"


# ---- training and summaries, each once -------------------------------------------------------------------------------


def trained(planned: Planned, folder: Path) -> Path:
    """The folder of the run. A run is whole once its description is written, last."""
    out, told = folder / planned.name, json.dumps(asdict(planned), sort_keys=True)
    done = out / "planned.json"
    if not done.exists() or done.read_text() != told:
        out.mkdir(parents=True, exist_ok=True)
        make_runs.fresh(out)
        for old in out.glob("*.nc"):
            old.unlink()
        make_runs.practice(out, planned.fault, planned.seed, **planned.settings)
        done.write_text(told)
    return out


def summarized(folder: Path, activation: str, width: float = 1.0, **options: Any) -> dict[str, xr.Dataset]:
    found = {}
    for direction, order in ORDERS.items():
        file = folder / f"{direction.replace(':', '-')}.nc"
        if not file.exists():
            batches = data.mnist5k("train", batch_size=SAMPLES // BLOCKS, max_samples=SAMPLES)
            problem = ho.Problem(models.LeNet5(activation=activation, width=width), batches, loss=F.cross_entropy)
            more = options if direction == "to:next" else {}
            ds = ho.summarize_run(ho.open_run(folder), problem, order, direction=direction, keep_batches=BLOCKS,
                                  self_check=False, progress=False, **more)  # fmt: skip
            ds.to_netcdf(file.with_suffix(".part"), engine="h5netcdf")
            file.with_suffix(".part").rename(file)
        with xr.open_dataset(file, engine="h5netcdf") as ds:
            found[direction] = ds.load()
    return found


def looked_into(folder: Path, activation: str, width: float = 1.0, **options: Any) -> Autopsy:
    ds = summarized(folder, activation, width, **options)
    log = pd.read_csv(folder / "log.csv")
    return autopsy(ds["to:next"], gradient=ds["gradient"], weights=ds["weights"], log=log)


# ---- verdicts --------------------------------------------------------------------------------------------------------


def judged(planned: Planned, found: Autopsy) -> dict[str, Any]:
    """A row of the table: what was planted, what the first alarm names, and whether they are the same."""
    alarms = found.suspects[found.suspects["alarm"]]
    first = alarms.iloc[0] if len(alarms) else None
    said = "no alarm" if first is None else " ".join([first["kind"], *first["groups"][:1]])
    wanted = "no alarm"
    if planned.fault.kind:
        kind = "does not move" if planned.fault.factor == 0 else KIND[planned.fault.kind]
        wanted = " ".join([kind, planned.fault.tensor]).strip()
    broke = "" if found.broke is None else f"{found.broke.step}"
    since = "" if first is None else f"{first['step']}"
    others = ", ".join(dict.fromkeys(alarms["kind"].iloc[1:]))
    return {"run": planned.name, "seed": planned.seed, "planted": wanted, "first alarm": said, "since step": since,
            "broke at": broke, "other alarms": others, "right": "yes" if said == wanted else "NO"}  # fmt: skip


def verdicts(plans: list[Planned], folder: Path) -> pd.DataFrame:
    rows = []
    for planned in plans:
        rows.append(judged(planned, looked_into(trained(planned, folder), planned.activation)))
        print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def hit_rate(frame: pd.DataFrame) -> pd.DataFrame:
    kind = frame["planted"].str.replace(r" (conv|fc).*", "", regex=True)
    hits = frame.assign(kind=kind, hit=frame["right"] == "yes").groupby("kind", sort=False)["hit"]
    return pd.DataFrame({"runs": hits.size(), "right": hits.sum()}).reset_index()


def markdown(frame: pd.DataFrame) -> str:
    rows = [list(map(str, frame.columns)), ["---"] * len(frame.columns), *frame.astype(str).values.tolist()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def diverged(folder: Path) -> None:
    """The shipped run that its learning rate broke; its summaries go to FOLDER."""
    out = folder / "lenet5-mnist-diverged"
    out.mkdir(parents=True, exist_ok=True)
    for file in (ROOT / "data" / "lenet5-mnist-diverged").iterdir():
        if not (out / file.name).exists():
            (out / file.name).write_bytes(file.read_bytes())
    steps = out / "to-next.nc"
    if steps.exists() and not stored(xr.load_dataset(steps, engine="h5netcdf")):
        steps.unlink()
    found = looked_into(out, "tanh", 0.5, measure=("along", "path"))
    print("\n".join(["", "lenet5-mnist-diverged:", *found.verdict, ""]))
    print(markdown(found.terms.head(8)[["order", "term", "value", "se"]].map(_told)) + "\n")
    print(markdown(found.shares[["group", "share", "share_se", "left_out", "polynomial", "polynomial_se"]].map(_told)))
    print(f"\npredicted {found.predicted:.3f}, measured {found.measured:.3f} ± {found.measured_se:.3f}")


def _told(value: Any) -> Any:
    return f"{value:+.4f}" if isinstance(value, float) else value


# ---- prediction ------------------------------------------------------------------------------------------------------


def predicted(folder: Path) -> pd.DataFrame:
    """Single steps of healthy tanh LeNets: how many are predicted within 10 %, by order and by the data of the loss.

    "data": the 512 images of the summaries. "batch": the very batch that training took the step on.
    """
    rows = []
    for seed in make_runs.SEEDS:
        planned = Planned(f"healthy-{seed}", make_runs.HEALTHY, seed)
        run = trained(planned, folder)
        told = prediction(summarized(run, "tanh")["to:next"])
        single = np.flatnonzero(told["steps"].values == 1)
        rows += [_counted("data", seed, told.isel(step=single))]
        rows += [_counted("batch", seed, on_the_batch(run, seed))]
        print(rows[-2:], flush=True)
    return pd.DataFrame(rows)


def on_the_batch(run: Path, seed: int) -> xr.Dataset:
    """The prediction of each single step on the batch that it was taken on."""
    checkpoints, train, parts = ho.open_run(run), data.mnist5k("train", batch_size=100), []
    batches = {
        epoch * make_runs.EPOCH + i: batch
        for epoch in range(make_runs.EPOCHS)
        for i, batch in enumerate(make_runs.shuffled(train, seed=1000 * (seed + 1) + epoch))
    }
    model = models.LeNet5(activation="tanh")
    for i, step in enumerate(checkpoints.steps[:-1]):
        if checkpoints.steps[i + 1] == step + 1:
            problem = ho.Problem(model, data.Batches(*batches[step], 100), loss=F.cross_entropy)
            ds = ho.summarize_run(checkpoints[i : i + 2], problem, 3, direction="to:next", measure=("along",),
                                  taus=(1.0,), self_check=False, progress=False)  # fmt: skip
            parts.append(prediction(ds).isel(step=[0]).drop_vars("step"))
    return xr.concat(parts, "step", coords="minimal", compat="override", data_vars="all")


def _counted(which: str, seed: int, told: xr.Dataset) -> dict[str, Any]:
    left = abs(told["unexplained"].transpose("order", "step").values)
    measured = abs(told["measured"].values)
    row = {"loss on": which, "seed": seed, "steps": len(measured)}
    for order in (1, 2, 3):
        row[f"order {order}"] = f"{(left[order - 1] <= 0.1 * measured).mean():.0%}"
    row["median error 1"], row["median error 2"], row["median error 3"] = (
        f"{np.median(e / measured):.1%}" for e in left[:3]
    )
    row["3 beats 2"] = f"{(left[2] < left[1]).mean():.0%}"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--what", choices=["planted", "variants", "fresh", "prediction"], default="planted")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.what == "prediction":
        print(markdown(predicted(given.folder)))
        return
    plans = {"planted": planted, "variants": variants, "fresh": fresh}[given.what]()
    frame = verdicts(plans, given.folder)
    print("\n" + markdown(frame) + "\n\n" + markdown(hit_rate(frame)))
    if given.what == "planted":
        diverged(given.folder)


if __name__ == "__main__":
    main()
