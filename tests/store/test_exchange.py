"""`export` and `open_dataset`: there and back, whole or not at all, and clear about what is not ours."""

import errno
import importlib.util
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import xarray as xr

from hoanalysis import schema
from hoanalysis.errors import ArgumentError, SchemaError, StoreError
from hoanalysis.store import Store, export, files, open_dataset
from tests.store import workload
from tests.store.faults import ROOT


def summaries() -> xr.Dataset:
    """A Dataset that `schema.validate` accepts."""
    labels = np.array(["fc1.weight", "fc1.bias", "<b>é"], dtype=object)
    rng = np.random.default_rng(0)
    return xr.Dataset(
        {
            "loss": ("step", [2.0, 1.0]),
            "D1": (("step", "group"), rng.normal(size=(2, 3))),
            "D2": (("step", "group", "group2"), rng.normal(size=(2, 3, 3))),
            "D1_se": (("step", "group"), np.full((2, 3), np.nan)),
        },
        coords={
            "step": [0, 100],
            "group": labels,
            "group2": labels,
            "layer": ("group", np.array(["fc1", "fc1", ""], dtype=object)),
            "numel": ("group", [6, 2, 1]),
        },
        attrs=dict.fromkeys(schema.ATTRS, "x") | {"schema_version": schema.SCHEMA_VERSION, "order": 2},
    )


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_there_and_back(tmp_path: Path, suffix: str) -> None:
    if suffix == ".zarr":
        pytest.importorskip("zarr")
    path = export(summaries(), tmp_path / f"name with space{suffix}")
    assert path == tmp_path / f"name with space{suffix}"
    xr.testing.assert_identical(open_dataset(path), summaries())
    assert os.listdir(tmp_path) == [path.name]


def test_an_export_is_read_by_xarray_alone(tmp_path: Path) -> None:
    with xr.open_dataset(export(summaries(), tmp_path / "a.nc")) as ds:
        xr.testing.assert_identical(ds.load(), summaries())


def test_equal_datasets_are_equal_files(tmp_path: Path) -> None:
    one, two = export(summaries(), tmp_path / "1.nc"), export(summaries(), tmp_path / "2.nc")
    assert one.read_bytes() == two.read_bytes()
    assert export(open_dataset(one), tmp_path / "3.nc").read_bytes() == one.read_bytes()


def test_netcdf_replaces_netcdf_and_no_folder_is_replaced(tmp_path: Path) -> None:
    pytest.importorskip("zarr")
    export(summaries(), tmp_path / "a.nc")
    export(summaries().assign_attrs(order=3), tmp_path / "a.nc")
    assert open_dataset(tmp_path / "a.nc").attrs["order"] == 3
    export(summaries(), tmp_path / "a.zarr")
    (tmp_path / "folder.nc").mkdir()
    for name in ("a.zarr", "folder.nc"):
        with pytest.raises(StoreError, match="there is a folder of this name"):
            export(summaries(), tmp_path / name)


@pytest.mark.parametrize("name", ["a.h5", "a", "a.csv", "a.nc.gz"])
def test_unknown_suffixes_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArgumentError, match="says no format"):
        export(summaries(), tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "reports").mkdir()
    with pytest.raises(StoreError, match=r"did you mean 'reports'\?"):
        export(summaries(), tmp_path / "report" / "a.nc")


def fails_at(op: str, n: int, export_it: Callable[[], object]) -> bool:
    """Whether ``export_it()`` fails, in a sentence, where the n-th call of ``os.<op>`` finds the disk full."""
    calls = itertools.count(1)
    real = getattr(os, op)

    def faulty(*args: object, **kwargs: object) -> object:
        if next(calls) == n:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, op, faulty)
        try:
            export_it()
        except StoreError as error:
            assert error.what == "cannot export the Dataset: the disk is full"  # noqa: PT017
            return True
    return False


@pytest.mark.parametrize("op", ["open", "write", "fsync", "rename"])
@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_S1_an_export_that_fails_leaves_no_half(folder: Path, op: str, suffix: str) -> None:
    """The n-th operation fails, n = 1, 2, 3, ... until an export completes."""
    if suffix == ".zarr":
        pytest.importorskip("zarr")
    target = folder.with_suffix(suffix)
    for n in itertools.count(1):
        if not fails_at(op, n, lambda: export(summaries(), target)):
            break
        if target.exists():  # the fault came after the rename
            xr.testing.assert_identical(open_dataset(target), summaries())
            files.remove_tree(target)
        assert os.listdir(folder.parent) == []
    xr.testing.assert_identical(open_dataset(target), summaries())
    assert n > 1 or (op, suffix) == ("write", ".zarr")  # Zarr writes by itself


def test_S1_an_export_that_fails_keeps_the_old_one(folder: Path) -> None:
    target = folder.with_suffix(".nc")
    for op in ("open", "write", "fsync", "rename"):
        for n in itertools.count(1):
            export(summaries(), target)
            failed = fails_at(op, n, lambda: export(summaries().assign_attrs(order=3), target))
            assert open_dataset(target).attrs["order"] in ({2, 3} if failed else {3})
            assert os.listdir(folder.parent) == [target.name]
            if not failed:
                break


