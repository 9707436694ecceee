"""Between labelled Datasets and plain arrays: read one checkpoint, compute in numpy, label the stacked results.

Every analysis verb has the same three parts: a numpy function of one checkpoint, a loop over ``step`` where there is
one, and `labelled`, which puts dims, coordinates, ``long_name`` and ``units`` on the result.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from hoanalysis import schema
from hoanalysis.errors import ArgumentError, SchemaError, listed

Array = NDArray[Any]
Tensors = Mapping[str, Array]
UNIT = "loss"  # D^(d) has the unit of the loss at every order: eta has none


@dataclass(frozen=True)
class Blocks:
    """Un-normalised sums over B blocks of batches: ``sums[name]`` has shape (B, S, ..), ``weight`` has shape (B,)."""

    sums: Tensors
    weight: Array

    def __len__(self) -> int:
        return len(self.weight)

    def means(self, name: str) -> Array:
        """The mean of each block, shape (B, S, ..)."""
        return self.sums[name] / _column(self.weight, self.sums[name])


def _column(weight: Array, like: Array) -> Array:
    return weight.reshape(-1, *[1] * (like.ndim - 1))


def checkpoints(ds: xr.Dataset) -> list[xr.Dataset]:
    """The Dataset of each checkpoint: one for every ``step``, or ``ds`` alone."""
    return [ds.isel({schema.STEP: i}) for i in range(ds.sizes[schema.STEP])] if schema.STEP in ds.dims else [ds]


def step_labels(ds: xr.Dataset) -> list[Any]:
    """The step of each checkpoint; 0 where the Dataset does not tell."""
    return list(np.atleast_1d(ds[schema.STEP].values)) if schema.STEP in ds.coords else [0] * len(checkpoints(ds))


def over_checkpoints(ds: xr.Dataset, function: Callable[[xr.Dataset], Any]) -> Any:
    """``function`` of each checkpoint, stacked along a leading axis where ``ds`` has ``step``."""
    values = [function(one) for one in checkpoints(ds)]
    return np.stack(values) if schema.STEP in ds.dims else values[0]


def require(ds: xr.Dataset, *names: str) -> None:
    """Raise `SchemaError` unless ``ds`` holds the variables ``names``, over the same groups along each dim, each of
    them once."""
    if names and schema.GROUP not in ds.dims and any(n in ds for n in names):
        raise SchemaError(
            f"there is no dim {schema.GROUP!r}",
            why=f"the dims are {', '.join(map(str, ds.dims)) or 'none'}: it was renamed, or one group was selected",
            do="keep the dims' names, and select groups with ds.isel(group=[..], group2=[..])",
        )
    missing = [name for name in names if name not in ds.data_vars]
    if missing:
        raise SchemaError(
            f"this analysis needs {' and '.join(missing)}, which the Dataset does not hold",
            why=f"its summaries are {', '.join(f'D{d}' for d in schema.orders(ds)) or 'none'}",
            do=f"summarize with order={max((int(n[1]) for n in missing if n[1:2].isdigit()), default=2)}",
        )
    _refuse_duplicates(ds)
    for name in names:
        _refuse_other_dims(ds, name)
        for dim in ds[name].dims:
            if str(dim).startswith(schema.GROUP) and not np.array_equal(ds[dim].values, ds[schema.GROUP].values):
                raise SchemaError(
                    f"the groups along {dim!r} are not those along 'group'",
                    why="one of the dims was selected or reordered without the other",
                    do="select the same labels along group, group2, .. or merge groups with ds.ho.merge({...})",
                )


def _refuse_duplicates(ds: xr.Dataset) -> None:
    labels = schema.labels(ds) if schema.GROUP in ds.coords else []
    twice = sorted({label for label in labels if labels.count(label) > 1}) if len(set(labels)) < len(labels) else []
    if twice:
        raise SchemaError(
            f"several groups are called {listed(twice)}",
            why="groups are found by their labels",
            do="give each its own: ds.assign_coords(group=labels, group2=labels, ..)",
        )


def _refuse_other_dims(ds: xr.Dataset, name: str) -> None:
    """D^(d) has d dims of groups, and ``step`` at most beside them."""
    order = re.fullmatch(r"D([1-9]\d*)", name)
    if order and set(map(str, ds[name].dims)) - {schema.STEP} != set(schema.group_dims(int(order[1]))):
        raise SchemaError(
            f"{name} has the dims {', '.join(map(str, ds[name].dims)) or 'none'}",
            why=f"expected are {', '.join(schema.group_dims(int(order[1])))}, behind 'step' in a series",
            do="keep the dims' names, and select groups along all of them",
        )


def require_order(ds: xr.Dataset) -> None:
    """Raise `SchemaError` unless the steps of a series increase: what follows what is read from their order."""
    labels = step_labels(ds) if schema.STEP in ds.dims else []
    if any(not a < b for a, b in pairwise(labels)):
        raise SchemaError("the steps of this series do not increase", do="sort it: ds.sortby('step')")


def number(value: Any, name: str) -> float:
    """``value`` as a float; `ArgumentError` unless it is a number."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise ArgumentError(f"{name} must be a number, not {value!r}")
    return float(value)


