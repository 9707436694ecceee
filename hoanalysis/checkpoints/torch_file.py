"""Files of torch.save: the checks of the archive, the listing of what a pickle names, the reading by ``weights_only``.

A pickle is a program. Its names of functions and classes ("globals") are listed by `pickletools`, which runs nothing;
what is then read is read by torch's restricted unpickler, which knows tensors and containers and refuses all else.
"""

import contextlib
import io
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from hoanalysis.errors import CheckpointError, listed

#: What every file of tensors names; the rest is shown to the user.
USUAL_MODULES = (
    "torch",
    "torch._utils",
    "torch._tensor",
    "torch.storage",
    "torch.nn.parameter",
    "collections",
    "_codecs",
)
MAX_INSTRUCTIONS = 3_000_000  # of a pickle: 30 for a tensor and 1 for a number; reading as many takes seconds
LEGACY_PICKLES = 5  # magic number, protocol, system, the object, the keys of its storages
LOCAL_HEADER = struct.Struct("<4s5H3L2H")


def read_archive(file: BinaryIO, path: Path) -> Any:
    """The object in a zip file of torch.save, after the checks of its members.

    Raises
    ------
    CheckpointError
        If the archive is truncated or damaged, has compressed, overlapping or duplicate members, is a TorchScript
        program, or holds anything but tensors and containers.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise CheckpointError(
                    "this is a TorchScript program, not a checkpoint",
                    where=str(path),
                    do="where the file is trusted, torch.jit.load it and save its state_dict() with safetensors",
                )
            members = _checked_members(archive, file, path)
            pickles = [m for m in members if m.filename.endswith(".pkl")]
            if not any(m.filename.endswith("/data.pkl") for m in pickles):
                raise CheckpointError(
                    "this zip archive is not a file of torch.save",
                    where=str(path),
                    why=f"it has no data.pkl; its members: {listed(m.filename for m in members)}",
                    do="unpack it, or give the checkpoint itself",
                )
            damaged = archive.testzip()
            if damaged is not None:
                raise _damaged(path, damaged, "its bytes do not have the recorded CRC-32")
            for m in pickles:
                _refuse_long(io.BytesIO(archive.read(m)), path, 1)
            names = [name for m in pickles for name in globals_of(io.BytesIO(archive.read(m)))]
    except (zipfile.BadZipFile, EOFError, struct.error, OSError, RuntimeError, ValueError) as error:
        size = file.seek(0, io.SEEK_END)
        raise CheckpointError(
            f"the file is truncated or damaged: {size:,} bytes found, "
            "and a zip archive that torch.save wrote needs its directory at the end",
            where=str(path),
            why=str(error),
            do="copy the file again, and compare the sizes",
        ) from None
    return _weights_only(file, path, names)


def read_legacy(file: BinaryIO, path: Path) -> Any:
    """The object in a file of torch.save before its version 1.6, a sequence of pickles."""
    file.seek(0)
    _refuse_long(file, path, LEGACY_PICKLES)
    file.seek(0)
    return _weights_only(file, path, globals_of(file))


def _damaged(path: Path, member: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"the archive's member {member!r} is damaged or forged",
        where=str(path),
        why=why,
        do="copy the file again; torch.save writes plain, stored members, each once",
    )


def _checked_members(archive: zipfile.ZipFile, file: BinaryIO, path: Path) -> list[zipfile.ZipInfo]:
    """The members, none compressed (a small file could grow without bound), none twice, none over another."""
    members = sorted(archive.infolist(), key=lambda m: m.header_offset)
    seen: set[str] = set()
    end = 0
    for member in members:
        if member.filename in seen:
            raise _damaged(path, member.filename, "the archive names it twice")
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise _damaged(path, member.filename, "it is compressed")
        if member.header_offset < end:
            raise _damaged(path, member.filename, "it overlaps another member")
        seen.add(member.filename)
        file.seek(member.header_offset)
        *_, name_length, extra_length = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
        end = member.header_offset + LOCAL_HEADER.size + name_length + extra_length + member.compress_size
    return members


class _TooLong(Exception):
    pass


def globals_of(file: BinaryIO, pickles: int = LEGACY_PICKLES) -> list[str]:
    """The functions and classes that the pickles of a file name, as ``module.name``, without running any of it.

    >>> globals_of(io.BytesIO(pickle.dumps(print)))
    ['builtins.print']
    """
    names: dict[str, None] = {}
    with contextlib.suppress(Exception):  # behind the last pickle come raw bytes, and a forged one may hold anything
        for _ in range(pickles):
            for name in _globals(file):
                names[name] = None
    return list(names)


def _refuse_long(file: BinaryIO, path: Path, pickles: int) -> None:
    """A pickle of many millions of instructions would keep the reader busy for minutes."""
    count = 0
    with contextlib.suppress(Exception):
        for _ in range(pickles):
            for _ in pickletools.genops(file):
                count += 1
                if count > MAX_INSTRUCTIONS:
                    break
    if count > MAX_INSTRUCTIONS:
        raise CheckpointError(
            f"the pickle in this file has more than {MAX_INSTRUCTIONS:,} instructions, and was not read",
            where=str(path),
            why="a tensor needs some thirty of them: it holds long lists beside the weights, or is forged",
            do="save the state_dict alone, with safetensors where that is possible",
        )


def _globals(file: BinaryIO) -> Iterator[str]:
    strings: list[str] = []  # what STACK_GLOBAL takes its two names from
    memo: dict[int, str] = {}
    for opcode, argument, _ in pickletools.genops(file):
        argument = argument if argument is not None else ""
        if opcode.name in ("GLOBAL", "INST"):
            yield str(argument).replace(" ", ".", 1)
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(strings[-2:])
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = strings[-1] if strings else ""
        elif opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[int(argument)] = strings[-1] if strings else ""
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            strings.append(memo.get(int(argument), ""))
        elif isinstance(argument, str):
            strings.append(argument)


def _unusual(names: list[str], message: str) -> list[str]:
    """The names that are not those of every file of tensors, and those that torch says it refused."""
    refused = re.findall(r"GLOBAL (\S+) was not an allowed global", message)
    unusual = [name for name in names if name.rpartition(".")[0] not in USUAL_MODULES]
    return list(dict.fromkeys(unusual + refused))


def _weights_only(file: BinaryIO, path: Path, names: list[str]) -> Any:
    import torch

    file.seek(0)
    try:
        with warnings.catch_warnings(action="ignore"):  # on pickle protocols and old storages: nothing to act on
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file gives RuntimeError, EOFError, KeyError, ...: there is no family
        if isinstance(error, pickle.UnpicklingError) or _unusual(names, ""):
            raise _refused(path, names, str(error)) from None
        raise CheckpointError(
            "torch cannot read the file",
            where=str(path),
            why=f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else 'no message'}",
            do="copy the file again; if it is whole, save its state_dict with safetensors where it is trusted",
        ) from None


def _refused(path: Path, names: list[str], message: str) -> CheckpointError:
    unusual = _unusual(names, message)
    modules = [name for name in unusual if name.startswith("torch.nn.")]
    if modules:
        classes = [name for name in unusual if not name.startswith(("torch.nn.", "builtins.", "torch._C"))]
        return CheckpointError(
            "this file holds a whole pickled module, not a state_dict",
            where=str(path),
            why=f"it names the classes {listed(classes + modules)}, whose code would run; weights alone are read here",
            do="where the file is trusted, load it where it was made, and save its state_dict with safetensors",
        )
    if unusual:
        return CheckpointError(
            "this file names code that reading it would run, and it was not read",
            where=str(path),
            why=f"besides tensors its pickle names {listed(unusual)}",
            do="where the file is trusted, load it where it was made, and save its state_dict alone, with safetensors",
        )
    reason = message.strip().splitlines()[-1] if message.strip() else ""
    return CheckpointError(
        "this file is a pickle that torch.load(weights_only=True) refuses, and it was not read",
        where=str(path),
        why=reason[:300],
        do="where the file is trusted, load it where it was made, and save its state_dict alone, with safetensors",
    )
