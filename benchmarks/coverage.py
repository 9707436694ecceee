"""Do the intervals hold what they promise? Batches of the MNIST run are drawn with replacement, again and again.

    python benchmarks/coverage.py                                  # both parts, table to the terminal
    python benchmarks/coverage.py --repeats 200 --out docs/coverage
    python benchmarks/coverage.py --bootstrap 60 --repeats 100     # would a bootstrap over the blocks do better? (480)

The batches of the run are the whole population: what they give together is the truth. A repeat draws as many of them
with replacement, computes estimates and 95 % intervals as a user would, and looks which intervals hold the truth.

    fixed       u is the gradient over all batches, the same in every repeat: each batch's D1, D2 and diagonal of D3
                are computed once, and a repeat adds up the drawn ones as one pass over them would.
    gradient    u is the gradient over the drawn batches: ho.summarize runs anew in every repeat, with unconditional
                errors; and once more with conditional ones, for comparison.

An interval is estimate +- t se, with Student's t of (pieces - 1) degrees of freedom at 97.5 %; the pieces are the
batches for D1 and D2 with u fixed, and the kept blocks for whatever is computed from blocks. ``normal`` is the coverage
with 1.96 in place of t. ``width`` is the median of the standard errors over the spread of the estimates (their standard
deviation over the repeats), the median over the entries of a quantity. With ``--out NAME`` the table is written to
NAME.md and every entry to the Dataset NAME.nc. The whole takes about an hour on a core, a minute of it for fixed.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import xarray as xr
from scipy.stats import t as student
from torch import Tensor

import hoanalysis as ho
from hoanalysis import schema, summaries, units
from hoanalysis.analysis.arrays import kept_blocks
from hoanalysis.analysis.interactions import shares
from hoanalysis.analysis.regularized import Solver, needed

RUN = Path(__file__).parents[1] / "data" / "lenet5-mnist"
BLOCKS = 20  # as `hoanalysis report` keeps them
LEVEL = 0.95
TARGET = {"pooled": (0.90, 0.99), "worst": 0.80, "width": 1.3}

Batch = tuple[Tensor, Tensor]
Estimates = dict[str, tuple[np.ndarray, np.ndarray, int]]  # quantity -> value, standard error, pieces


# ---- what a user reads ----------------------------------------------------------------------------------------------


def estimates(ds: xr.Dataset) -> Estimates:
    """Values, standard errors and how many pieces these come from."""
    batches = int(ds["n_batches"]) if conditional(ds) else ds.sizes[schema.BATCH]
    upper = np.triu_indices(ds.sizes[schema.GROUP])
    found: Estimates = {
        "D1": (ds["D1"].values, ds["D1_se"].values, batches),
        "D2": (ds["D2"].values[upper], ds["D2_se"].values[upper], batches),
    }
    for regularization in ("r", "ridge", None):
        rates = ds.ho.learning_rates(regularization)
        name = f"learning rates ({regularization or 'plain'})"
        found[name] = (rates["learning_rates"].values, rates["learning_rates_se"].values, ds.sizes[schema.BATCH])
    share = shares(ds)
    for name in ("off_block", "off_block_raw"):
        value, error = (np.atleast_1d(share[n].values) for n in (name, f"{name}_se"))
        found[name.replace("_", "-", 1).replace("_", ", ") + " share"] = (value, error, ds.sizes[schema.BATCH])
    return found


def conditional(ds: xr.Dataset) -> bool:
    return not str(ds.attrs.get("standard_errors", "conditional")).startswith("unconditional")


# ---- the two ways to repeat -----------------------------------------------------------------------------------------


def problem_of(model: torch.nn.Module, batches: list[Batch]) -> ho.Problem:
    return ho.Problem(model, batches, F.cross_entropy)


def fixed(model: torch.nn.Module, batches: list[Batch], draws: np.ndarray) -> Iterator[xr.Dataset]:
    """First the truth, then a Dataset for each row of ``draws``; u is the gradient over all batches."""
    problem = problem_of(model, batches)
    settings = summaries.Settings(2, diagonal=3, keep_batches=2 * len(batches), self_check=False)
    work = summaries.Work(problem, settings)
    plan = work.plan([{"step": 0, "sha256": "", "units": [{}]}], series=False)
    whole = work.sums(None, progress=False).dataset()
    weights = whole["weight"].values
    names = units.quantities(whole)
    means = {k: (whole[f"{k}_batch"].values.T / weights).T for k in names}
    norms = {k: whole[k].values for k in schema.GROUP_COORDS_BY_STEP}

    def dataset(index: np.ndarray) -> xr.Dataset:
        sums = units.Accumulator(BLOCKS)
        for b in index:
            sums.add({k: means[k][b] for k in names}, float(weights[b]), len(batches[b][1]))
        unit = sums.unit(norms, {"engine": "", "engine_detail": ""})
        return units.assemble(plan, lambda _: unit)

    yield dataset(np.arange(len(batches)))
    yield from map(dataset, draws)


def gradient(
    model: torch.nn.Module, batches: list[Batch], draws: np.ndarray, errors: str = "unconditional"
) -> Iterator[xr.Dataset]:
    """First the truth, then a Dataset for each row of ``draws``; u is the gradient over the drawn batches."""
    for index in itertools.chain([np.arange(len(batches))], draws):
        problem = problem_of(model, [batches[b] for b in index])
        yield ho.summarize(
            problem, 2, diagonal=3, keep_batches=BLOCKS, errors=errors, self_check=False, progress=False
        )  # fmt: skip


# ---- another way to an interval -------------------------------------------------------------------------------------


def bootstrapped(step: int, repeats: int, resamples: int, seed: int) -> pd.DataFrame:
    """Learning rates with u fixed: the jackknife beside a bootstrap that draws the kept blocks with replacement, by its
    standard deviation and by its percentiles."""
    model, batches = model_at(step), list(ho.data.mnist5k("all", batch_size=128, max_samples=5000))
    draws, rng, rows = draw(len(batches), repeats, seed), np.random.default_rng(seed), []
    datasets = list(fixed(model, batches, draws))
    for regularization in ("r", None):
        held: dict[str, list] = {"jackknife": [], "bootstrap": [], "percentiles": []}
        truth = datasets[0].ho.learning_rates(regularization)["learning_rates"].values
        for ds in datasets[1:]:
            names = needed(ds, regularization)
            solve, blocks = Solver.of(ds, regularization, 1.0), kept_blocks(ds, names)
            assert blocks is not None
            n, again = len(blocks), []
            for _ in range(resamples):
                k = rng.integers(0, n, n)
                total = blocks.weight[k].sum()
                again.append(solve({name: x[k].sum(0) / total for name, x in blocks.sums.items()}))
            rates = ds.ho.learning_rates(regularization)
            away, t = np.abs(rates["learning_rates"].values - truth), student.ppf((1 + LEVEL) / 2, n - 1)
            low, high = np.quantile(again, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
            held["jackknife"].append(away <= t * rates["learning_rates_se"].values)
            held["bootstrap"].append(away <= t * np.std(again, axis=0) * np.sqrt(n / (n - 1)))
            held["percentiles"].append((low <= truth) & (truth <= high))
        for way, inside in held.items():
            each = np.mean(inside, axis=0)
            row = {"rates": regularization or "plain", "interval": way, "pooled": each.mean(), "worst": each.min()}
            rows.append(row | {"entry": datasets[0][schema.GROUP].values[each.argmin()]})
    return pd.DataFrame(rows)


# ---- coverage -------------------------------------------------------------------------------------------------------


def coverage(datasets: Iterator[xr.Dataset], report: Callable[[int], None] = lambda _: None) -> xr.Dataset:
    """Of every entry of every quantity: coverage with t and with 1.96, the spread, and the width of the errors."""
    truth = estimates(next(datasets))
    values: dict[str, list] = {k: [] for k in truth}
    for i, ds in enumerate(datasets):
        for k, (value, error, pieces) in estimates(ds).items():
            values[k].append((value, error, np.full_like(value, student.ppf((1 + LEVEL) / 2, pieces - 1))))
        report(i + 1)
    frames = []
    for k, (true, _, _) in truth.items():
        value, error, quantile = np.moveaxis(np.array(values[k]), 1, 0)
        known = np.isfinite(true) & np.isfinite(value).all(0) & (error.max(0) > 0)
        away = np.abs(value - true)[:, known]
        error, quantile, value = error[:, known], quantile[:, known], value[:, known]
        spread = value.std(0, ddof=1)
        middle = np.subtract(*np.quantile(value, [0.8413, 0.1587], axis=0)) / 2
        columns = {
            "truth": true[known],
            "t": (away <= quantile * error).mean(0),
            "normal": (away <= 1.959964 * error).mean(0),
            "bias": (value.mean(0) - true[known]) / spread,
            "width": np.median(error, axis=0) / spread,
            "width_of_middle": np.median(error, axis=0) / middle,
        }
        frame = pd.DataFrame(columns)
        frame.insert(0, "quantity", k)
        frame.insert(1, "entry", np.flatnonzero(known))
        frames.append(frame)
    return xr.Dataset(pd.concat(frames, ignore_index=True)).rename(dim_0="row").drop_vars("row")


def table(found: xr.Dataset) -> pd.DataFrame:
    """A row for each part, step and quantity."""
    rows = []
    for key, part in found.to_dataframe().groupby(["part", "step", "quantity"], sort=False):
        pooled, worst, width = part["t"].mean(), part["t"].min(), part["width"].median()
        low, high = TARGET["pooled"]
        met = low <= pooled <= high and worst >= TARGET["worst"] and 1 / TARGET["width"] <= width <= TARGET["width"]
        rows.append(
            {
                **dict(zip(("part", "step", "quantity"), key, strict=True)),
                "entries": len(part),
                "pooled": f"{pooled:.1%}",
                "worst": f"{worst:.1%}",
                "normal": f"{part['normal'].mean():.1%}",
                "width": f"{width:.2f}",
                "width of the middle": f"{part['width_of_middle'].median():.2f}",
                "bias": f"{part['bias'].median():+.2f}",
                "met": "yes" if met else "no",
            }
        )
    return pd.DataFrame(rows)


def draw(n: int, repeats: int, seed: int) -> np.ndarray:
    """``repeats`` rows of n batches out of n, with replacement."""
    return np.random.default_rng(seed).integers(0, n, size=(repeats, n))


def model_at(step: int) -> torch.nn.Module:
    run, model = ho.open_run(RUN), ho.models.LeNet5(in_channels=1, n_classes=10, activation="relu")
    model.load_state_dict(run[run.steps.index(step)].state_dict)
    return model


def run_part(part: str, step: int, repeats: int, batch_size: int, images: int, seed: int) -> xr.Dataset:
    model = model_at(step)
    batches = list(ho.data.mnist5k("all", batch_size=batch_size, max_samples=images))
    draws = draw(len(batches), repeats, seed)
    start = time.perf_counter()

    def report(i: int) -> None:
        if i % 20 == 0:
            print(f"{part}, step {step}: {i} of {repeats}, {time.perf_counter() - start:.0f} s", flush=True)

    how = {
        "fixed": lambda: fixed(model, batches, draws),
        "gradient": lambda: gradient(model, batches, draws),
        "gradient, conditional": lambda: gradient(model, batches, draws, "conditional"),
    }[part]
    found = coverage(how(), report)
    return found.assign(part=("row", [part] * found.sizes["row"]), step=("row", [step] * found.sizes["row"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["fixed", "gradient", "gradient, conditional"])
    parser.add_argument("--steps", nargs="+", type=int, default=[0, 40, 160, 480], help="checkpoints, with u fixed")
    parser.add_argument("--gradient-steps", nargs="+", type=int, default=[0, 40, 480], help="with u computed anew")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--images", type=int, default=1000, help="for the parts where u is computed anew")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--bootstrap", type=int, metavar="N", help="only compare the jackknife with N resamples")
    args = parser.parse_args()
    if args.bootstrap:
        compared = bootstrapped(480, args.repeats, args.bootstrap, args.seed)
        print(compared.to_string(index=False, formatters={"pooled": "{:.1%}".format, "worst": "{:.1%}".format}))
        return
    found = []
    for part in args.parts:
        size, images, steps = (128, 5000, args.steps) if part == "fixed" else (25, args.images, args.gradient_steps)
        found += [run_part(part, step, args.repeats, size, images, args.seed) for step in steps]
    whole = xr.concat(found, "row").assign_attrs(repeats=args.repeats, blocks=BLOCKS, level=LEVEL, seed=args.seed)
    print(table(whole).to_string(index=False))
    if args.out is not None:
        args.out.with_suffix(".md").write_text(markdown(table(whole)))
        whole.to_netcdf(args.out.with_suffix(".nc"), engine="h5netcdf")


def markdown(frame: pd.DataFrame) -> str:
    lines = [frame.columns, ["---"] * len(frame.columns), *frame.itertuples(index=False)]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


if __name__ == "__main__":
    main()
