"""What a driver does with a store, small: the same calls whether it lives or is killed, and what must come out."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xarray as xr

from hoanalysis.store import Store

UNITS = 2
DIRECTION = {"unit": "direction", "recipe": "gradient", "checkpoint": "ab" * 32}


def key(step: int) -> dict:
    return {"unit": "sums", "checkpoint": f"{step:064x}", "shard": 0, "orders": [1, 2], "direction": DIRECTION}


KEYS = [key(step) for step in range(UNITS)]


def unit(step: int, groups: int = 4) -> xr.Dataset:
    """A unit as the library makes them; its numbers are those of ``step``."""
    rng = np.random.default_rng(step)
    labels = np.array([f"layers.{i}.weight" for i in range(groups)], dtype=object)
    return xr.Dataset(
        {
            "D1_sum": ("group", rng.normal(size=groups)),
            "D2_sum": (("group", "group2"), rng.normal(size=(groups, groups))),
        },
        coords={"group": labels},
        attrs={"unit": '{"engine": "nested"}', "step": step},
    )


def direction() -> dict[str, np.ndarray]:
    return {"w": np.random.default_rng(9).normal(size=(8, 5)).T, "b": np.float32([1, 2, 3])}


def plan(order: int = 2) -> dict:
    return {"study": {"order": order, "direction": "gradient"}, "units": KEYS}


def run(folder: Path, ack: Callable[[str], None] = lambda what: None, units: int = UNITS) -> None:
    """Fill the store in ``folder`` with what it lacks, and acknowledge what is there."""
    with Store.open(folder, mode="w") as store:
        store.register("study", plan())
        ack("plan")
        if store.read_arrays(DIRECTION) is None:
            store.publish_arrays(DIRECTION, direction())
        ack("direction")
        for step in range(units):
            if store.read(key(step)) is None:
                store.publish(key(step), unit(step))
            ack(str(step))


def check_acknowledged(folder: Path, acks: list[str]) -> None:
    """Everything that was acknowledged reads as it was published; nothing else is there but whole units."""
    store = Store.open(folder, mode="r")
    if "plan" in acks:
        assert store.plan("study") == plan()
    if "direction" in acks:
        found = store.read_arrays(DIRECTION)
        assert found is not None
        for name, array in direction().items():
            np.testing.assert_array_equal(found[name], array, strict=True)
    for step in range(UNITS):
        ds = store.read(key(step))
        assert ds is not None or str(step) not in acks, f"the acknowledged unit {step} is lost"
        if ds is not None:
            xr.testing.assert_identical(ds, unit(step))
    assert len(store.keys()) <= UNITS + 1
    assert store.notes == []


def reduced(folder: Path) -> bytes:
    """A result of all units: the last bits depend on the order of the sum."""
    store = Store.open(folder, mode="r")
    total = sum(np.float64(store.read(k).D2_sum.values / 3) for k in KEYS)  # type: ignore[union-attr]
    return np.asarray(total).tobytes()


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file of a store and its bytes. A writer at rest leaves no other file."""
    paths = (Path(top) / name for top, _, names in os.walk(folder.parent) for name in names)
    return {str(p.relative_to(folder.parent)): p.read_bytes() for p in paths}
