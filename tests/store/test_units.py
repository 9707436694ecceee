"""Units: what goes in comes out, equal Datasets are equal bytes, and a changed bit never gives other numbers."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import xarray as xr

from hoanalysis.errors import ArgumentError, StoreError
from hoanalysis.store import Store, StoreWarning, container
from tests.store import workload
from tests.store.faults import ROOT


@pytest.fixture
def store(folder: Path) -> Iterator[Store]:
    with Store.open(folder, mode="w") as store:
        yield store


def varied() -> xr.Dataset:
    """Everything a unit may hold: scalars, NaN, empty dims, texts that are not ASCII, booleans, array attributes."""
    return xr.Dataset(
        {
            "loss": ((), -0.0),
            "D1": ("group", np.array([np.nan, np.inf, 5e-324])),
            "flag": ("group", np.array([True, False, True])),
            "numel": ("group", np.array([1, 2**53 + 1, -3])),
            "none": ("batch", np.zeros(0)),
            "half": ("group", np.array([1, 2, 3], dtype=np.float32)),
        },
        coords={"group": np.array(["", "é ", '<script>"{{}}'], dtype=object)},
        attrs={"text": "", "number": 1.5, "array": np.arange(3), "texts": ["a", "b"]},
    )


def test_units_come_back_as_they_were(store: Store) -> None:
    store.publish({"a": 1}, varied())
    found = store.read({"a": 1})
    xr.testing.assert_identical(found, varied())
    assert found is not None
    assert np.signbit(found.loss)
    for name, variable in varied().variables.items():
        assert found[name].dtype == variable.dtype or variable.dtype == object  # texts of any kind


def test_arrays_come_back_as_they_were(store: Store) -> None:
    arrays = {
        "transposed": np.arange(6.0).reshape(2, 3).T,
        "strided": np.arange(10)[::3],
        "big_endian": np.arange(3, dtype=">f8"),
        "scalar": np.float32(2.5),
        "empty": np.zeros((0, 4)),
        "flags": np.array([True, False]),
    }
    store.publish_arrays({"a": 1}, arrays)
    found = store.read_arrays({"a": 1})
    assert found is not None
    assert list(found) == sorted(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].shape == np.shape(array)
        assert found[name].dtype == np.asarray(array).dtype.newbyteorder("=")
        assert found[name].flags.writeable  # torch.from_numpy warns otherwise


def test_equal_datasets_are_equal_bytes_in_another_process() -> None:
    """No time stamp, no memory address, no hash seed, no encoding of the file it was read from."""
    mine = container.pack({"a": 1}, container.NETCDF, container.netcdf_bytes(varied()))
    read = container.dataset_of(container.unpack(mine, container.digest_of({"a": 1}))[1])
    assert container.netcdf_bytes(read) == container.netcdf_bytes(varied())
    program = "import sys, time; time.time = lambda: 1e9; from tests.store.test_units import *\n"
    program += "sys.stdout.buffer.write(container.pack({'a': 1}, container.NETCDF, container.netcdf_bytes(varied())))"
    environment = os.environ | {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}
    other = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True
    )
    assert other.stdout == mine


def test_the_encoding_of_another_file_is_not_inherited() -> None:
    """Compression, fill values and packing of the file that a Dataset came from would change bytes, or numbers."""
    encoded = varied()
    encoded["half"].encoding = {"dtype": "int16", "scale_factor": 2.0, "_FillValue": -1, "zlib": True}
    assert container.netcdf_bytes(encoded) == container.netcdf_bytes(varied())


def test_arrays_are_equal_bytes_in_any_order_and_layout() -> None:
    a, b = np.arange(6.0).reshape(2, 3), np.arange(4)
    assert container.arrays_bytes({"b": b, "a": a}) == container.arrays_bytes({"a": np.asfortranarray(a), "b": b})


def test_keys_differ_where_their_json_does() -> None:
    keys: list[dict] = [{"a": 1}, {"a": 2}, {"a": "1"}, {"a": 1, "b": None}, {"a": [1]}, {"a": {"a": 1}}, {}]
    assert len({container.digest_of(k) for k in keys}) == len(keys)
    assert container.digest_of({"a": 1, "b": 2}) == container.digest_of({"b": 2, "a": 1})
    for bad in ({"a": float("nan")}, {"a": np.arange(3)}, {"a": {1, 2}}):
        with pytest.raises(ArgumentError, match="key must be a JSON object"):
            container.digest_of(bad)


def test_a_unit_is_an_hdf5_file_for_other_programs(store: Store) -> None:
    """The header is what HDF5 calls a user block, whatever its length."""
    for key in ({"a": 1}, {"long": "x" * 3000}):
        store.publish(key, workload.unit(0))
        path = store.folder / "units" / f"{container.digest_of(key)}.unit"
        with h5py.File(path) as file:
            np.testing.assert_array_equal(file["D1_sum"][:], workload.unit(0).D1_sum)


def test_what_netcdf_cannot_hold_is_refused(store: Store) -> None:
    for bad in (
        workload.unit(0).assign_attrs(x=None),
        workload.unit(0).rename(D1_sum="a/b"),
        workload.unit(0).assign_coords(group=np.array(["a\0b", "c", "d", "e"], dtype=object)),
        xr.Dataset({"z": ("x", np.array([object()]))}),
    ):
        with pytest.raises(StoreError):
            store.publish({"a": 1}, bad)
    with pytest.raises(StoreError, match="'z' has dtype complex128"):
        store.publish_arrays({"a": 1}, {"z": np.zeros(2, dtype=complex)})
    assert store.keys() == []


def test_the_second_of_two_units_is_dropped_and_compared(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """Row K8 of the table of bad inputs, as far as the store goes."""
    store.publish({"a": 1}, workload.unit(0))
    with caplog.at_level(logging.INFO, "hoanalysis.store"):
        store.publish({"a": 1}, workload.unit(0))
        store.publish({"a": 1}, workload.unit(1))
    assert [r.levelname for r in caplog.records] == ["INFO", "WARNING"]
    assert ["bitwise equal" in r.message for r in caplog.records] == [True, False]
    xr.testing.assert_identical(store.read({"a": 1}), workload.unit(0))
    assert len(store.keys()) == 1


def test_a_kind_is_not_taken_for_the_other(store: Store) -> None:
    store.publish({"a": 1}, workload.unit(0))
    with pytest.raises(StoreError, match="holds netcdf, not arrays"):
        store.read_arrays({"a": 1})


def damages(data: bytes, others: list[bytes], count: int) -> Iterator[tuple[str, bytes]]:
    """Cuts at every 1/64, random bit flips, bytes appended, another unit under this name."""
    rng = np.random.default_rng(0)
    for i in range(64):
        yield f"cut at {i}/64", data[: len(data) * i // 64]
    yield "one byte short", data[:-1]
    yield "one byte more", data + b"\0"
    for other in others:
        yield "another unit", other
    header = rng.integers(0, min(len(data), 700) * 8, count // 2)
    anywhere = rng.integers(0, len(data) * 8, count - count // 2)
    for bit in [*header, *anywhere]:
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit}", bytes(flipped)


@pytest.mark.filterwarnings("ignore::hoanalysis.store.StoreWarning")
def test_S5_no_damage_gives_other_numbers(folder: Path, quiet: dict[str, bytes]) -> None:
    """260 damages each of a unit, a direction and a plan: absent or a named error, never anything else."""
    workload.run(folder)
    reader = Store.open(folder)
    units = sorted((folder / "units").iterdir())
    contents = [u.read_bytes() for u in units]
    count = 0
    for key in (workload.KEYS[0], workload.DIRECTION):
        path = folder / "units" / f"{container.digest_of(key)}.unit"
        whole = path.read_bytes()
        for what, data in damages(whole, [c for c in contents if c != whole], 200):
            path.write_bytes(data)
            found = reader.read_arrays(key) if key == workload.DIRECTION else reader.read(key)
            assert found is None, what
            count += 1
        path.write_bytes(whole)
    (path,) = (folder / "plans").iterdir()
    whole = path.read_bytes()
    for _, data in damages(whole, [], 200):
        path.write_bytes(data)
        with pytest.raises(StoreError, match="plan of the study 'study' is damaged"):
            reader.plan("study")
        count += 1
    assert count > 600
    assert len(reader.notes) > 400


def test_S5_a_writer_quarantines_recomputes_and_tells(folder: Path, quiet: dict[str, bytes]) -> None:
    workload.run(folder)
    path = folder / "units" / f"{container.digest_of(workload.KEYS[0])}.unit"
    damaged = path.read_bytes()[:-1] + b"!"
    path.write_bytes(damaged)
    reader = Store.open(folder)
    with pytest.warns(StoreWarning, match="taken as absent"):
        assert reader.read(workload.KEYS[0]) is None
    assert path.exists()  # a reader changes nothing
    with Store.open(folder, mode="w") as store:
        with pytest.warns(StoreWarning, match="moved to .*quarantine"):
            assert workload.KEYS[0] not in store
        assert len(store.notes) == 1
        (kept,) = (folder / "quarantine").iterdir()
        assert kept.read_bytes() == damaged
        kept.unlink()
    workload.run(folder)
    assert workload.snapshot(folder) == quiet


def test_S5_publishing_over_a_damaged_unit_replaces_it(store: Store) -> None:
    store.publish({"a": 1}, workload.unit(0))
    (path,) = (store.folder / "units").iterdir()
    path.write_bytes(b"edited")
    with pytest.warns(StoreWarning, match="quarantine"):
        store.publish({"a": 1}, workload.unit(0))
    xr.testing.assert_identical(store.read({"a": 1}), workload.unit(0))


def test_units_of_version_1_are_read(tmp_path: Path) -> None:
    """A store kept since version 1: what later versions must go on reading."""
    store = Store.open(Path(__file__).parent / "version1")
    assert store.plan() == workload.plan()
    for step in range(workload.UNITS):
        xr.testing.assert_identical(store.read(workload.key(step)), workload.unit(step))
    np.testing.assert_array_equal(store.read_arrays(workload.DIRECTION)["w"], workload.direction()["w"])  # type: ignore[index]
