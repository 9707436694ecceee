"""The safetensors format: eight bytes with the length of a JSON header, the header, then the tensors' bytes.

The header is checked by hand before any tensor is read: a length that fits the file, JSON without duplicate keys, known
dtypes, shapes that agree with the offsets, and offsets that cover the data once, without overlap and without a hole.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from hoanalysis.checkpoints.sniff import MAX_HEADER
from hoanalysis.errors import CheckpointError, listed

if TYPE_CHECKING:
    from torch import Tensor

MAX_DIMS = 64

#: Bytes of an element and the name of torch's dtype.
DTYPES = {
    "F64": (8, "float64"),
    "F32": (4, "float32"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E5M2": (1, "float8_e5m2"),
    "C64": (8, "complex64"),
    "I64": (8, "int64"),
    "I32": (4, "int32"),
    "I16": (2, "int16"),
    "I8": (1, "int8"),
    "U64": (8, "uint64"),
    "U32": (4, "uint32"),
    "U16": (2, "uint16"),
    "U8": (1, "uint8"),
    "BOOL": (1, "bool"),
}


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: its dtype in the format's words, its shape, and where its bytes are."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """What the file declares; ``start`` is where the data begins."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    start: int


def read_header(file: BinaryIO, path: Path, size: int) -> Header:
    """Parse and check the header of an open file of ``size`` bytes. Nothing larger than the header is read.

    Raises
    ------
    CheckpointError
        Naming the check that failed, and the tensor.
    """

    def fail(what: str, why: str = "") -> CheckpointError:
        return CheckpointError(what, where=str(path), why=why, do="copy or save the file again")

    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER:
        raise fail(f"the header declares {length:,} bytes", f"a safetensors header has at most {MAX_HEADER:,}")
    if 8 + length > size:
        raise fail(f"the file is truncated: {size:,} bytes found, the header alone needs {8 + length:,}")
    try:
        declared = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_unique)
    except _Duplicate as error:
        raise fail(f"the header names {error.args[0]!r} twice") from None
    except (ValueError, RecursionError) as error:
        raise fail("the header is not JSON", str(error)[:200]) from None
    if not isinstance(declared, dict):
        raise fail("the header is not a JSON object")
    metadata = declared.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise fail("the header's __metadata__ is not a mapping of strings")
    entries = {name: _entry(name, value, fail) for name, value in declared.items()}
    _check_cover(entries, size - 8 - length, size, fail)
    return Header(entries, metadata, 8 + length)


class _Duplicate(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Duplicate(key)
            seen.add(key)
    return unique


def _natural(value: Any) -> bool:
    return type(value) is int and value >= 0  # a JSON true is an int to isinstance


def _entry(name: str, value: Any, fail) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise fail(f"the header's entry {name!r} does not consist of dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise fail(f"tensor {name!r} has the dtype {dtype!r}", f"the dtypes that are read: {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(map(_natural, shape)):
        raise fail(f"tensor {name!r} has the shape {shape!r}", "a shape is a list of natural numbers")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_natural, offsets)) or offsets[0] > offsets[1]:
        raise fail(f"tensor {name!r} has the data_offsets {offsets!r}", "they are [begin, end] with begin <= end")
    if len(shape) > MAX_DIMS:
        raise fail(f"tensor {name!r} has a shape of {len(shape):,} sizes", f"torch knows at most {MAX_DIMS}")
    needed, held = math.prod(shape) * DTYPES[dtype][0], offsets[1] - offsets[0]
    if needed != held:
        raise fail(
            f"tensor {name!r} is declared as {dtype} of shape {shape}, which is {needed:,} bytes, "
            f"and its data_offsets hold {held:,}"
        )
    return Entry(dtype, tuple(shape), *offsets)


def _check_cover(entries: dict[str, Entry], held: int, size: int, fail) -> None:
    """The tensors' bytes follow each other from 0 to the end of the file."""
    position, before = 0, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin < position:
            raise fail(f"tensors {before!r} and {name!r} overlap in the file")
        if entry.begin > position:
            raise fail(f"there is a hole of {entry.begin - position:,} bytes in front of tensor {name!r}")
        position, before = entry.end, name
    if position > held:
        lost = [name for name, entry in entries.items() if entry.end > held]
        raise fail(
            f"the file is truncated: {size:,} bytes found, {size - held + position:,} needed",
            f"the end of {listed(lost)} is missing",
        )
    if position < held:
        raise fail(f"{held - position:,} bytes at the end of the file belong to no tensor")


def read_tensors(file: BinaryIO, path: Path, header: Header) -> "dict[str, Tensor]":
    """The tensors of the file, in the order of its header."""
    import torch

    tensors = {}
    for name, entry in header.entries.items():
        dtype = getattr(torch, DTYPES[entry.dtype][1])
        buffer = bytearray(entry.end - entry.begin)
        file.seek(header.start + entry.begin)
        if file.readinto(buffer) != len(buffer):  # type: ignore[attr-defined]
            raise CheckpointError("the file became shorter while it was read", where=f"{path}, tensor {name!r}")
        tensor = torch.frombuffer(buffer, dtype=dtype) if buffer else torch.empty(0, dtype=dtype)
        tensors[name] = tensor.reshape(entry.shape)
    return tensors
