"""What a file is, by its first bytes."""

import difflib
import os
import re
from pathlib import Path
from typing import Literal

from hoanalysis.errors import CheckpointError, listed

Kind = Literal["safetensors", "torch", "torch (legacy)", "index"]

MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors format's own reader
SUFFIXES = (".safetensors", ".index.json", ".pt", ".pth", ".ckpt", ".bin", ".tar")

#: First bytes of what is often mistaken for a checkpoint: what it is, and what to do.
OTHERS = (
    (b"version https://git-lfs", "this is a git-lfs pointer, not weights", "run `git lfs pull` in its repository"),
    (b"\x89HDF\r\n", "this is an HDF5 file (Keras?), not a PyTorch checkpoint", "convert it to safetensors"),
    (b"GGUF", "this is a GGUF file, whose weights are quantised", "use the checkpoint it was made from"),
    (b"\x93NUMPY", "this is a NumPy array, not a checkpoint", "save a dict of tensors with safetensors"),
    (b"\x1f\x8b", "this is a gzip archive, not a checkpoint", "unpack it first"),
)
PAGES = (b"<!doctype", b"<html", b"<?xml", b"<head")


def sniff(path: Path, head: bytes) -> Kind:
    """The kind of the file whose first bytes (512 are plenty) are ``head``.

    Raises
    ------
    CheckpointError
        If the file is empty, a web page, a git-lfs pointer, or nothing that holds weights.
    """
    if not head:
        raise CheckpointError(
            "the file is empty (0 bytes)", where=str(path), why="an interrupted copy?", do="copy it again"
        )
    # byte 8 begins the JSON of a header. Checked first: the length in front of it may begin like any other format, and
    # a header of 640 bytes begins like a pickle
    header = head[8:9] == b"{"
    if header and int.from_bytes(head[:8], "little") <= MAX_HEADER:
        return "safetensors"
    for magic, what, do in OTHERS:
        if head.startswith(magic):
            raise CheckpointError(what, where=str(path), do=do)
    text = head.lstrip().lower()
    if text.startswith(PAGES):
        raise CheckpointError(
            "this is a web page, not weights",
            where=str(path),
            why="the download saved an error or a login page under the name of the checkpoint",
            do="download the file itself again, and compare its size",
        )
    if head.startswith(b"PK\x03\x04"):
        return "torch"
    if head.startswith(b"\x80"):
        return "torch (legacy)"
    if header:
        return "safetensors"
    if text.startswith((b"{", b"[")) and path.name.endswith(".json"):
        return "index"
    raise CheckpointError(
        "this is no checkpoint that this library knows",
        where=str(path),
        why=f"it starts with {head[:12]!r}, which is neither safetensors nor a file of torch.save",
        do="save a state_dict with safetensors.torch.save_file or torch.save",
    )


#: In place of the length of its header: a file of `hoanalysis.Recorder` whose step was being written. No reader of the
#: format takes it for one, since no header is so long.
TORN = b"torn\0\0\0\x7f"
SLOT = re.compile(r"step_ring_\d+\.safetensors")  # a place in its ring of latest steps: the step is in the header


def is_slot(path: Path) -> bool:
    return SLOT.fullmatch(path.name) is not None


def slot_step(path: Path) -> int | None:
    """The step that a slot holds; None where it is torn: being written, or left so by a process that was killed."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError:
        return None
    found = None if head.startswith(TORN) else re.search(rb'\\"step\\": (\d+)', head)
    return int(found[1]) if found else None


#: What a folder of one checkpoint holds, as Hugging Face and torch name it, the first that is there.
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WHOLE = ("model.safetensors", "pytorch_model.bin")


def within(folder: Path) -> Path | None:
    """The file that stands for a folder of one checkpoint: an index of shards, the weights, ``.metadata``; or None."""
    named = [folder / name for name in (*INDICES, ".metadata", *WHOLE)]
    indices = sorted(folder.glob("*.index.json"))
    return next((p for p in (*named, *(indices if len(indices) == 1 else [])) if p.is_file()), None)


def existing(path: str | os.PathLike[str]) -> Path:
    """The path of a file, or an error with its nearest neighbours."""
    path = Path(path)
    if "\0" in str(path):
        raise CheckpointError("a path holds a NUL character", where=repr(str(path)))
    if path.is_dir():
        raise CheckpointError(
            "this is a folder, not a checkpoint",
            where=str(path),
            why=f"the files in it that look like checkpoints: {listed(recognised(path)) or 'none'}",
            do="name one of the files, or open the folder as a run: open_run(folder)",
        )
    if path.exists() and not path.is_file():
        raise CheckpointError(
            "this is a pipe, a socket or a device, not a file", where=str(path), do="copy it to a file"
        )
    if path.is_symlink() and not path.exists():
        raise CheckpointError(
            "this is a link to a file that is not there",
            where=str(path),
            why=f"it leads to {os.readlink(path)}",
            do="copy the file itself, or mount what it leads to",
        )
    if not path.is_file():
        raise CheckpointError("there is no such file", where=str(path), do=neighbours(path))
    return path


def recognised(folder: Path) -> list[str]:
    """Names of the files of a folder whose suffix is usual for checkpoints."""
    return sorted(p.name for p in folder.iterdir() if p.name.endswith(SUFFIXES) and p.is_file())


def neighbours(path: Path) -> str:
    folder = path.parent
    while not folder.is_dir():
        if folder == folder.parent:
            return "check the path"
        path, folder = folder, folder.parent
    names = sorted(p.name for p in folder.iterdir())
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    if close:
        return f"did you mean {listed(close)} in {folder}?"
    found = recognised(folder)
    return f"the checkpoints in {folder}: {listed(found)}" if found else f"{folder} exists and holds no checkpoint"


def step_of(path: Path) -> int | None:
    """The last integer in the file name without its suffix; of a slot of a recorder's ring, the step in its header.

    >>> step_of(Path("run3/epoch=2-step=480.ckpt")), step_of(Path("best.pt"))
    (480, None)
    """
    if is_slot(path):
        return slot_step(path)
    stem = path.name
    for suffix in SUFFIXES:
        stem = stem.removesuffix(suffix)
    numbers = re.findall(r"\d+", stem)
    return int(numbers[-1]) if numbers else None
