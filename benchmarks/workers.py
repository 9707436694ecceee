"""Two Dask workers against one process: 8 checkpoints of LeNet-5 over 5,000 MNIST images, torch on one thread each.

    python benchmarks/workers.py [--workers 2] [--checkpoints 8] [--order 3] [--repeat 3]

Prints the seconds of the serial run, of the workers once they have begun (each has imported torch, built its problem
and computed a first unit), and of the same from nothing: start of the cluster, imports, data, capture and self-check
included. The two stores must be equal byte for byte. docs/scale.md quotes what this printed.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import hoanalysis as ho
from hoanalysis.checkpoints import Run
from hoanalysis.cluster.clients import opened

RUN = Path(__file__).parent.parent / "data" / "lenet5-mnist"
BOUND = 0.65


def problem() -> ho.Problem:
    return ho.Problem(ho.models.LeNet5(), ho.data.mnist5k(split="all"), loss=F.cross_entropy)


def seconds(run: Run, order: int, store: Path, given: ho.Problem, client=None) -> float:
    begun = time.perf_counter()
    ho.summarize_run(run, given, order, keep_batches=20, store=store, client=client, progress=False)
    return time.perf_counter() - begun


def files(store: Path) -> dict[str, bytes]:
    return {str(p.relative_to(store)): p.read_bytes() for p in store.rglob("*") if p.is_file()}


def measured(workers: int, checkpoints: int, order: int, repeat: int, folder: Path) -> dict[str, float]:
    """Seconds; of what is repeated the medians, serial runs and runs of the workers in turns."""
    whole = ho.open_run(RUN)
    run, first = whole[:checkpoints], whole[checkpoints : checkpoints + 1]
    here, there = problem(), problem()
    seconds(first, order, folder / "first", here)  # captures and checks are paid here, as they are on the workers
    begun = time.perf_counter()
    with opened(workers=workers, threads=1, say=lambda _: None) as client:
        up = time.perf_counter() - begun
        cold = seconds(run, order, folder / "cold", there, client)
        serial, warm = [], []
        for k in range(repeat):
            serial.append(seconds(run, order, folder / f"serial{k}", here))
            warm.append(seconds(run, order, folder / f"warm{k}", there, client))
            print(f"serial {serial[-1]:.2f} s, workers {warm[-1]:.2f} s", flush=True)
    for store in folder.glob("[cw]*"):
        assert files(store) == files(folder / "serial0"), f"the store {store.name} is not the serial one"
    found = {"serial": statistics.median(serial), "started": statistics.median(warm)}
    return {**found, "from nothing": up + cold, "start of the cluster": up}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--checkpoints", type=int, default=8)
    parser.add_argument("--order", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = measured(given.workers, given.checkpoints, given.order, given.repeat, Path(folder))
    for name, value in found.items():
        print(f"{name:22} {value:7.2f} s   {value / found['serial']:.2f} of serial")
    print("stores equal byte for byte")
    if found["started"] > BOUND * found["serial"]:
        raise SystemExit(f"more than {BOUND} of the serial time")


if __name__ == "__main__":  # workers import this file
    main()