def test_an_export_that_was_killed_leaves_nothing_that_stays(tmp_path: Path) -> None:
    program = f"""
import os, signal
from tests.store.test_exchange import *
os.rename = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
export(summaries(), {str(tmp_path)!r} + "/a.nc")
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == -9
    assert [n.startswith(".hoanalysis-new-") for n in os.listdir(tmp_path)] == [True]
    export(summaries(), tmp_path / "b.nc")
    assert os.listdir(tmp_path) == ["b.nc"]


def test_flipped_bits_in_the_numbers_of_an_export_are_errors(tmp_path: Path) -> None:
    path = export(summaries(), tmp_path / "a.nc")
    whole = path.read_bytes()
    at = whole.index(summaries().D2.values.tobytes())
    for place in range(at, at + summaries().D2.nbytes, 7):
        data = bytearray(whole)
        data[place] ^= 1
        path.write_bytes(data)
        with pytest.raises(StoreError, match="this netCDF is damaged: its digest"):
            open_dataset(path)


def test_truncated_exports_are_errors(tmp_path: Path) -> None:
    path = export(summaries(), tmp_path / "a.nc")
    whole = path.read_bytes()
    for i in range(64):
        path.write_bytes(whole[: len(whole) * i // 64])
        with pytest.raises(StoreError):
            open_dataset(path)


NOT_OURS = {
    "empty": (b"", "it is empty"),
    "web page": (b"<!DOCTYPE html>", "a web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "checkpoint": (b"PK\x03\x04", "a zip archive or a PyTorch checkpoint"),
    "safetensors": (b'\x40\0\0\0\0\0\0\0{"a":', "a safetensors file"),
    "netCDF-3": (b"CDF\x01", "a netCDF-3 file"),
    "text": (b"step,loss\n", "its format is not known"),
}


@pytest.mark.parametrize(("content", "why"), NOT_OURS.values(), ids=NOT_OURS)
def test_files_of_other_formats_are_named(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "a.nc").write_bytes(content)
    with pytest.raises(StoreError, match="this is not a netCDF file of ours") as raised:
        open_dataset(tmp_path / "a.nc")
    assert why in raised.value.why


def test_a_unit_file_is_no_dataset(folder: Path) -> None:
    workload.run(folder)
    with pytest.raises(StoreError, match="give the folder of the store"):
        open_dataset(next((folder / "units").iterdir()))


def test_wrong_paths_and_folders(tmp_path: Path) -> None:
    export(summaries(), tmp_path / "summaries.nc")
    with pytest.raises(StoreError, match=r"did you mean 'summaries.nc'\?"):
        open_dataset(tmp_path / "summary.nc")
    with pytest.raises(StoreError, match=r"(?s)neither a store nor a Zarr export.*it holds 'summaries.nc'"):
        open_dataset(tmp_path)


def test_S10_foreign_datasets_are_refused_with_their_path(tmp_path: Path) -> None:
    foreign = xr.Dataset({"temperature": ("time", [1.0, 2.0])})
    paths = [export(foreign, tmp_path / "a.nc")]
    if importlib.util.find_spec("zarr"):
        paths.append(export(foreign, tmp_path / "a.zarr"))
    for path in paths:
        with pytest.raises(SchemaError, match="this Dataset does not hold summaries") as raised:
            open_dataset(path)
        assert raised.value.where == str(path)
    h5 = tmp_path / "plain.h5"
    with h5py.File(h5, "w") as file:
        file["a"] = np.arange(3)
    with pytest.raises((StoreError, SchemaError)):
        open_dataset(h5)


def test_S10_a_variable_name_with_a_slash_is_refused(tmp_path: Path) -> None:
    for name in ("a.nc", "a.zarr"):
        with pytest.raises(StoreError, match="contain '/'"):
            export(summaries().rename(D1="a/b"), tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_nothing_here_imports_torch(tmp_path: Path) -> None:
    path = export(summaries(), tmp_path / "a.nc")
    program = f"""
import sys
sys.modules["torch"] = None
import hoanalysis.store as s
ds = s.open_dataset({str(path)!r})
s.export(ds, {str(tmp_path / "b.nc")!r})
with s.Store.open({str(tmp_path / "store")!r}, mode="w") as store:
    store.publish({{"a": 1}}, ds)
    store.publish_arrays({{"b": 1}}, {{"u": ds.D1.values}})
    assert store.read({{"a": 1}}).identical(ds) and store.read_arrays({{"b": 1}})
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], cwd=ROOT, check=True)


def test_missing_units_are_nan(folder: Path) -> None:
    """A store with a plan and no unit opens; what is there changes with every unit."""
    plan = {
        "study": {},
        "groups": {"label": ["a", "b"], **{c: ["", ""] for c in schema.GROUP_COORDS}, "numel": [1, 2]},
        "quantities": {"loss": 0, "D1": 1},
        "steps": [{"step": s, "sha256": "", "units": [{"step": s}]} for s in (0, 1)],
        "series": True,
        "reduction": "mean",
        "attrs": dict.fromkeys(schema.ATTRS, "x") | {"schema_version": schema.SCHEMA_VERSION},
    }
    with Store.open(folder, mode="w") as store:
        store.register("study", plan)
    ds = open_dataset(folder)
    assert np.isnan(ds.D1.values).all()
    assert ds.sizes["step"] == 2
    assert float(ds.attrs["coverage"]) == 0
