"""Folders of torch.distributed.checkpoint: ``.metadata``, a pickle, and files that hold the pieces of the tensors.

torch reads ``.metadata`` by an unrestricted unpickler, which runs what the pickle names. Here every name of it becomes
an inert record of ours, none of torch's classes is made and nothing of the pickle is called; any other name refuses the
folder. Each piece is a file of torch.save within a file, and goes through the checks of `torch_file`.
"""

import io
import math
import os
import pickle
import pickletools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hoanalysis.checkpoints import torch_file
from hoanalysis.errors import CheckpointError, listed

if TYPE_CHECKING:
    from torch import Tensor

METADATA = ".metadata"
MAX_METADATA = 64 * 2**20
INERT_MODULES = ("torch.distributed.", "torch.serialization", "pathlib", "collections")
Contents = dict[Any, Any]


def is_distributed(folder: Path) -> bool:
    """Whether a folder was written by torch.distributed.checkpoint."""
    return (folder / METADATA).is_file()


def files_of(folder: Path) -> list[Path]:
    """The files of the checkpoint: its metadata and all pieces."""
    return [folder / METADATA, *sorted(p for p in folder.glob("*.distcp") if p.is_file())]


def read(folder: Path) -> Contents:
    """What was saved, as nested mappings: tensors whole, on the CPU.

    Raises
    ------
    CheckpointError
        For names beyond those of the format, a piece that is missing, outside of its file or of the folder, or of
        another shape than declared, and pieces that do not make up their tensor.
    """
    described = _metadata(folder / METADATA)
    try:
        return _contents(folder, described)
    except CheckpointError:
        raise
    except Exception as error:  # what a forged description breaks has no family
        raise _broken(folder, f"{type(error).__name__}: {error}") from None


def _contents(folder: Path, described: Any) -> Contents:
    entries, places = dict(described.state_dict_metadata), _places(described.storage_data)
    paths = dict(getattr(described, "planner_data", None) or {})
    contents: Contents = {}
    for name, entry in entries.items():
        try:
            value = _tensor(folder, name, entry, places) if hasattr(entry, "size") else _object(folder, name, places)
        except (AttributeError, TypeError, ValueError, KeyError, IndexError) as error:
            raise _broken(folder, f"{name!r}: {type(error).__name__}: {error}") from None
        path = paths.get(name, (name,))
        _insert(contents, path if isinstance(path, tuple) and path else (name,), value, folder)
    return _with_lists(contents)


def _broken(folder: Path, why: str) -> CheckpointError:
    return CheckpointError(
        "the metadata of this distributed checkpoint are damaged or forged",
        where=str(folder / METADATA),
        why=why[:300],
        do="copy the folder again, with its file .metadata",
    )


# ---- the metadata, without running them -------------------------------------------------------------------------


def _metadata(path: Path) -> Any:
    with path.open("rb") as file:
        data = file.read(MAX_METADATA + 1)
    if len(data) > MAX_METADATA:
        raise _broken(path.parent, f"they are larger than {MAX_METADATA:,} bytes")
    _refuse_large_memo(data, path)
    names = torch_file.globals_of(io.BytesIO(data), pickles=1)
    if strange := [n for n in names if not _is_inert(*n.rpartition(".")[::2])]:
        raise CheckpointError(
            "the metadata of this distributed checkpoint name code that reading them would run, and were not read",
            where=str(path),
            why=f"besides the format's own their pickle names {listed(strange)}",
            do="where the folder is trusted, convert it where it was made: "
            "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE.pt",
        )
    try:
        return _Reader(io.BytesIO(data)).load()
    except Exception as error:  # an unpickler has no family of errors
        raise _broken(path.parent, f"{type(error).__name__}: {error}") from None


def _refuse_large_memo(data: bytes, path: Path) -> None:
    """Python's unpickler allots its memo by the largest index that the pickle names."""
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(data):
                raise _broken(path.parent, f"the pickle stores something under the number {argument}")
    except CheckpointError:
        raise
    except Exception as error:
        raise _broken(path.parent, str(error)) from None


def _is_inert(module: str, name: str) -> bool:
    dtype = module == "torch" and (name == "Size" or name.startswith(_DTYPES))
    return dtype or module.startswith(INERT_MODULES)


_DTYPES = ("float", "bfloat", "int", "uint", "bool", "complex", "half", "double", "long", "quint", "qint")


class _Reader(pickle.Unpickler):
    """Makes a record of every class; calls nothing that is not defined here."""

    def find_class(self, module: str, name: str) -> Any:
        if not _is_inert(module, name):
            raise pickle.UnpicklingError(f"{module}.{name} is no part of the format")
        if name == "Size":
            return _size
        if name == "OrderedDict":
            return type("Ordered", (dict,), {})
        # one class a name and call, so that a forged BUILD changes nothing that another file sees
        return f"torch.{name}" if module == "torch" else type(name, (_Record,), {})


class _Record:
    def __new__(cls, *_: Any) -> "_Record":
        return object.__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, Mapping):
            self.__dict__.update({str(k): v for k, v in state.items()})


def _size(*sizes: Any) -> tuple[int, ...]:
    return _natural(sizes[0]) if sizes else ()


