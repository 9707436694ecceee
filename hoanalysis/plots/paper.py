"""H-bar and its inverse as the paper's Figures 1 and 2 show them: WW, BB and WB submatrices, one row a matrix."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize

from hoanalysis import schema
from hoanalysis.analysis.arrays import error_of, require, step_labels
from hoanalysis.analysis.inverse import Which
from hoanalysis.analysis.inverse import blocks as blocks_of
from hoanalysis.plots import frames, style
from hoanalysis.plots.heatmaps import _cells, _dots, _power

NAMES = {"H": r"$\bar{\mathbf{H}}$", "inverse": r"$\bar{\mathbf{H}}^{-1}$", "scale_free": "scale-free"}
SCALES = {"linear": "linear", "log": "symlog"}
ERRORS = (1e-3, 10.0)  # relative standard errors at the ends of the colours


def submatrices(
    ds: xr.Dataset,
    ax: Axes | None = None,
    *,
    which: Sequence[Which] = ("H", "inverse"),
    steps: Sequence[Any] | None = None,
    names: Mapping[Any, str] | None = None,
    scale: str | None = None,
    errors: bool = False,
) -> Axes:
    """The submatrices of H-bar and of its inverse, by kind of parameter, at several checkpoints.

    One row for each matrix of ``which`` and each of ``steps`` (the first and the last computed one by default), one
    column for each pair of kinds, WW, BB and WB first; every panel has colours of its own, since weights and biases are
    orders of magnitude apart. White is near zero, dark red large and positive, dark blue large and negative; dots mark
    entries within 2 standard errors of 0, grey cells groups without effect. ``names`` says how to call a step,
    ``scale`` is ``"linear"`` or ``"log"``; by default a block has one kind of scale at all checkpoints, log where a
    linear scale would leave one of them white. The titles say which. The blocks of the inverse are blocks of it, not
    inverses of blocks. ``errors`` shows standard error / |entry| instead.

    Returns the axes of the first panel. Source: arXiv 2312.03885, Figures 1 and 2.
    """
    require(ds, "D1", "D2")
    chosen = [frames.at_step(ds, s) for s in steps] if steps is not None else frames.first_and_last(ds)
    rows = [(matrix, one, _named(blocks_of(one, matrix))) for matrix in which for one in chosen]
    everything = [a for _, _, found in rows for a in found.values()]
    if not any(np.isfinite(a.values).any() for a in everything):
        message = f"{everything[0].attrs['long_name']}: nothing computed at these checkpoints"
        return style.nothing(style.axes(ax, 5.0, 3.0), message)
    columns = max(len(found) for _, _, found in rows)
    width, height = _panel(everything)
    panels = style.split(style.axes(ax, columns * width + 1.2, len(rows) * height + 0.2), len(rows), columns)
    for i, (matrix, one, found) in enumerate(rows):
        alike = [blocks for shown, _, blocks in rows if shown == matrix]
        scales = {block: scale or _common_scale([a[block].values for a in alike if block in a]) for block in found}
        _row(panels[i * columns : (i + 1) * columns], matrix, one, found, names or {}, scales, errors)
    return panels[0]


def _common_scale(blocks: Sequence[Any]) -> str:
    """One kind of scale for what is compared: log where any of the blocks asks for it."""
    return "log" if "log" in map(style.auto_scale, blocks) else "linear"


def _panel(arrays: Sequence[xr.DataArray]) -> tuple[float, float]:
    """Inches for one panel: cells, the longest label on both sides, the colour bar."""
    n = max(max(a.shape) for a in arrays)
    label = 0.075 * max(len(style.text(g)) for a in arrays for dim in a.dims for g in a[dim].values)
    cells = min(max(0.3 * n, 1.7), 11.0)
    return cells + label + 1.1, cells + label + 0.5


def _row(
    panels: list[Axes],
    matrix: Which,
    one: xr.Dataset,
    found: Mapping[str, xr.DataArray],
    names: Mapping[Any, str],
    scales: Mapping[str, str],
    errors: bool,
) -> None:
    for ax, (block, array) in zip(panels, found.items(), strict=False):
        values, error = np.asarray(array.values, float), np.asarray(error_of(array).values, float)
        if errors:
            with np.errstate(divide="ignore", invalid="ignore"):
                array = array.copy(data=np.maximum(error / np.abs(values), ERRORS[0]))
            _cells(ax, array, LogNorm(*ERRORS, clip=True), style.SIZE)
            bar = ax.figure.colorbar(ax.collections[0], ax=ax, shrink=0.8, aspect=14, pad=0.02, extend="both")
            bar.set_label("se / |entry|", fontsize="small")
        else:
            norm = style.signed_norm(values, scales[block])
            _cells(ax, array, norm, style.SIGNED)
            _bar(ax, norm, style.unit(str(array.attrs["units"])))
        _dots(ax, values, error)
        kind = "log" if errors else SCALES[scales[block]]
        ax.set_title(f"{block} ({style.text(array.attrs.get('block', 'all groups'))}), {kind}", fontsize="small")
    for ax in panels[len(found) :]:
        ax.set_axis_off()
    step = step_labels(one)[0]
    when = names.get(step, f"step {step}")
    panels[0].set_ylabel(f"{NAMES[matrix]}\n{when}", rotation=0, ha="right", va="center")


def _bar(ax: Axes, norm: Normalize, units: str) -> None:
    bar = ax.figure.colorbar(ax.collections[0], ax=ax, shrink=0.8, aspect=14, pad=0.02)
    ticks = style.signed_ticks(norm)
    if ticks is not None:  # five labels fit beside a small panel
        top = max(ticks)
        shown = [-top, -top * 1e-2, 0.0, top * 1e-2, top]
        bar.set_ticks(shown, labels=[_power(t) for t in shown])
        bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize="small")
    bar.set_label(units, fontsize="small")


def _named(found: Mapping[str, xr.DataArray]) -> dict[str, xr.DataArray]:
    """The blocks with their groups named by layer, where that tells them apart: a block has one kind on each side."""
    return {block: array.assign_coords(_layers(array)) for block, array in found.items()}


def _layers(array: xr.DataArray) -> dict[str, Any]:
    out = {}
    for dim in (schema.GROUP, schema.group_dim(1)):
        short = [str(g).rpartition(".")[0] or str(g) for g in array[dim].values]
        if len(set(short)) == len(short):
            out[dim] = (dim, np.array(short))
    return out
