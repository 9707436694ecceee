"""`load_checkpoint`: one file, or one index of shards, to a `Checkpoint`."""

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from hoanalysis.checkpoints import distributed, safetensors_file, torch_file, unpack
from hoanalysis.checkpoints.sniff import existing, sniff, step_of, within
from hoanalysis.errors import CheckpointError, HoError, listed

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The weights of a model at one step of its training, as they stand in a file.

    Attributes
    ----------
    state_dict
        Name -> tensor, on the CPU. float16 and bfloat16 are read as float32, and a note says so.
    step
        The last integer in the file name, or None.
    sha256
        Of the file's bytes, those that were read; of an index or a folder, over the names and hashes of its files.
    format
        "safetensors" or "torch".
    optimizer_state
        State name -> parameter name -> tensor (``optimizer_state["exp_avg"]["fc.weight"]``), or None.
    metadata
        The strings that a safetensors file carries. ``training`` is a JSON object in the shipped runs; of a file of
        torch.save it is ``{"optimizer": {..}}`` with the settings that all parameter groups share.
    notes
        What was noticed or decided while reading; `fit` adds to it.
    """

    path: Path
    format: Literal["safetensors", "torch"]
    sha256: str
    step: int | None
    state_dict: "dict[str, Tensor]" = field(repr=False)
    optimizer_state: unpack.OptimizerState | None = field(default=None, repr=False)
    metadata: Mapping[str, str] = field(default_factory=dict, repr=False)
    notes: list[str] = field(default_factory=list)


def load_checkpoint(path: str | os.PathLike[str], key: str | None = None) -> Checkpoint:
    """Read a checkpoint: safetensors, a file of torch.save, a ``*.index.json`` of shards, or a folder that holds one.

    Of folders those of Hugging Face are read (an index with its shards, or the one file of weights), and those of
    torch.distributed.checkpoint.

    Files of torch.save are read with ``weights_only=True``, always. A state_dict inside a larger file is found under
    the usual keys (state_dict, model_state_dict, model, module, params, also nested); ``key`` names another, as a
    dotted path. An optimizer's state is kept apart: in files of torch.save under optimizer, optimizer_state_dict or
    optimizer_states, in safetensors as tensors ``optimizer.<state>.<parameter>``.

    Raises
    ------
    CheckpointError
        If the file is missing, empty, truncated, damaged, no checkpoint, holds code, or holds tensors that cannot be
        differentiated (quantised, sparse, meta, distributed).
    """
    with _explained(path):
        return _load(Path(path), key)


@contextlib.contextmanager
def _explained(path: str | os.PathLike[str]) -> Iterator[None]:
    """What the operating system refuses (permission, a failing disk, too long a name) as a `CheckpointError`."""
    try:
        yield
    except OSError as error:
        if isinstance(error, HoError):
            raise
        raise CheckpointError(
            f"the checkpoint cannot be read: {error.strerror or error}",
            where=str(path),
            do="check its permissions and the disk, or give another path",
        ) from error


def _load(path: Path, key: str | None) -> Checkpoint:
    if path.is_dir() and (inside := within(path)) is not None:
        if inside.name == distributed.METADATA:
            return _load_distributed(path, key)
        return replace(load_checkpoint(inside, key), path=path, step=step_of(path))
    path = existing(path)
    with path.open("rb") as file:
        before = _state_of(file)
        loaded = _load_open(path, file, key)
        if _state_of(file) != before:
            raise CheckpointError(
                "the file was written to while it was read",
                where=str(path),
                do="call again when training has finished writing it",
            )
    return loaded


def _state_of(file: BinaryIO) -> tuple[int, int, bytes]:
    """Size, time and beginning: a recorder writes through a map of its file, which leaves the time as it was."""
    told = os.fstat(file.fileno())
    return told.st_size, told.st_mtime_ns, os.pread(file.fileno(), 4096, 0)


def _load_open(path: Path, file: BufferedReader, key: str | None) -> Checkpoint:
    size = os.fstat(file.fileno()).st_size
    kind = sniff(path, file.read(512))
    if kind == "index":
        return _load_index(path, file)
    _check_memory(path, size)
    # the hash and the tensors come from one open file, so a file that is replaced meanwhile cannot mix two
    file.seek(0)
    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if kind == "safetensors":
        return _load_safetensors(path, file, size, sha256)
    return _load_torch(path, file, kind, sha256, key)


def _load_safetensors(path: Path, file: BinaryIO, size: int, sha256: str) -> Checkpoint:
    notes = [] if path.suffix == ".safetensors" else [f"the name ends in {path.suffix!r}, the content is safetensors"]
    header = safetensors_file.read_header(file, path, size)
    if half := sum(e.end - e.begin for e in header.entries.values() if e.dtype in ("F16", "BF16")):
        _check_memory(path, size + 2 * half, " (half precision is read as float32)")
    tensors = safetensors_file.read_tensors(file, path, header)
    weights, optimizer_state = unpack.split_optimizer(tensors)
    return Checkpoint(
        path,
        "safetensors",
        sha256,
        step_of(path),
        _plain(weights, path, notes),
        optimizer_state,
        header.metadata,
        notes,
    )


def _load_torch(path: Path, file: BinaryIO, kind: str, sha256: str, key: str | None) -> Checkpoint:
    if path.suffix == ".safetensors":
        raise CheckpointError(
            "the name ends in .safetensors, and the content is a pickle",
            where=str(path),
            why="safetensors is chosen where pickles are not trusted, so this file is not what it says",
            do="where it is trusted, rename it to .pt",
        )
    content = (torch_file.read_archive if kind == "torch" else torch_file.read_legacy)(file, path)
    return _of_content(content, path, sha256, key)


def _load_distributed(path: Path, key: str | None) -> Checkpoint:
    _check_memory(path, sum(p.stat().st_size for p in distributed.files_of(path)))
    sha256 = content_sha256(path)
    loaded = _of_content(distributed.read(path), path, sha256, key)
    if content_sha256(path) != sha256:
        raise CheckpointError("the folder was written to while it was read", where=str(path), do="call again later")
    return loaded


def _of_content(content: Any, path: Path, sha256: str, key: str | None) -> Checkpoint:
    try:
        return _found_in(content, path, sha256, key)
    except CheckpointError:
        raise
    except Exception as error:  # a forged or damaged file holds anything in any place
        raise CheckpointError(
            "what the file holds is not laid out as a checkpoint is",
            where=str(path),
            why=f"{type(error).__name__}: {str(error)[:200]}",
            do="save the state_dict alone, with safetensors",
        ) from error


def _found_in(content: Any, path: Path, sha256: str, key: str | None) -> Checkpoint:
    notes: list[str] = []
    inert = unpack.inert_code(content)
    if inert:
        notes.append(f"the file names code for another loader to run, ignored here: {listed(inert)}")
        warnings.warn(f"{path}: {notes[-1]}", stacklevel=7)
    weights = unpack.find_state_dict(content, str(path), key, notes)
    optimizer_state = unpack.find_optimizer(content, weights, notes)
    plain, settings = _plain(weights, path, notes), unpack.optimizer_settings(content)
    return Checkpoint(path, "torch", sha256, step_of(path), plain, optimizer_state, settings, notes)


def _check_memory(path: Path, size: int, why: str = "") -> None:
    """Refuse a file that does not fit the free memory, where the system says how much that is."""
    available = available_memory()
    if available is not None and size > available:
        raise CheckpointError(
            f"the checkpoint needs {size:,} bytes of memory{why}, and {available:,} are available",
            where=str(path),
            do="free memory, or use a larger machine",
        )


def available_memory() -> int | None:
    """Bytes that can be taken without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None


