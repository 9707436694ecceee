"""Datasets in and out: `open_store`, `open_dataset`, `export`."""

import contextlib
import hashlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import xarray as xr

from hoanalysis import schema
from hoanalysis.errors import ArgumentError, SchemaError, StoreError
from hoanalysis.store import container, files
from hoanalysis.store.core import Store
from hoanalysis.store.describe import described, is_zarr, missing
from hoanalysis.store.files import explained, shown
from hoanalysis.store.layout import MANIFEST
from hoanalysis.store.lock import alone_in

_HDF5 = b"\x89HDF\r\n\x1a\n"
#: Behind the HDF5 of an export, where its readers do not look, stand these bytes and the SHA-256 of what is before
#: them: the HDF5 library trusts its input, and of a flipped bit may make other numbers, or crash.
_SEAL = b"\nhoanalysis sha256 "
_SEALED = len(_SEAL) + 64


def open_store(folder: str | os.PathLike[str], name: str | None = None) -> xr.Dataset:
    """The summaries of a study in a store: its plan, filled with the units that are there.

    Units that are missing are NaN, and ``coverage`` says which share is there. ``name`` chooses the study where the
    store holds several. Needs no lock, and no right to write.
    """
    from hoanalysis.units import assemble

    store = Store.open(folder, mode="r")
    plan = store.plan(name)
    if plan is None:
        raise StoreError(
            "no study was registered in this store",
            where=shown(store.folder),
            do="run the study: it registers its plan",
        )
    return schema.validate(assemble(plan, store.read))


def is_store(path: str | os.PathLike[str]) -> bool:
    """Whether this is the folder of a store."""
    return (Path(path) / MANIFEST).is_file()


def open_dataset(path: str | os.PathLike[str]) -> xr.Dataset:
    """A stored Dataset: a netCDF or Zarr `export`, or the folder of a store. In memory; the file is closed."""
    where = Path(os.path.abspath(path))
    with explained("open the Dataset", where):
        if not where.exists():
            raise missing(where, "Dataset")
        if is_store(where):
            return open_store(where)
        if where.is_dir() and not is_zarr(where):
            raise StoreError(
                "this folder is neither a store nor a Zarr export",
                where=shown(where),
                why=described(where),
                do="give a netCDF file (.nc), a Zarr export (.zarr) or the folder of a store",
            )
        ds = _read_zarr(where) if where.is_dir() else _read_netcdf(where)
    try:
        return schema.validate(ds)
    except SchemaError as error:
        raise SchemaError(error.what, where=error.where or shown(where), why=error.why, do=error.do) from error


def _read_netcdf(path: Path) -> xr.Dataset:
    data = _bytes_of(path)
    if not data.startswith(_HDF5):
        raise StoreError(
            "this is not a netCDF file of ours",
            where=shown(path),
            why=described(path),
            do="give a file that export wrote",
        )
    content, sealed, digest = data[:-_SEALED], data[-_SEALED:-64], data[-64:]
    if sealed == _SEAL and hashlib.sha256(content).hexdigest().encode() != digest:
        raise StoreError(
            "this netCDF is damaged: its digest is not that of its content",
            where=shown(path),
            do="export it again: hoanalysis summarize does, and computes nothing that is there",
        )
    with _unreadable(path, "netCDF"):
        return container.dataset_of(data)


def _bytes_of(path: Path) -> bytes:
    """All of a netCDF file, and nothing of what begins otherwise, has no end, or would be waited for."""
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        head = file.read(len(_HDF5))
        return head + file.read() if head == _HDF5 else head


def _read_zarr(path: Path) -> xr.Dataset:
    _require_zarr()
    with _unreadable(path, "Zarr"), xr.open_zarr(path, chunks=None) as ds:
        return ds.load().drop_encoding()


@contextlib.contextmanager
def _unreadable(path: Path, format: str) -> Iterator[None]:
    """What the HDF5 and Zarr libraries raise for damaged input has no common type."""
    try:
        yield
    except ImportError as error:
        raise StoreError("netCDF cannot be read here", why=str(error), do="pip install h5netcdf h5py") from error
    except Exception as error:
        raise StoreError(
            f"this {format} cannot be read: it is damaged, cut short or of another program",
            where=shown(path),
            why=f"{type(error).__name__}: {error}",
            do="copy or export it again",
        ) from error


def export(ds: xr.Dataset, path: str | os.PathLike[str]) -> Path:
    """Write ``ds`` as netCDF (``.nc``) or Zarr (``.zarr``) and return the path; the old or the new is there, no half.

    A netCDF file replaces one of the same name; it ends in the SHA-256 of what is before, and its numbers carry HDF5's
    checksum, so that a flipped bit is an error on reading, here and elsewhere. An existing Zarr folder is refused: a
    folder cannot be replaced at once.
    """
    target = Path(os.path.abspath(path))
    writers = {".nc": _write_netcdf, ".zarr": _write_zarr}
    if target.suffix not in writers:
        raise ArgumentError(
            f"the suffix {target.suffix!r} says no format", where=shown(target), do="end the path in .nc or .zarr"
        )
    with explained("export the Dataset", target):
        if not target.parent.is_dir():
            raise missing(target.parent, "folder")
        with alone_in(target.parent):
            writers[target.suffix](ds, target, target.parent / (files.HALF_MADE + files.token()))
            files.sync_folder(target.parent)
    return target


def _write_netcdf(ds: xr.Dataset, target: Path, temporary: Path) -> None:
    if target.exists() and not target.is_file() and not target.is_dir():  # a rename would replace it
        raise StoreError("this is a pipe, a socket or a device", where=shown(target), do="choose another path")
    if target.is_dir():
        raise StoreError("there is a folder of this name", where=shown(target), do="choose another path")
    numbers = [str(name) for name, v in ds.variables.items() if v.size and v.ndim and v.dtype.kind in "iuf"]
    checked = {name: {"fletcher32": True} for name in numbers}
    try:
        content = container.netcdf_bytes(ds, checked)
        files.write_durably(temporary, content + _SEAL + hashlib.sha256(content).hexdigest().encode())
        os.rename(temporary, target)
    finally:
        files.remove_quietly(temporary)


def _write_zarr(ds: xr.Dataset, target: Path, temporary: Path) -> None:
    _require_zarr()
    if os.path.lexists(target):
        raise StoreError("there is a folder of this name", where=shown(target), do="remove it or choose another path")
    container.netcdf_bytes(ds.isel({dim: slice(0, 1) for dim in ds.dims}))  # names and attributes that fit both formats
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks about formats to come
            ds.drop_encoding().to_zarr(temporary, mode="w-", zarr_format=2, consolidated=True)
        for folder, _, names in os.walk(temporary, topdown=False):
            for name in names:
                _sync_file(Path(folder) / name)
            files.sync_folder(Path(folder))
        os.rename(temporary, target)
    finally:
        files.remove_tree(temporary)


def _sync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _require_zarr() -> None:
    try:
        import zarr  # noqa: F401
    except ImportError as error:
        raise StoreError(
            "Zarr is not installed", why=str(error), do="pip install 'hoanalysis[zarr]', or use .nc"
        ) from error
