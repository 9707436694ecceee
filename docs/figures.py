"""Draws the picture of the README from the report of the shipped run: make figures."""

import sys
from pathlib import Path

from matplotlib.figure import Figure

import hoanalysis as ho

SHOWN = ((0, "H"), (0, "inverse"), (-1, "H"))


def main(dataset: Path, picture: Path) -> None:
    ds = ho.open_dataset(dataset)
    figure = Figure(figsize=(16, 5), layout="constrained")
    for ax, (position, which) in zip(figure.subplots(1, len(SHOWN)), SHOWN, strict=True):
        ds.ho.plot.matrix(ax, step=int(ds.step[position]), which=which)
    figure.savefig(picture, dpi=100)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
