"""What each group did to the loss along a step: its slope, integrated from theta to theta + u.

    contribution_s = integral over t in 0..1 of U^s . gradient L(theta + t u)
    sum_s contribution_s = L(theta + u) - L(theta)

It is the Aumann-Shapley value of the group (Aumann and Shapley 1974; "integrated gradients" where the players are
inputs), exact however long the step is: no Taylor polynomial is cut off. The slopes are measured at the nodes of
`hoanalysis.quadrature` with ``measure=("path",)``. Two errors come with it: that of the sample, over the kept blocks,
and that of the quadrature. The sum has a third check: the change of the loss was measured beside it.
"""

import numpy as np
import xarray as xr

from hoanalysis import quadrature, schema
from hoanalysis.analysis.arrays import Array, checkpoints, error_attrs, kept_blocks, labelled, tensor
from hoanalysis.analysis.errorbars import error_of_mean
from hoanalysis.errors import SchemaError


def stored(ds: xr.Dataset) -> bool:
    """Whether the slopes along the step were measured."""
    return schema.SLOPE_PATH in ds.data_vars


def path(ds: xr.Dataset) -> xr.Dataset:
    """What each group did to the loss along u, by integrating its measured slope.

    Returns
    -------
    Dataset
        Over ``step`` where ``ds`` has it, in loss: ``contribution`` (group), ``contribution_se`` from the kept blocks
        (NaN without them) and ``quadrature_error`` (group), how far the integral may be off; ``measured`` = L(theta +
        u) - L(theta) with ``measured_se``, ``total`` = sum of the contributions, and ``residual`` = measured - total,
        which the quadrature leaves.

    Raises
    ------
    SchemaError
        The slopes were not measured.

    Source: R. J. Aumann and L. S. Shapley, Values of Non-Atomic Games, 1974.
    """
    if not stored(ds):
        raise SchemaError(
            "the slopes along the step were not measured",
            why=f"the Dataset holds no {schema.SLOPE_PATH}",
            do="summarize with measure=('path',)",
        )
    parts = [_of_one(one) for one in checkpoints(ds)]
    found = {}
    for name, (dims, title) in VARIABLES.items():
        values = np.stack([p[name] for p in parts]) if schema.STEP in ds.dims else parts[0][name]
        array = labelled(ds, values, dims, name, title, "loss")
        error = name.endswith("_se")
        found[name] = array.assign_attrs(error_attrs(ds, title, "loss")) if error else array
    return xr.Dataset(found)


GROUPS = (schema.GROUP,)
VARIABLES: dict[str, tuple[tuple[str, ...], str]] = {
    "contribution": (GROUPS, "what the group did to the loss along the step"),
    "contribution_se": (GROUPS, "what the group did to the loss along the step"),
    "quadrature_error": (GROUPS, "error of the quadrature of the slope along the step"),
    "measured": ((), "measured change of the loss"),
    "measured_se": ((), "measured change of the loss"),
    "total": ((), "sum of what the groups did to the loss"),
    "residual": ((), "measured change minus the sum of what the groups did"),
}


def _of_one(one: xr.Dataset) -> dict[str, Array]:
    slopes = tensor(one, schema.SLOPE_PATH)
    value, blocks = quadrature.integral(slopes), contribution_blocks(one)
    change, se = (tensor(one, name)[-1] for name in (schema.CHANGE_PATH, schema.error_of(schema.CHANGE_PATH)))
    return {
        "contribution": value,
        "contribution_se": np.full(len(value), np.nan) if blocks is None else error_of_mean(*blocks),
        "quadrature_error": quadrature.integral_error(slopes),
        "measured": change,
        "measured_se": se,
        "total": value.sum(),
        "residual": change - value.sum(),
    }


def contribution_blocks(one: xr.Dataset) -> tuple[Array, Array] | None:
    """The contributions by block, (B, S), and the blocks' weights; None where no blocks are kept."""
    blocks = kept_blocks(one, [schema.SLOPE_PATH])
    return None if blocks is None else (quadrature.integral(blocks.means(schema.SLOPE_PATH)), blocks.weight)
