"""Files that ask for more than they hold: refused by name, under 1 GB and 5 seconds, measured in another process."""

import io
import json
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

#: For each file: what came of reading it, the seconds of processor time, and the peak of memory in MB. Each is read in
#: a child of its own, whose memory begins as that of a process in which torch has been imported.
READER = """
import json, os, resource, sys, time
import torch
from hoanalysis.checkpoints import load_checkpoint
from hoanalysis.errors import HoError

def answer(path):
    # address space, so that a bomb ends this process and not the machine; and an end for what would take for ever
    resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30, 16 * 2**30))
    resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
    begin = time.process_time()
    try:
        load_checkpoint(path)
        said = "read"
    except HoError as error:
        said = f"{type(error).__name__}: {error.what}"
    except BaseException as error:
        said = f"unnamed: {error!r}"[:500]
    return [said, time.process_time() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]

for path in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        print(json.dumps([path, *answer(path)]), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def archive(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, content in members.items():
            new.writestr(f"a/{name}", content)


def members_of(content: object) -> dict[str, bytes]:
    """The members of a file of torch.save, without its folder."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with zipfile.ZipFile(buffer) as old:
        return {m.partition("/")[2]: old.read(m) for m in old.namelist()}


def zip_bomb(path: Path) -> None:
    """1.25 GB of zeros in 1 MB."""
    held = members_of({"w": torch.zeros(4)})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in held.items():
            if name != "data/0":
                new.writestr(f"a/{name}", content)
        with new.open("a/data/0", "w", force_zip64=True) as member:
            for _ in range(1280):
                member.write(bytes(2**20))


def declared_storage(path: Path) -> None:
    """A storage that its pickle declares 2^40 elements long."""
    held = members_of({"w": torch.zeros(4)})
    before = held["data.pkl"]
    held["data.pkl"] = before.replace(b"K\x04t", b"\x8a\x06" + (2**40).to_bytes(6, "little") + b"t")
    assert held["data.pkl"] != before
    archive(path, held)


def declared_legacy(path: Path) -> None:
    torch.save({"w": torch.zeros(4)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"K\x04", b"\x8a\x06" + (2**40).to_bytes(6, "little")))


def expanded(path: Path) -> None:
    torch.save({"w": torch.zeros(1).expand(10**6, 10**6)}, path)


def sparse(path: Path) -> None:
    """A sparse tensor of 10^24 entries, none of which is there."""
    places = torch.zeros(2, 0, dtype=torch.int64)
    nothing = torch.sparse_coo_tensor(places, torch.zeros(0), (10**9, 10**9), check_invariants=True)
    torch.save({"w": nothing}, path)


def meta(path: Path) -> None:
    torch.save({"w": torch.empty(10**6, 10**6, device="meta")}, path)


def deep_pickle(path: Path) -> None:
    """Lists in lists, a hundred thousand deep."""
    depth = 100_000
    held = members_of({"w": torch.zeros(4)})
    held["data.pkl"] = b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."
    archive(path, held)


def long_pickle(path: Path) -> None:
    """Forty million instructions that do nothing."""
    held = members_of({"w": torch.zeros(4)})
    held["data.pkl"] = b"\x80\x02}" + b"N0" * 20_000_000 + b"."
    archive(path, held)


def laughing_pickle(path: Path) -> None:
    """A tuple of two equal tuples of two equal tuples ..: 2^60 leaves for whoever walks them."""
    held = members_of({"w": torch.zeros(4)})
    doubling = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
    held["data.pkl"] = b"\x80\x02}X\x01\x00\x00\x00aK\x01" + doubling + b"s."
    archive(path, held)


def huge_memo(path: Path) -> None:
    """A memo index of 2^31: C unpicklers allot their memo up to it."""
    held = members_of({"w": torch.zeros(4)})
    held["data.pkl"] = b"\x80\x02]r" + struct.pack("<I", 2**31 - 1) + b"."
    archive(path, held)


def huge_string(path: Path) -> None:
    """A text that declares 2^62 bytes."""
    held = members_of({"w": torch.zeros(4)})
    held["data.pkl"] = b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"abc."
    archive(path, held)


def huge_integer(path: Path) -> None:
    """10^6 digits, whose conversion is quadratic."""
    held = members_of({"w": torch.zeros(4)})
    held["data.pkl"] = b"\x80\x02L" + b"9" * 1_000_000 + b"L\n."
    archive(path, held)


def many_members(path: Path) -> None:
    held = members_of({"w": torch.zeros(4)})
    archive(path, held | {f"data/x{i}": b"" for i in range(60_000)})


