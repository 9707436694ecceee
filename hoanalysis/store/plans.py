"""Plans: which units a study asks for, in immutable numbered files.

``plans/<name>-<number>-<digest>.json``: the number gives the order of registrations (no time stamp does), the digest
is that of the content. Results use the units that a plan names and no others, so a changed study mixes nothing.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from hoanalysis.errors import ArgumentError, StoreError, listed, nearest
from hoanalysis.store.files import explained, shown

_FILE = re.compile(r"(?P<name>.+)-(?P<number>\d{6,})-(?P<digest>[0-9a-f]{16})\.json")
_LONGEST_NAME = 200  # file systems allow 255 bytes
_ABSENT = object()


@dataclass(frozen=True, order=True)
class PlanFile:
    """One registration of a study."""

    name: str
    number: int
    digest: str
    path: Path


def plan_files(folder: Path) -> list[PlanFile]:
    """The registrations in ``folder``, sorted by name and number."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := _FILE.fullmatch(path.name):
            found.append(PlanFile(unquote(match["name"]), int(match["number"]), match["digest"], path))
    return sorted(found)


def newest(folder: Path, name: str) -> PlanFile | None:
    """The last registration of ``name``."""
    return max((p for p in plan_files(folder) if p.name == name), default=None)


def chosen(folder: Path, name: str | None) -> PlanFile | None:
    """The last registration of ``name``; without a name, of the only study there is."""
    names = sorted({p.name for p in plan_files(folder)})
    if name is None and len(names) > 1:
        raise StoreError(
            f"this store holds {len(names)} studies", where=shown(folder.parent), do=f"name one of {listed(names)}"
        )
    if name is not None and names and name not in names:
        raise StoreError(f"this store holds no study {name!r}", where=shown(folder.parent), do=nearest(name, names))
    return newest(folder, names[0] if name is None else name) if names else None


def encode(plan: dict[str, Any]) -> bytes:
    """The bytes of a registration."""
    try:
        return json.dumps(plan, allow_nan=False, separators=(",", ":")).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise ArgumentError("a plan must be a JSON document", why=str(error)) from error


def next_name(folder: Path, name: str, data: bytes) -> str:
    """The file name of the next registration, whose bytes are ``data``."""
    number = max((p.number for p in plan_files(folder)), default=0) + 1
    return f"{_quoted(name)}-{number:06d}-{_digest(data)}.json"


def _quoted(name: str) -> str:
    quoted = quote(name, safe="", errors="surrogatepass")
    if not name or len(quoted) > _LONGEST_NAME:
        raise ArgumentError(
            "the name of a study is empty or too long for a file name", where=repr(name)[:80], do="choose a shorter one"
        )
    return quoted


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def decode(file: PlanFile) -> dict[str, Any]:
    """The plan in ``file``; a `StoreError` where its content is not what was registered."""
    with explained("read the plan", file.path):
        data = file.path.read_bytes()
    if _digest(data) != file.digest:
        raise StoreError(
            f"the newest plan of the study {file.name!r} is damaged",
            where=shown(file.path),
            why="its digest is not that of its content; an older plan would give other results",
            do="run the study again: it registers its plan anew and recomputes nothing that is there",
        )
    return json.loads(data)


def unit_count(plan: Any) -> int:
    """How many units a plan names: the entries of its lists called ``units``, at any depth.

    >>> unit_count({"steps": [{"units": [{"shard": 0}, {"shard": 1}]}, {"units": [{"shard": 0}]}]})
    3
    """
    if isinstance(plan, list):
        return sum(map(unit_count, plan))
    if not isinstance(plan, dict):
        return 0
    return sum(len(v) if k == "units" and isinstance(v, list) else unit_count(v) for k, v in plan.items())


def difference(old: Any, new: Any, path: str = "study") -> Iterator[str]:
    """What changed between two JSON documents, a line a value.

    >>> list(difference({"order": 2, "data": {"seed": 0}}, {"order": 3, "data": {"seed": 0}, "dtype": "float64"}))
    ["study.dtype: absent -> 'float64'", 'study.order: 2 -> 3']
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            yield from difference(old.get(name, _ABSENT), new.get(name, _ABSENT), f"{path}.{name}")
    elif old is _ABSENT or new is _ABSENT or old != new or type(old) is not type(new):
        yield f"{path}: {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    text = "absent" if value is _ABSENT else repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
