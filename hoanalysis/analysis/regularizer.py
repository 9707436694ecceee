"""The regularizer r of each group, from the diagonal of the third order.

    r_s = |D3[s,s,s]|^(2/3)          design: arXiv 2312.03885, Section 3.2

The paper writes ||d^3L/dT_s^3||_inf^(2/3). It is read here as the contraction with u, because only that keeps the
method's invariance: under T_s -> alpha T_s with u = g, H-bar[s,s] scales like alpha^-4, and so does r_s, while a
max-norm of the raw tensor scales like alpha^-2.
"""

import numpy as np
import xarray as xr

from hoanalysis import schema
from hoanalysis.analysis.arrays import Array, Tensors, labelled, over_checkpoints, require, tensor, with_error
from hoanalysis.errors import SchemaError, listed


def third(ds: xr.Dataset) -> str:
    """The variable that holds D3[s,s,s]: ``D3``, else ``D3_diag``; `SchemaError` where there is neither."""
    for name in (schema.derivative(3), schema.diagonal(3)):
        if name in ds.data_vars:
            require(ds, name)
            return name
    merged = "merged" in str(ds.attrs.get("partition", ""))
    raise SchemaError(
        "the regularizer r of merged groups needs the full D3" if merged else "the regularizer r needs D3[s,s,s]",
        why="a stored diagonal cannot be merged" if merged else "the Dataset holds neither D3 nor D3_diag",
        do="summarize with order=3 and merge that, or summarize with the coarser partition and diagonal=3"
        if merged
        else "summarize with diagonal=3 (the diagonal alone) or order=3 (all of D3)",
    )


def diagonal_of(values: Array) -> Array:
    """D3[s,s,s], shape (S,), of D3 (S, S, S) or of its stored diagonal (S,)."""
    return np.einsum("sss->s", values) if values.ndim == 3 else values


def r_of(tensors: Tensors, name: str) -> Array:
    """r, shape (S,), of the tensors of one checkpoint."""
    return np.abs(diagonal_of(tensors[name])) ** (2 / 3)


def regularizer(ds: xr.Dataset) -> xr.DataArray:
    """r_s = |D3[s,s,s]|^(2/3), shape (S,), in loss^(2/3).

    The coordinate ``regularizer_se`` is the standard error by the delta method, (2/3) |D3[s,s,s]|^(-1/3) se(D3[s,s,s]):
    it is 0 where r is exactly 0 without spread, and NaN where r is 0 with spread (no slope there). The coordinate
    ``status`` names the groups where r is exactly 0, as in ReLU networks with squared error, whose loss is quadratic in
    each tensor.

    Raises
    ------
    SchemaError
        The Dataset holds no third order; r of merged groups needs the full D3.

    Source: arXiv 2312.03885, Section 3.2.
    """
    name = third(ds)
    values = over_checkpoints(ds, lambda one: r_of({name: tensor(one, name)}, name))
    status = over_checkpoints(ds, lambda one: _status(one, name))
    array = labelled(ds, values, ("group",), "regularizer", "regularizer r = |D3[s,s,s]|^(2/3)", "loss^(2/3)")
    lead = array.dims[:-1]
    array = array.assign_coords(status=(lead, status, {"long_name": "advice on the regularizer", "units": ""}))
    known = schema.error_of(name) in ds
    errors = over_checkpoints(ds, lambda one: _delta(one, name)) if known else np.full(array.shape, np.nan)
    return with_error(ds, array, errors, "" if known else f"because the Dataset does not hold {schema.error_of(name)}")


def _delta(one: xr.Dataset, name: str) -> Array:
    x = np.abs(diagonal_of(tensor(one, name)))
    se = diagonal_of(tensor(one, schema.error_of(name)))
    slope = np.divide(2 / 3, np.cbrt(x), out=np.full_like(x, np.nan), where=x != 0)
    return np.where((x == 0) & (se == 0), 0.0, slope * se)


def _status(one: xr.Dataset, name: str) -> str:
    x = diagonal_of(tensor(one, name))
    if np.isnan(x).all():
        return "not computed: the third order of this checkpoint is missing."
    zero = [g for g, value in zip(schema.labels(one), x, strict=True) if value == 0]
    return zero_r(zero) if zero else "ok: r is positive for every group."


def zero_r(names: list[str]) -> str:
    """The advice where r is 0."""
    return (
        f"r is zero for {listed(names)}: the loss has no third derivative along these groups (ReLU networks with "
        f"squared error have none), so that r does not limit their learning rates and the cubic step has no bound "
        f"there. Use regularization='ridge' instead."
    )