def forged_directory(path: Path) -> None:
    """An end of the archive that counts 2^32 - 2 members."""
    archive(path, members_of({"w": torch.zeros(4)}))
    content = bytearray(path.read_bytes())
    end = content.rindex(b"PK\x05\x06")
    content[end + 8 : end + 12] = b"\xfe\xff\xfe\xff"
    content[end + 12 : end + 16] = struct.pack("<I", 2**32 - 2)
    path.write_bytes(content)


def long_header(path: Path) -> None:
    """A header of safetensors of 90 MB: nested lists that no entry needs."""
    header = b'{"a":' + b"[" * 90_000_000
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def wide_header(path: Path) -> None:
    """60 MB of one number with sixty million digits."""
    header = b'{"a":{"dtype":"F32","shape":[' + b"9" * 60_000_000 + b'],"data_offsets":[0,0]}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def large_shapes(path: Path) -> None:
    """A shape of a million sizes of 2^62, whose product has 62 million bits."""
    shape = [2**62] * 1_000_000
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def declared_safetensors(path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))


def hole_in_file(path: Path) -> None:
    """A file of a terabyte that takes no room on the disk: more than the memory of the machine."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 2**40)


def hole_in_legacy(path: Path) -> None:
    torch.save({"w": torch.zeros(4)}, path, _use_new_zipfile_serialization=False)
    with path.open("r+b") as file:
        file.truncate(2**40)


BOMBS: dict[str, tuple[Callable[[Path], None], str]] = {
    "zip bomb": (zip_bomb, "damaged or forged"),
    "storage": (declared_storage, "torch cannot read"),
    "legacy storage": (declared_legacy, ""),
    "expanded": (expanded, "declares 4,000,000,000,000 bytes"),
    "sparse": (sparse, "sparse"),
    "meta": (meta, "meta tensor"),
    "deep pickle": (deep_pickle, "no state_dict"),
    "long pickle": (long_pickle, "instructions"),
    "laughing pickle": (laughing_pickle, "no state_dict"),
    "memo": (huge_memo, ""),
    "string": (huge_string, ""),
    "integer": (huge_integer, ""),
    "members": (many_members, ""),
    "directory": (forged_directory, ""),
    "long header": (long_header, "not JSON"),
    "wide header": (wide_header, "not JSON"),
    "large shapes": (large_shapes, "shape of 1,000,000 sizes"),
    "declared shape": (declared_safetensors, "truncated"),
    "hole in safetensors": (hole_in_file, "bytes of memory"),
    "hole in legacy": (hole_in_legacy, "bytes of memory"),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[str, tuple[str, float, float]]:
    """Bomb -> what was said of it, seconds, MB; and of a plain file."""
    folder, paths = tmp_path_factory.mktemp("bombs"), {}
    for name, (make, _) in {"plain": (plain, ""), **BOMBS}.items():
        suffix = "safetensors" if any(w in name for w in ("header", "shape", "safetensors")) else "pt"
        paths[name] = folder / f"{name.replace(' ', '-')}.{suffix}"
        make(paths[name])
    command = [sys.executable, "-c", READER, *map(str, paths.values())]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=500)
    told = {path: (said, seconds, peak) for path, said, seconds, peak in map(json.loads, ran.stdout.splitlines())}
    for path in paths.values():
        path.unlink()
    return {name: told.get(str(path), ("the process died", 0.0, 0.0)) for name, path in paths.items()}


def plain(path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, path)


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.row("C9", "C10", "C11", "C20")
def test_bombs_stay_under_a_gigabyte_and_five_seconds(answers: dict, name: str) -> None:
    said, seconds, peak = answers[name]
    assert seconds < 5, answers[name]
    assert peak < 1024, answers[name]
    assert said == "read" if name == "members" else said.startswith("CheckpointError"), answers[name]
    assert BOMBS[name][1] in said, said


def test_the_reader_of_these_tests_reads_a_plain_file(answers: dict) -> None:
    said, _, peak = answers["plain"]
    assert said == "read"
    assert 50 < peak < 1024


@pytest.mark.row("C20")
def test_a_checkpoint_larger_than_the_memory_is_refused_before_it_is_read(tmp_path: Path, monkeypatch) -> None:
    from hoanalysis.checkpoints import load, load_checkpoint
    from hoanalysis.errors import CheckpointError

    save_file({"a": torch.zeros(1000)}, tmp_path / "a.safetensors")
    monkeypatch.setattr(load, "available_memory", lambda: 3000)
    with pytest.raises(CheckpointError, match=r"needs 4,0.. bytes of memory, and 3,000 are available"):
        load_checkpoint(tmp_path / "a.safetensors")
    save_file({"a": torch.zeros(1000, dtype=torch.float16)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="float32"):  # it doubles when it is read
        load_checkpoint(tmp_path / "a.safetensors")
    monkeypatch.setattr(load, "available_memory", lambda: None)  # a system that does not say
    assert load_checkpoint(tmp_path / "a.safetensors").state_dict["a"].dtype == torch.float32
