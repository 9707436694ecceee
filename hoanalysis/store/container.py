"""The file of one unit: a header that names and seals what follows.

    hoanalysis-unit 1 <SHA-256 of every byte after this line>\\n
    {"key": {...}, "payload": "netcdf" or "arrays", "size": bytes}   padded with spaces to 512, 1024, 2048, ... bytes
    the payload: netCDF-4 (h5netcdf) or safetensors

Why a header and not a checksum inside HDF5 or a second file: the digest covers every byte, so that a flipped bit is
found before the HDF5 library (which trusts its input) sees the file; one file is published by one link; and a header
of 512 * 2^n bytes is what HDF5 calls a user block, so that h5py, h5dump and ``xr.open_dataset(path,
engine="h5netcdf")`` read a unit as it is. The key is in the file, so that a file under a wrong name is found too.
"""

import hashlib
import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy
import xarray as xr

from hoanalysis.errors import ArgumentError, StoreError, listed

MAGIC = b"hoanalysis-unit 1 "
_FIRST_LINE = len(MAGIC) + 64 + 1
_SMALLEST_HEADER = 512

NETCDF = "netcdf"
ARRAYS = "arrays"


class Damaged(Exception):
    """The bytes are not those that were published; the text says which check failed."""


def canonical(key: Mapping[str, Any]) -> str:
    """The one JSON text of a key: sorted names, no spaces, ASCII.

    >>> canonical({"b": 1, "a": "é"})
    '{"a":"\\\\u00e9","b":1}'
    """
    try:
        return json.dumps(dict(key), sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            "a unit's key must be a JSON object of texts, finite numbers, lists and mappings",
            where=repr(key)[:200],
            why=str(error),
            do="convert arrays and numpy numbers to lists and Python numbers",
        ) from error


def digest_of(key: Mapping[str, Any]) -> str:
    """The SHA-256 of the canonical JSON of a key, which is the name of its unit."""
    return hashlib.sha256(canonical(key).encode()).hexdigest()


def pack(key: Mapping[str, Any], kind: str, payload: bytes) -> bytes:
    """The bytes of a unit file."""
    about = json.dumps(
        {"key": json.loads(canonical(key)), "payload": kind, "size": len(payload)}, sort_keys=True
    ).encode()
    length = _SMALLEST_HEADER
    while length < _FIRST_LINE + len(about) + 1:
        length *= 2
    sealed = about.ljust(length - _FIRST_LINE - 1) + b"\n" + payload
    return MAGIC + hashlib.sha256(sealed).hexdigest().encode() + b"\n" + sealed


def unpack(data: bytes, digest: str) -> tuple[str, bytes]:
    """The kind and the payload of the unit ``digest``; raises `Damaged` unless every bit is what `pack` wrote."""
    if not data.startswith(MAGIC):
        raise Damaged("it is empty" if not data else "it does not start as a unit of this version does")
    sealed = memoryview(data)[_FIRST_LINE:]
    expected = MAGIC + hashlib.sha256(sealed).hexdigest().encode() + b"\n"
    if data[:_FIRST_LINE] != expected:
        raise Damaged("its digest is not that of its content")
    line, _, payload = bytes(sealed).partition(b"\n")
    about = json.loads(line)
    if digest_of(about["key"]) != digest:
        raise Damaged("it holds the unit of another key")
    return about["payload"], payload


def netcdf_bytes(ds: xr.Dataset, encoding: Mapping[str, Any] | None = None) -> bytes:
    """``ds`` as netCDF-4 in memory; equal Datasets give equal bytes (no time stamps, no inherited encoding).

    In memory, because the HDF5 library does not survive a full disk: all input and output is ours.
    """
    slashed = [name for name in (*ds.variables, *ds.dims) if "/" in str(name)]
    if slashed:
        raise StoreError(
            f"the names {listed(slashed)} contain '/', which netCDF and Zarr take for a folder",
            do="rename the variables; labels may contain anything",
        )
    buffer = io.BytesIO()
    try:
        import h5netcdf

        with h5netcdf.File(buffer, "w") as file:
            ds.drop_encoding().dump_to_store(xr.backends.H5NetCDFStore(file), encoding=dict(encoding or {}))
    except ImportError as error:
        raise StoreError("netCDF cannot be written here", why=str(error), do="pip install h5netcdf h5py") from error
    except (TypeError, ValueError) as error:
        raise StoreError(
            "this Dataset cannot be written as netCDF",
            why=str(error),
            do="keep attributes to texts, numbers and arrays, and labels without NUL characters",
        ) from error
    return buffer.getvalue()


def dataset_of(payload: bytes) -> xr.Dataset:
    """The Dataset of `netcdf_bytes`, in memory, without encoding."""
    with xr.open_dataset(io.BytesIO(payload), engine="h5netcdf") as ds:
        return ds.load().drop_encoding()


def arrays_bytes(arrays: Mapping[str, np.ndarray]) -> bytes:
    """``arrays`` as safetensors; equal arrays give equal bytes, in whatever order and memory layout they come."""
    plain = {name: _plain(name, np.asarray(array)) for name, array in sorted(arrays.items())}
    return safetensors.numpy.save(plain)


def _plain(name: str, array: np.ndarray) -> np.ndarray:
    """C-contiguous and in the machine's byte order: safetensors writes the memory as it lies there."""
    if array.dtype.kind not in "biuf":
        raise StoreError(
            f"the array {name!r} has dtype {array.dtype}, which safetensors does not hold",
            do="store booleans, integers or floats; complex numbers as two arrays",
        )
    return np.asarray(array, dtype=array.dtype.newbyteorder("="), order="C")


def arrays_of(payload: bytes) -> dict[str, np.ndarray]:
    """The arrays of `arrays_bytes`, sorted by name."""
    return dict(sorted(safetensors.numpy.load(payload).items()))
