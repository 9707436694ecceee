"""The names of dims, variables, coordinates and attributes of a summary Dataset, and the check that it has them.

Dims are ``group``, ``group2``, ``group3``, ... (xarray does not support a repeated dim; the suffix convention is that
of xarray-einstats), each with the same labels; ``step`` stands in front for a series of checkpoints. Variables are
``loss``, ``D1``, ``D2``, ... with ``D1_se``, ...; ``D3_diag`` with ``D3_diag_se`` where the diagonal alone was
computed; ``D2_batch`` and ``weight`` where blocks of batches were kept. What was measured by forward passes is
``change_along`` (tau), ``change_removed`` (group) and ``change_removed_pair`` (group, group2), with errors and blocks
like every summary, and beside each the loss itself, ``loss_along`` = ``loss`` + ``change_along``, and so on. What takes
gradients along the direction is ``change_path`` (node) and ``slope_path`` (node, group), U^s . gradient(theta + node
u).
"""

import re

import xarray as xr

from hoanalysis.errors import SchemaError, listed

SCHEMA_VERSION = "1"

GROUP = "group"
STEP = "step"
#: The directions that have a name; "to:" may also be followed by a file.
DIRECTIONS = ("gradient", "weights", "random", "to:init", "to:next", "momentum", "adam")
BATCH = "batch"
LOSS = "loss"
WEIGHT = "weight"
TAU = "tau"
NODE = "node"
CHANGE_ALONG, CHANGE_REMOVED, CHANGE_REMOVED_PAIR = "change_along", "change_removed", "change_removed_pair"
HESSIAN = "hessian_"  # in front of what `hoanalysis.curvature` computes, where a study stores it beside the summaries
CHANGE_PATH, SLOPE_PATH = "change_path", "slope_path"
#: The measured change of the loss -> the dims that it has, and the variable of the loss itself.
MEASURED: dict[str, tuple[tuple[str, ...], str]] = {
    CHANGE_ALONG: ((TAU,), "loss_along"),
    CHANGE_REMOVED: ((GROUP,), "loss_removed"),
    CHANGE_REMOVED_PAIR: ((GROUP, "group2"), "loss_removed_pair"),
    CHANGE_PATH: ((NODE,), "loss_path"),
}
#: The dims of all that is measured along the direction or beside it.
MEASURED_DIMS = {name: dims for name, (dims, _) in MEASURED.items()} | {SLOPE_PATH: (NODE, GROUP)}
KINDS = ("weight", "bias", "norm", "embedding", "other")

#: Coordinates on ``group``; those in the second row carry ``step`` as well in a series.
GROUP_COORDS = ("layer", "kind", "numel", "shape", "aliases")
GROUP_COORDS_BY_STEP = ("direction_norm", "parameter_norm")
#: Coordinates on ``step`` (scalars in the Dataset of one checkpoint).
STEP_COORDS = ("sha256", "engine", "self_check", "n_batches")

ATTRS = (
    "schema_version",
    "order",
    "direction",
    "partition",
    "dtype",
    "n_samples",
    "created_at",
    "creation_library",
    "creation_library_version",
    "torch_version",
    "torch_threads",
    "provenance",
)

LONG_NAMES = {
    "loss": "loss",
    "weight": "sum of sample weights of a block of batches",
    "layer": "module that owns the parameters",
    "kind": "kind of parameter",
    "numel": "number of parameters in the group",
    "shape": "shape of the parameter tensor",
    "aliases": "other names of tied parameters",
    "direction_norm": "Euclidean norm of the direction in the group",
    "parameter_norm": "Euclidean norm of the parameters in the group",
    "sha256": "SHA-256 of the checkpoint file",
    "engine": "engine that computed the derivatives",
    "self_check": "relative error of the self-check",
    "n_batches": "number of batches",
    "loss_along": "loss at theta + tau u",
    "loss_removed": "loss with the group moved by its whole direction",
    "loss_removed_pair": "loss with both groups moved by their whole direction",
    "change_along": "change of the loss from theta to theta + tau u",
    "change_removed": "change of the loss when the group moves by its whole direction",
    "change_removed_pair": "change of the loss when both groups move by their whole direction",
    "loss_path": "loss at theta + node u",
    "change_path": "change of the loss from theta to theta + node u",
    "slope_path": "slope of the loss along the direction of the group at theta + node u",
    "tau": "multiple of the direction",
    "node": "multiple of the direction, a node of the quadrature over 0..1",
    "direction_detail": "where the direction came from",
    "stopping": "where the pass over the data ended",
    "gap": "why this checkpoint has no such summary",
    "coverage": "share of the units that are in the store",
}


