"""How H-bar of LeNet-5 depends on the batch behind u: the gradient over few images in place of all 50,000.

    python benchmarks/behind_u.py --out data/paper-figures/behind_u.nc

Needs CIFAR-10 in data/. At the epochs 1 and 21 of lenet5-cifar10, u is the gradient over each of four disjoint sets of
125, 1,250 and 12,500 training images, drawn in an order of its own; D1 and D2 are over the first 4,000 training images
throughout. The spread over the draws is what a user of one such batch would not see.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
import xarray as xr

import hoanalysis as ho
from hoanalysis import data, models
from hoanalysis.checkpoints import Checkpoint
from hoanalysis.store import export

STEPS = (400, 8400)
IMAGES = (125, 1250, 12500)
DRAWS = 4
SUBSET = 4000
BLOCKS = 16


def summaries(images: data.Batches, checkpoint: Checkpoint, n: int, draw: int) -> xr.Dataset:
    """D1 and D2 over the first images, along the gradient over the ``draw``-th set of ``n``."""
    order = torch.randperm(images.n_samples, generator=torch.Generator().manual_seed(0))[n * draw : n * (draw + 1)]
    behind = data.Batches(images.x[order], images.y[order], images.batch_size)
    problem = ho.Problem(models.LeNet5(in_channels=3), images.take(SUBSET), F.cross_entropy, direction_data=behind)
    ds = ho.summarize(problem, 2, checkpoint=checkpoint, dtype="float32", keep_batches=BLOCKS, progress=False)
    print(f"step {checkpoint.step}, {n} images, draw {draw}", flush=True)
    return ds.assign_coords(images=n, draw=draw, step=checkpoint.step)


def along(dim: str, parts: list[xr.Dataset]) -> xr.Dataset:
    return xr.concat(parts, dim, coords="different", compat="equals", join="exact")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("data"), help="where CIFAR-10 and lenet5-cifar10 are")
    parser.add_argument("--out", type=Path, default=Path("data/paper-figures/behind_u.nc"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    images = data.cifar10(given.root, batch_size=125)
    at = {s: ho.load_checkpoint(given.root / "lenet5-cifar10" / f"step_{s:05d}.safetensors") for s in STEPS}
    grid = [
        along("images", [along("draw", [summaries(images, at[s], n, d) for d in range(DRAWS)]) for n in IMAGES])
        for s in STEPS
    ]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    export(along("step", grid), given.out)


if __name__ == "__main__":
    main()
