"""Damage to files: by chance, and by mutations that know the format. Everything is drawn from a seed."""

import io
import itertools
import json
import pickletools
import random
import struct
import zipfile
from collections.abc import Iterator
from typing import Any

EXTREMES = [0, 1, -1, 255, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**30]
VALUES = [
    None,
    True,
    -1,
    2**63,
    1e308,
    float("inf"),
    "",
    "F32",
    "I64",
    "\0",
    "../x",
    [],
    {},
    [[]],
    [0, 8],
    [8, 0],
    [2**40],
]


def at_random(content: bytes, n: int, seed: int) -> Iterator[bytes]:
    """``content`` n times, cut short or with one bit flipped, in turn."""
    rng = random.Random(seed)
    for k in range(n):
        if k % 2:
            yield content[: rng.randrange(len(content))]
        else:
            yield flipped(content, rng.randrange(8 * len(content)))


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def havoc(content: bytes, rng: random.Random) -> bytes:
    """A few random edits of bytes."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        edit = rng.randrange(5)
        if edit == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif edit == 1:
            data[at:at] = rng.randbytes(rng.randint(1, 8))
        elif edit == 2:
            del data[at : at + rng.randint(1, 64)]
        elif edit == 3:
            start = rng.randrange(len(data) + 1)
            data[at:at] = data[start : start + rng.randint(1, 64)]
        else:
            data[at : at + 8] = struct.pack("<Q", rng.choice(EXTREMES) % 2**64)
    return bytes(data)


# ---- pickles ----------------------------------------------------------------------------------------------------


def pickle_edited(content: bytes, rng: random.Random) -> bytes:
    """A pickle with instructions left out, repeated, moved, or given other arguments."""
    try:
        ends = [(position or 0) for _, _, position in pickletools.genops(content)] + [len(content)]
    except Exception:
        return havoc(content, rng)
    parts = [content[a:b] for a, b in itertools.pairwise(ends)]
    for _ in range(rng.randint(1, 3)):
        i, j = rng.randrange(len(parts)), rng.randrange(len(parts))
        edit = rng.randrange(6)
        if edit == 0:
            parts[i] = b""
        elif edit == 1:
            parts.insert(i, parts[j])
        elif edit == 2:
            parts[i], parts[j] = parts[j], parts[i]
        elif edit == 3:
            parts[i] = _integer(rng)
        elif edit == 4:
            parts[i] = rng.choice(
                [b"N", b"}", b"]", b")", b"\x88", b"0", b"2", b"R", b"b", b"\x81", b"t", b"(", b"Q", b"s"]
            )
        else:
            name = rng.choice(
                [b"os system", b"torch FloatStorage", b"builtins eval", b"torch._utils _rebuild_tensor_v2"]
            )
            parts[i] = b"c" + name.replace(b" ", b"\n") + b"\n"
    return b"".join(parts)


def _integer(rng: random.Random) -> bytes:
    value = rng.choice(EXTREMES)
    size = (value.bit_length() + 8) // 8
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def archive_edited(content: bytes, rng: random.Random) -> bytes:
    """A file of torch.save with one member edited, dropped, repeated or renamed; the CRCs are right again."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as old:
            members = [(m.filename, old.read(m)) for m in old.infolist()]
    except Exception:
        return havoc(content, rng)
    if not members:
        return havoc(content, rng)
    i, edit = rng.randrange(len(members)), rng.randrange(6)
    name, data = members[i]
    if edit == 0:
        del members[i]
    elif edit == 1:
        members[i] = (rng.choice(["../x", "/x", "", name + "x", "a/data.pkl"]), data)
    elif edit == 2:
        members[i] = (name, havoc(data, rng))
    else:
        i = next((k for k, (n, _) in enumerate(members) if n.endswith("data.pkl")), i)
        members[i] = (members[i][0], pickle_edited(members[i][1], rng))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as new:
        for name, data in dict(members).items():
            new.writestr(zipfile.ZipInfo(name or "x"), data)
    return buffer.getvalue()


# ---- JSON and TOML ----------------------------------------------------------------------------------------------


def header_edited(content: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another value, name or key in its header; the length is right again."""
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
        _edit(header, rng)
        text = json.dumps(header).encode()
    except (ValueError, TypeError, RecursionError):
        return havoc(content, rng)
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def json_edited(content: bytes, rng: random.Random) -> bytes:
    try:
        document = json.loads(content)
        _edit(document, rng)
        return json.dumps(document).encode()
    except (ValueError, TypeError, RecursionError):
        return havoc(content, rng)


def _edit(document: Any, rng: random.Random) -> None:
    """Another value somewhere in a JSON document, in place."""
    if isinstance(document, dict) and document:
        key = rng.choice(list(document))
        if isinstance(document[key], (dict, list)) and document[key] and rng.random() < 0.7:
            _edit(document[key], rng)
        elif rng.random() < 0.3:
            document[rng.choice(["", "x", "__metadata__", "weight_map", key + "y"])] = document.pop(key)
        else:
            document[key] = rng.choice(VALUES)
    elif isinstance(document, list) and document:
        document[rng.randrange(len(document))] = rng.choice([*VALUES, *EXTREMES])


TOKENS = list("[]{}=,#.\"'\n\0\ufeff")
TOKENS += ["-1", "0", "17", "1e999", "nan", "inf", "true", "[[model]]", "1979-05-27", "0x7f", "2**3", "path", "order"]
TOKENS += [
    "factory",
    "directions",
    '""',
    '"/"',
    '"."',
    '"*"',
    '"../.."',
    '"\\u0000"',
    '"**"',
    '"[a"',
    '["to:"]',
    '["to:/"]',
]
TOKENS += ['"torch.nn:Linear"', '"os:_no_such"', '"builtins:exec"', '["random"]', "9" * 5000, "[" * 3000, "{a=" * 500]


def toml_edited(content: bytes, rng: random.Random) -> bytes:
    """A study with words left out, repeated, moved, or replaced by others of the format."""
    words = content.decode("utf-8", "replace").replace("\n", " \n ").split(" ")
    for _ in range(rng.randint(1, 3)):
        i, j, edit = rng.randrange(len(words)), rng.randrange(len(words)), rng.randrange(4)
        if edit == 0:
            words[i] = rng.choice(TOKENS)
        elif edit == 1:
            words[i], words[j] = words[j], words[i]
        elif edit == 2:
            words.insert(i, rng.choice([words[j], rng.choice(TOKENS)]))
        else:
            words[i] = ""
    return " ".join(words).encode("utf-8", "replace")