def _plain(weights: "Mapping[str, Tensor]", path: Path, notes: list[str]) -> "dict[str, Tensor]":
    """The tensors detached, half precision as float32; refuse what is no plain dense tensor in memory."""
    import torch

    plain, upcast = {}, []
    for name, tensor in weights.items():
        tensor = tensor.detach()
        what = _unusable(tensor)
        if what:
            raise CheckpointError(
                f"tensor {name!r} is {what}, and derivatives need plain dense floating-point tensors",
                where=str(path),
                do="save the state_dict of the full-precision model",
            )
        held = tensor.untyped_storage().nbytes() // tensor.element_size()
        if tensor.numel() > held:
            raise CheckpointError(
                f"tensor {name!r} declares {tensor.numel() * tensor.element_size():,} bytes, "
                f"and the file holds {held * tensor.element_size():,} of them",
                where=str(path),
                why="its strides repeat the same elements: an expanded tensor, or a forged file",
                do="save tensor.contiguous()",
            )
        if tensor.dtype in (torch.float16, torch.bfloat16):
            upcast.append(str(tensor.dtype).removeprefix("torch."))
            tensor = tensor.float()
        plain[name] = tensor
    if upcast:
        kinds = " and ".join(sorted(set(upcast)))
        notes.append(f"{len(upcast)} tensors of {kinds} are read as float32")
    return plain


