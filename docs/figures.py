"""Draws the pictures of the README: make figures.

The first is from the report of the shipped MNIST run; the second, a counterpart of the paper's Figure 2, is from the
shipped summaries of VGG-11' on CIFAR-10.
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure

import hoanalysis as ho

SHOWN = ((0, "H"), (0, "inverse"), (-1, "H"))
EPOCHS = {400: "1 epoch", 2400: "6 epochs"}  # optimizer step -> what the paper shows


def mnist(dataset: Path, picture: Path) -> None:
    ds = ho.open_dataset(dataset)
    figure = Figure(figsize=(16, 5), layout="constrained")
    for ax, (position, which) in zip(figure.subplots(1, len(SHOWN)), SHOWN, strict=True):
        ds.ho.plot.matrix(ax, step=int(ds.step[position]), which=which)
    figure.savefig(picture, dpi=100)


def figure2(dataset: Path, picture: Path) -> None:
    ds = ho.open_dataset(dataset)
    ax = ds.ho.plot.submatrices(steps=list(EPOCHS), names=EPOCHS)
    ax.figure.savefig(picture, dpi=70, bbox_inches="tight")


if __name__ == "__main__":
    mnist(Path(sys.argv[1]), Path(sys.argv[2]))
    figure2(Path(sys.argv[3]), Path(sys.argv[4]))