def require_top(top: Any) -> None:
    """Raise `ArgumentError` unless ``top`` is None or a whole number from 0 on."""
    if top is not None and (isinstance(top, bool) or not isinstance(top, int | np.integer) or top < 0):
        raise ArgumentError(f"top must be a whole number, or None for all, not {top!r}")


def tensor(one: xr.Dataset, name: str) -> Array:
    """The variable ``name`` of one checkpoint as float64, axes in the order of the schema."""
    return np.asarray(stored(one, name), dtype=np.float64)


def stored(one: xr.Dataset, name: str) -> NDArray[Any]:
    """The same in the dtype that is stored: of a large tensor, select first and convert what is left."""
    return one[name].transpose(*_ordered(one[name].dims)).values


def _ordered(dims: Sequence[Any]) -> list[Any]:
    groups = [d for d in dims if str(d).startswith(schema.GROUP)]
    return [d for d in dims if d not in groups] + sorted(groups, key=lambda d: int(str(d)[5:] or 1))


def tensors(one: xr.Dataset, names: Sequence[str]) -> dict[str, Array]:
    """The variables ``names`` of one checkpoint."""
    return {name: tensor(one, name) for name in names}


def kept_blocks(one: xr.Dataset, names: Sequence[str]) -> Blocks | None:
    """The kept blocks of the variables ``names``; None unless all are kept and at least two are filled."""
    held = [*map(schema.blocks_of, names), schema.WEIGHT]
    if any(name not in one.data_vars for name in held):
        return None
    weight = tensor(one, schema.WEIGHT)
    sums = {name: tensor(one, schema.blocks_of(name)) for name in names}
    filled = np.isfinite(weight) & (weight > 0)
    for values in sums.values():
        filled &= np.isfinite(values.reshape(len(values), -1)).all(axis=1)
    if filled.sum() < 2:
        return None
    return Blocks({name: values[filled] for name, values in sums.items()}, weight[filled])


def labelled(
    ds: xr.Dataset, values: Any, dims: Sequence[str], name: str, long_name: str, units: str, **coords: Any
) -> xr.DataArray:
    """A DataArray over ``dims`` (``step`` in front where ``ds`` has it) with every coordinate of ``ds`` that fits."""
    full = ((schema.STEP,) if schema.STEP in ds.dims else ()) + tuple(dims)
    fitting = {k: v for k, v in ds.coords.items() if set(v.dims) <= set(full)}
    array = xr.DataArray(np.asarray(values), dims=full, coords={**fitting, **coords}, name=name)
    return array.assign_attrs(long_name=long_name, units=units)


def with_error(ds: xr.Dataset, array: xr.DataArray, error: Any, reason: str = "") -> xr.DataArray:
    """``array`` with its standard error as the coordinate ``<name>_se`` (``reason`` where it is not available)."""
    attrs = error_attrs(ds, str(array.attrs["long_name"]), str(array.attrs["units"]), reason)
    return array.assign_coords({f"{array.name}_se": xr.Variable(array.dims, np.asarray(error), attrs)})


def error_attrs(ds: xr.Dataset, long_name: str, units: str, reason: str = "") -> dict[str, str]:
    """Attributes of a standard error computed from ``ds``; ``reason`` says why it is not available.

    ``conditional_on`` is left out where the blocks of ``ds`` hold what the data do through u (see `errorbars`).
    """
    name = f"standard error of {long_name}" + (f": not available, {reason}" if reason else "")
    attrs = {"long_name": name, "units": units}
    unconditional = str(ds.attrs.get("standard_errors", "")).startswith("unconditional")
    return attrs if unconditional else attrs | {"conditional_on": "the direction u"}


def error_of(array: xr.DataArray) -> xr.DataArray:
    """The standard error that `with_error` attached."""
    return array[f"{array.name}_se"]
