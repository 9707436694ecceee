"""What is at a path, in words: for errors about paths that are not what was expected."""

import json
from pathlib import Path
from typing import Any

from hoanalysis.errors import StoreError, listed, nearest
from hoanalysis.store.files import shown

#: The first bytes of files that people give by mistake.
_SIGNATURES = (
    (b"hoanalysis-unit ", "one unit of a store; give the folder of the store"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 or netCDF-4 file"),
    (b"CDF", "a netCDF-3 file, which hoanalysis does not write"),
    (b"PK\x03\x04", "a zip archive or a PyTorch checkpoint"),
    (b"\x80", "a pickle"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"version https://git-lfs", "a git-lfs pointer; run `git lfs pull`"),
    (b"<", "a web page or XML"),
)
_ZARR = ("zarr.json", ".zgroup", ".zarray", ".zmetadata")


def is_zarr(folder: Path) -> bool:
    """Whether ``folder`` is a Zarr group or array."""
    return any((folder / name).is_file() for name in _ZARR)


def described(path: Path) -> str:
    """One clause about what ``path`` is."""
    if path.is_file():
        return _file_described(path)
    if not path.is_dir():
        return "it is neither a file nor a folder"
    if is_zarr(path):
        return "it is a Zarr folder, and a store is not Zarr"
    names = sorted(shown(p.name) for p in path.iterdir())
    return f"it has no store.json; it holds {listed(names, 5)}" if names else "it is empty"


def _file_described(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        return "it is empty (0 bytes): an interrupted copy?"
    if head[8:10] in (b'{"', b"{ "):
        return "it is a safetensors file"
    return next((f"it is {text}" for start, text in _SIGNATURES if head.startswith(start)), "its format is not known")


def missing(path: Path, noun: str) -> StoreError:
    """The error for a path that is not there, with the names that are near."""
    folder = next((p for p in path.parents if p.is_dir()), path.parent)
    try:
        names = sorted(shown(p.name) for p in folder.iterdir() if not p.name.startswith("."))
    except OSError:
        names = []
    gone = path.relative_to(folder).parts[0]
    do = f"in {shown(folder)}: {nearest(gone, names)}" if names else f"{shown(folder)} is empty"
    return StoreError(f"there is no {noun} here", where=shown(path), why="no such file or folder", do=do)


def readable_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a store, or a `StoreError` that says what is wrong with it."""
    try:
        manifest = json.loads(path.read_bytes())
        whole = manifest["format"] == "hoanalysis-store" and manifest["version"] >= 1
    except (ValueError, KeyError, TypeError):
        whole = False
    if whole:
        return manifest
    raise StoreError(
        "the manifest of this store is damaged or of something else",
        where=shown(path),
        why='it should read {"format": "hoanalysis-store", "version": 1}',
        do="if this folder was a store, put that line back: units carry their own digests and are checked on reading",
        kept="nothing was changed",
    )
