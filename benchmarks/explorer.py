"""How long a slider move takes: in the kernel, and from the key press to the new picture in a browser.

    python benchmarks/explorer.py              # the table of docs/explorer.md
    python benchmarks/explorer.py --browser    # the same in JupyterLab in Chromium; starts a server of its own

S groups, order 3 (a slice of D3 with its errors over 8 kept blocks), the matrix and the learning rates beside it, 21
moves to checkpoints that were not shown before, after one that was. Medians and the slowest.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import xarray as xr

import hoanalysis as ho
from hoanalysis.analysis.errorbars import error_of_mean

ROOT = Path(__file__).parents[1]
MOVES, BLOCKS = 21, 8


def series(size: int, steps: int = MOVES + 1, blocks: int = BLOCKS) -> xr.Dataset:
    """Summaries of a random model to order 3 with kept blocks, in float32 where they are large."""
    from hoanalysis import schema

    rng = np.random.default_rng(0)
    names = [f"layer{i // 2}.{'bias' if i % 2 else 'weight'}" for i in range(size)]
    weight = np.full(blocks, 64.0)
    found: dict = {
        "loss": ("step", rng.uniform(1, 2, steps)),
        "weight": (("step", "batch"), np.tile(weight, (steps, 1))),
    }
    for d in (1, 2, 3):
        dims = schema.group_dims(d)
        mean = rng.normal(size=(steps, *[size] * d)).astype("f4")
        kept = rng.normal(size=(steps, blocks, *[size] * d)).astype("f4")
        if d == 2:
            mean = np.stack([m @ m.T + np.eye(size, dtype="f4") for m in mean])
            kept = kept + kept.swapaxes(-1, -2)
        kept = 0.1 * kept + mean[:, None]
        mean = kept.mean(1)
        errors = np.stack([error_of_mean(k, weight.astype("f4")) for k in kept])
        found |= {f"D{d}": (("step", *dims), mean), f"D{d}_se": (("step", *dims), errors)}
        found[f"D{d}_batch"] = (("step", "batch", *dims), kept * np.float32(64))
    coords = {schema.group_dim(i): names for i in range(3)} | {"step": np.arange(steps)}
    coords |= {
        "layer": ("group", [n.split(".")[0] for n in names]),
        "kind": ("group", [n.split(".")[1] for n in names]),
    }
    attrs = dict.fromkeys(schema.ATTRS, "") | {"schema_version": schema.SCHEMA_VERSION, "order": 3, "dtype": "float64"}
    return xr.Dataset(found, coords, attrs | {"direction": "gradient", "partition": "canonical"})


def in_kernel(ds: xr.Dataset, state: dict) -> list[tuple[float, float]]:
    """Seconds of each move, by the wall's clock and by the processor's."""
    explorer = ho.explore(ds, state={**state, "step": 0})
    controls, found = explorer.controls, []
    gc.collect()
    for step in range(1, ds.sizes["step"]):
        before, wall, own = controls.images["matrix"].value, time.perf_counter(), time.process_time()
        controls.step.value = step
        found.append((time.perf_counter() - wall, time.process_time() - own))
        if controls.images["matrix"].value == before or controls.message.value:
            raise RuntimeError(controls.message.value or "the picture did not change")
    return found


def in_browser(ds: xr.Dataset, order: int) -> list[float]:
    """Seconds from the key press until the browser has the new picture and the new sentence."""
    sys.path.insert(0, str(ROOT))
    from tests.explorer import lab

    with tempfile.TemporaryDirectory() as folder, lab.serve(Path(folder), ds) as (address, _):
        return lab.move_times(address, ds.sizes["step"] - 1, order)


def told(name: str, values: list[float]) -> str:
    ms = 1e3 * np.asarray(values)
    return f"| {name} | {np.median(ms):.0f} | {ms.max():.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--browser", action="store_true", help="in Chromium instead of the kernel alone")
    parser.add_argument("--size", type=int, nargs="+", default=[18, 100], help="numbers of groups")
    parser.add_argument("--moves", type=int, default=MOVES)
    given = parser.parse_args()
    print(f"{given.moves} moves, {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    print("| move | median, ms | slowest, ms |\n|---|---|---|")
    for size in given.size:
        ds = series(size, given.moves + 1)
        if given.browser:
            for order, name in ((2, "H-bar"), (3, "slice of D3")):
                print(told(f"S = {size}, {name}, browser", in_browser(ds, order)), flush=True)
            continue
        views = {
            "slice of D3": {"order": 3},
            "H-bar": {},
            "inverse, merged by layer": {"matrix": "inverse", "grouping": "layer"},
        }
        for name, state in views.items():
            times = in_kernel(ds, state)
            print(told(f"S = {size}, {name}, kernel", [wall for wall, _ in times]), flush=True)
            print(told(f"S = {size}, {name}, kernel, processor time", [own for _, own in times]), flush=True)


if __name__ == "__main__":
    main()