def group_dim(position: int) -> str:
    """The dim of the 0-based index ``position``: ``group``, ``group2``, ``group3``, ...

    >>> [group_dim(i) for i in range(3)]
    ['group', 'group2', 'group3']
    """
    return GROUP if position == 0 else f"{GROUP}{position + 1}"


def group_dims(order: int) -> tuple[str, ...]:
    """The dims of D^(order)."""
    return tuple(group_dim(i) for i in range(order))


def dims_of(variable: str, order: int) -> tuple[str, ...]:
    """The dims of a quantity with ``order`` indices: groups, but for what is measured along the direction.

    >>> dims_of("D2", 2), dims_of("change_along", 1), dims_of("loss", 0)
    (('group', 'group2'), ('tau',), ())
    """
    return MEASURED_DIMS.get(variable, group_dims(order))


def derivative(order: int) -> str:
    """The variable of D^(order): ``D1``, ``D2``, ..."""
    return f"D{order}"


def diagonal(order: int) -> str:
    """The variable of the diagonal of D^(order), where it alone was computed: ``D3_diag``."""
    return f"D{order}_diag"


def error_of(variable: str) -> str:
    """The variable that holds the standard error of ``variable``."""
    return f"{variable}_se"


def blocks_of(variable: str) -> str:
    """The variable that holds the un-normalised sums of ``variable`` over blocks of batches."""
    return f"{variable}_batch"


def influence_of(variable: str) -> str:
    """What blocks add to ``blocks_of(variable)`` through the direction; in units of a store only."""
    return f"{variable}_influence"


def orders(ds: xr.Dataset) -> list[int]:
    """The orders whose full tensor the Dataset holds."""
    found = (re.fullmatch(r"D([1-9]\d*)", str(name)) for name in ds.data_vars)
    return sorted(int(m.group(1)) for m in found if m)


def labels(ds: xr.Dataset) -> list[str]:
    """The group labels, in order."""
    return [str(g) for g in ds[GROUP].values]


def validate(ds: xr.Dataset) -> xr.Dataset:
    """Return ``ds`` if it is a summary Dataset of a schema that this version reads; raise `SchemaError` otherwise."""
    if GROUP not in ds.dims or LOSS not in ds.data_vars:
        raise SchemaError(
            "this Dataset does not hold summaries",
            why=f"it has no dim {GROUP!r} or no variable {LOSS!r}; its variables are {listed(ds.data_vars)}",
            do="open a file that ho.summarize, ho.summarize_run or ho.open_store made",
        )
    version = str(ds.attrs.get("schema_version", ""))
    if version != SCHEMA_VERSION:
        raise SchemaError(
            f"this Dataset follows schema version {version or 'unknown'}, this library reads version {SCHEMA_VERSION}",
            do="update hoanalysis" if version > SCHEMA_VERSION else "recompute the summaries",
        )
    n = ds.sizes[GROUP]
    for order in orders(ds):
        dims = group_dims(order)
        if ds[derivative(order)].dims[-order:] != dims:
            raise SchemaError(f"{derivative(order)} has dims {ds[derivative(order)].dims}, expected {dims} last")
        for dim in dims:
            if ds.sizes[dim] != n or list(ds[dim].values) != list(ds[GROUP].values):
                raise SchemaError(f"the labels of {dim!r} are not those of {GROUP!r}")
    missing = [a for a in ATTRS if a not in ds.attrs]
    if missing:
        raise SchemaError(f"the Dataset lacks the attributes {missing}", do="recompute the summaries")
    return ds
