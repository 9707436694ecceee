"""Standard errors of means and of whatever is computed from them, from the kept blocks of batches.

They are as the blocks are: conditional on the direction u, or, of a Dataset whose attribute ``standard_errors`` begins
with "unconditional", with what the data do through u, where the blocks hold that influence already (summarize with
``errors="unconditional"``). Where u is the gradient of the same data, the unconditional error is larger. An interval of
95 % is estimate +- t se, t of Student's distribution with (blocks - 1) degrees of freedom; docs/errors.md has measured
what such intervals hold.
"""

from collections.abc import Callable, Sequence

import numpy as np
import xarray as xr

from hoanalysis import schema
from hoanalysis.analysis.arrays import Array, Blocks, Tensors, kept_blocks, tensors


def moves_with_the_data(ds: xr.Dataset) -> bool:
    """Whether u is the gradient of the same data and the errors do not count it: they are too small then."""
    unconditional = str(ds.attrs.get("standard_errors", "")).startswith("unconditional")
    return ds.attrs.get("direction") == "gradient" and not unconditional


def error_of_mean(means: Array, weight: Array) -> Array:
    """sqrt( n/(n-1) sum_b w_b^2 (x_b - x)^2 / (sum_b w_b)^2 ), x the weighted mean.

    ``means`` has shape (n, ..) and ``weight`` (n,); the result (..) has the units of ``means``. design: the schema.
    """
    n, w = len(weight), weight.reshape(-1, *[1] * (means.ndim - 1))
    mean = (w * means).sum(0) / weight.sum()
    return np.sqrt(n / (n - 1) * (w**2 * (means - mean) ** 2).sum(0)) / weight.sum()


def error_over_blocks(sums: xr.DataArray, weight: xr.DataArray) -> xr.DataArray:
    """`error_of_mean` along ``batch``, of un-normalised ``sums``, over the filled blocks; NaN with fewer than two.

    A block is filled where its weight is positive, so that checkpoints may keep different numbers of blocks.
    """
    filled = weight.notnull() & (weight > 0)
    w = weight.where(filled, 0.0)
    total, n = w.sum(schema.BATCH), filled.sum(schema.BATCH)
    sums = sums.where(filled, 0.0)
    mean = sums.sum(schema.BATCH, skipna=False) / total
    squares = ((sums - w * mean) ** 2).sum(schema.BATCH, skipna=False)
    return (n / (n - 1) * squares).where(n > 1) ** 0.5 / total


def leave_one_out(blocks: Blocks, b: int) -> dict[str, Array]:
    """The means of all blocks but ``b``: (sum - sum_b) / (W - w_b)."""
    rest = blocks.weight.sum() - blocks.weight[b]
    return {name: (s.sum(0) - s[b]) / rest for name, s in blocks.sums.items()}


def jackknife(estimate: Callable[[Tensors], Array], blocks: Blocks) -> Array:
    """The delete-one jackknife over n blocks of weights w_b (W their sum), for any function of the means.

        se^2 = n/(n-1) sum_b ((W - w_b)/W)^2 (estimate_(-b) - estimate)^2

    With equal weights this is the textbook (n-1)/n sum_b (estimate_(-b) - estimate)^2, centred on the full estimate;
    for the mean itself it is `error_of_mean` exactly.
    """
    total, n = blocks.weight.sum(), len(blocks)
    full = estimate({name: s.sum(0) / total for name, s in blocks.sums.items()})
    shares = (total - blocks.weight) / total
    moved = [share * (estimate(leave_one_out(blocks, b)) - full) for b, share in enumerate(shares)]
    return np.sqrt(n / (n - 1) * np.square(moved).sum(0))


def standard_error(one: xr.Dataset, names: Sequence[str], estimate: Callable[[Tensors], Array]) -> Array:
    """The jackknife error of ``estimate`` at one checkpoint; NaN, shaped like the estimate, without blocks."""
    blocks = kept_blocks(one, names)
    if blocks is None:
        return np.full(np.shape(estimate(tensors(one, names))), np.nan)
    return jackknife(estimate, blocks)


def why_none(ds: xr.Dataset, names: Sequence[str]) -> str:
    """Why `standard_error` cannot tell, or an empty string."""
    missing = [n for n in [*map(schema.blocks_of, names), schema.WEIGHT] if n not in ds.data_vars]
    if not missing:
        return ""
    return f"because the Dataset keeps no blocks of batches ({', '.join(missing)}); summarize with keep_batches=32"
