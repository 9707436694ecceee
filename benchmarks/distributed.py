"""Two Dask workers against one process: 8 checkpoints of LeNet-5 over 5,000 MNIST images, torch on one thread each.

    python benchmarks/distributed.py [--workers 2] [--checkpoints 8] [--order 3] [--repeat 1]

Prints the seconds of the serial run, of the workers once they have begun (each has imported torch, built its problem
and computed a first unit), and of the same from nothing: start of the cluster, imports, data, capture and self-check
included. The two stores must be equal byte for byte. docs/scale.md quotes what this printed.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import hoanalysis as ho
from hoanalysis.cluster.clients import opened

RUN = Path(__file__).parent.parent / "data" / "lenet5-mnist"
BOUND = 0.65


def problem() -> ho.Problem:
    return ho.Problem(ho.models.LeNet5(), ho.data.mnist5k(split="all"), loss=F.cross_entropy)


def seconds(run: ho.Run, order: int, store: Path, given: ho.Problem, client=None) -> float:
    begun = time.perf_counter()
    ho.summarize_run(run, given, order, keep_batches=20, store=store, client=client, progress=False)
    return time.perf_counter() - begun


def files(store: Path) -> dict[str, bytes]:
    return {str(p.relative_to(store)): p.read_bytes() for p in store.rglob("*") if p.is_file()}


def measured(workers: int, checkpoints: int, order: int, folder: Path) -> dict[str, float]:
    whole = ho.open_run(RUN)
    run, first = whole[:checkpoints], whole[checkpoints : checkpoints + workers]
    here = problem()
    seconds(first[:1], order, folder / "first", here)  # captures and checks are paid here, as they are on the workers
    serial = seconds(run, order, folder / "serial", here)
    begun = time.perf_counter()
    with opened(workers=workers, threads=1, say=lambda _: None) as client:
        up = time.perf_counter() - begun
        there = problem()
        cold = seconds(run, order, folder / "cold", there, client)
        warm = seconds(run, order, folder / "warm", there, client)
    for name in ("cold", "warm"):
        assert files(folder / name) == files(folder / "serial"), f"the {name} store is not the serial one"
    return {"serial": serial, "started": warm, "from nothing": up + cold, "start of the cluster": up}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--checkpoints", type=int, default=8)
    parser.add_argument("--order", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for k in range(given.repeat):
        with tempfile.TemporaryDirectory() as folder:
            found = measured(given.workers, given.checkpoints, given.order, Path(folder))
        for name, value in found.items():
            print(f"{k}  {name:22} {value:7.2f} s   {value / found['serial']:.2f} of serial")
        print(f"{k}  {'holds' if found['started'] <= BOUND * found['serial'] else 'does NOT hold'}: at most {BOUND}")
    print("stores equal byte for byte")


if __name__ == "__main__":  # workers import this file
    main()