def _natural(sizes: Any) -> tuple[int, ...]:
    sizes = tuple(sizes)
    if not all(type(n) is int and 0 <= n < 2**48 for n in sizes):
        raise ValueError(f"a size is {sizes!r}")
    return sizes


# ---- the pieces -------------------------------------------------------------------------------------------------


def _places(storage: Any) -> dict[tuple[str, tuple[int, ...] | None], Any]:
    """(name, offset) -> where the piece lies."""
    return {(index.fqn, getattr(index, "offset", None)): info for index, info in storage.items()}


def _object(folder: Path, name: str, places: Mapping) -> Any:
    return _piece(folder, name, places[name, None])


def _tensor(folder: Path, name: str, entry: Any, places: Mapping) -> "Tensor":
    import torch

    shape, chunks = _natural(entry.size), list(entry.chunks)
    volume = sum(math.prod(_natural(c.sizes)) for c in chunks)
    if volume != math.prod(shape):
        raise ValueError(
            f"its {len(chunks)} pieces have {volume:,} entries, and the shape {shape} {math.prod(shape):,}"
        )
    parts = [_chunk(folder, name, c, shape, places) for c in chunks]
    if len(parts) == 1 and tuple(parts[0][1].shape) == shape:
        return parts[0][1]
    whole = torch.empty(shape, dtype=parts[0][1].dtype) if parts else torch.empty(shape)
    filled = torch.zeros(shape, dtype=torch.bool)
    for where, part in parts:
        if bool(filled[where].any()):
            raise ValueError(f"two pieces overlap at {where}")
        whole[where], filled[where] = part, True
    return whole


def _chunk(folder: Path, name: str, chunk: Any, shape: tuple[int, ...], places: Mapping) -> tuple[Any, "Tensor"]:
    from torch import Tensor

    offsets, sizes = _natural(chunk.offsets), _natural(chunk.sizes)
    if len(offsets) != len(shape) or any(o + s > n for o, s, n in zip(offsets, sizes, shape, strict=True)):
        raise ValueError(f"a piece at {offsets} of shape {sizes} lies outside of the shape {shape}")
    part = _piece(folder, name, places[name, offsets] if (name, offsets) in places else places[name, None])
    if not isinstance(part, Tensor) or tuple(part.shape) != sizes:
        got = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
        raise ValueError(f"the piece at {offsets} is {got}, and the metadata say {sizes}")
    if part.numel() * part.element_size() > part.untyped_storage().nbytes():
        raise ValueError(f"the piece at {offsets} declares more than its file holds")
    return tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True)), part


def _piece(folder: Path, name: str, info: Any) -> Any:
    """What one slice of a file holds."""
    file, offset, length = info.relative_path, info.offset, info.length
    if not isinstance(file, str) or file != Path(file).name or "\\" in file:
        raise CheckpointError(
            f"the metadata name the file {file!r} for {name!r}",
            where=str(folder / METADATA),
            why="pieces lie beside their metadata; this is a path that leaves the folder",
            do="do not trust this folder",
        )
    if getattr(info, "transform_descriptors", None):
        raise CheckpointError(
            f"the pieces of {name!r} are compressed or otherwise transformed",
            where=str(folder),
            why=f"{info.transform_descriptors!r}"[:200],
            do="save them without extensions",
        )
    path = folder / file
    if not path.is_file():
        raise CheckpointError(
            f"the file {file!r} is missing, which holds {name!r}", where=str(folder), do="copy all files of the folder"
        )
    if path.resolve().parent != folder.resolve():
        raise CheckpointError(
            f"the file {file!r} is a link that leaves the folder", where=str(folder), do="put the file itself there"
        )
    size = path.stat().st_size
    if not all(type(n) is int and n >= 0 for n in (offset, length)) or offset + length > size:
        raise CheckpointError(
            f"the file {file!r} is truncated: {name!r} lies at the bytes {offset!r} to {offset + length!r}, "
            f"and the file has {size:,}",
            where=str(path),
            do="copy the file again",
        )
    with path.open("rb") as stream:
        stream.seek(offset)
        data = io.BytesIO(stream.read(length))
    return (torch_file.read_archive if data.getvalue()[:2] == b"PK" else torch_file.read_legacy)(data, path)


# ---- from flat names to nested mappings -------------------------------------------------------------------------


def _insert(contents: Contents, path: tuple, value: Any, folder: Path) -> None:
    *parents, last = path
    for part in parents:
        contents = contents.setdefault(part, {})
        if not isinstance(contents, dict):
            raise _broken(folder, f"{path!r} lies within a tensor")
    contents[last] = value


def _with_lists(value: Any) -> Any:
    """Whole numbers as keys are places in a list; numbers as text are those of an optimizer's parameters."""
    if not isinstance(value, dict):
        return value
    inner = {k: _with_lists(v) for k, v in value.items()}
    if inner and all(type(k) is int for k in inner):
        return [inner[k] for k in sorted(inner)]
    if inner and all(isinstance(k, str) and k.isdecimal() for k in inner):
        return {int(k): v for k, v in inner.items()}
    return inner


def sha256_of(folder: Path, digest: Callable[[Path], str]) -> str:
    """One digest over the names and digests of the files."""
    import hashlib

    told = "".join(f"{p.name}:{digest(p)}\n" for p in files_of(folder))
    return hashlib.sha256(os.fsencode(told)).hexdigest()