def _unusable(tensor: "Tensor") -> str:
    import torch

    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return f"a {type(tensor).__name__}"
    if tensor.is_quantized or "float8" in str(tensor.dtype):
        return f"quantised ({tensor.dtype})"
    if tensor.layout != torch.strided:
        return f"sparse ({tensor.layout})"
    if tensor.is_meta:
        return "a meta tensor, which has a shape and no data"
    return ""


def _load_index(path: Path, file: BinaryIO) -> Checkpoint:
    """The shards of an index: {"weight_map": {tensor: file}}, all beside it, each tensor in exactly one of them.

    All shards are of one format. Tied tensors may be under several names in one shard.
    """
    names = _weight_map(path, file)
    shards = {name: _shard(path, name) for name in dict.fromkeys(names.values())}
    weights: dict[str, Tensor] = {}
    optimizer: unpack.OptimizerState = {}
    home: dict[str, str] = {}
    notes: list[str] = []
    hashes: dict[str, str] = {}
    form: Literal["safetensors", "torch"] | None = None
    for shard, location in shards.items():
        part = load_checkpoint(location)
        form = form or part.format
        if part.format != form:
            raise CheckpointError(
                f"the shard {shard!r} is of {part.format}, the ones before of {form}", where=str(path)
            )
        hashes[shard] = part.sha256
        for name in part.state_dict:
            if name in home:
                raise CheckpointError(
                    f"tensor {name!r} is in two shards, {home[name]!r} and {shard!r}", where=str(path)
                )
            home[name] = shard
        absent = [n for n, s in names.items() if s == shard and n not in part.state_dict]
        if absent:
            raise CheckpointError(
                f"the shard {shard!r} lacks {listed(absent)}", where=str(path), why="the index says that they are there"
            )
        weights.update(part.state_dict)
        for kind, tensors in (part.optimizer_state or {}).items():
            optimizer.setdefault(kind, {}).update(tensors)
        notes += [f"{shard}: {note}" for note in part.notes]
    stray = [n for n in weights if n not in names]
    if stray:
        raise CheckpointError(f"the shards hold {listed(stray)}, which the index does not name", where=str(path))
    if form is None:
        raise CheckpointError("the index names no shard", where=str(path), do="save the checkpoint again")
    return Checkpoint(path, form, _joined(hashes), step_of(path), weights, optimizer or None, {}, notes)


def _weight_map(path: Path, file: BinaryIO) -> dict[str, Any]:
    file.seek(0)
    try:
        weight_map = json.loads(file.read().decode("utf-8"))["weight_map"]
        for name in weight_map.values():
            if not isinstance(name, str):
                _shard(path, name)  # refuses it
        return dict(weight_map)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            "this JSON file is not an index of shards",
            where=str(path),
            why=f'an index is {{"weight_map": {{tensor: file}}}} ({type(error).__name__}: {error})',
        ) from None


def _joined(hashes: Mapping[str, str]) -> str:
    return hashlib.sha256(
        "".join(f"{shard}:{sha256}\n" for shard, sha256 in sorted(hashes.items())).encode()
    ).hexdigest()


def content_sha256(path: Path) -> str:
    """What `Checkpoint.sha256` of this file will be, without reading weights."""
    with _explained(path):
        return _content_sha256(path)


def _content_sha256(path: Path) -> str:
    if path.is_dir() and (inside := within(path)) is not None:
        if inside.name == distributed.METADATA:
            return distributed.sha256_of(path, content_sha256_of_file)
        return content_sha256(inside)
    with existing(path).open("rb") as file:
        if sniff(path, file.read(512)) == "index":
            shards = {_shard(path, name) for name in _weight_map(path, file).values()}
            return _joined({shard.name: content_sha256(shard) for shard in shards})
    return content_sha256_of_file(path)


def content_sha256_of_file(path: Path) -> str:
    """Of the bytes of a file, whatever it is."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shard(index: Path, name: object) -> Path:
    """The path of a shard: a plain file name beside the index, or a link to a file beside the index's own target."""
    if not isinstance(name, str) or name != Path(name).name or "\\" in name:
        raise CheckpointError(
            f"the index names the shard {name!r}",
            where=str(index),
            why="a shard is a file beside its index; this is a path that leaves the folder",
            do="do not trust this index; put the shards beside it, and name them alone",
        )
    if name.endswith(".json"):
        raise CheckpointError(f"the shard {name!r} is an index itself", where=str(index))
    location = index.parent / name
    if not location.exists():
        raise CheckpointError(f"the shard {name!r} is missing", where=str(index), do="copy all shards beside the index")
    if location.resolve().parent not in (index.parent.resolve(), index.resolve().parent):
        raise CheckpointError(
            f"the shard {name!r} is a link that leaves the folder", where=str(index), do="put the file itself there"
        )
    return location
