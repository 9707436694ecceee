"""Killed or failing at the n-th operation, n = 1, 2, 3, ... until a run completes; killed at random instants.

After each: the store opens, no acknowledged unit is lost or counted twice, and the resumed run leaves the files of an
uninterrupted one, bit for bit.
"""

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.store import workload
from tests.store.faults import Job, Server

OPERATIONS = ("fsync", "rename", "link", "unlink")
POINTS = {"fsync": 14, "rename": 1, "link": 4, "unlink": 4}  # at least: a fault that never strikes proves nothing
MORE_THAN_ENOUGH = 200


def resumes(folder: Path, acks: list[str], quiet: dict[str, bytes]) -> None:
    """The assertions after every fault."""
    if folder.exists():
        workload.check_acknowledged(folder, acks)
    else:
        assert acks == []
    workload.run(folder)
    assert workload.snapshot(folder) == quiet
    shutil.rmtree(folder)


@pytest.mark.parametrize("action", ["before", "after"])
@pytest.mark.parametrize("op", [*OPERATIONS, "open", "write", "mkdir", "ftruncate"])
def test_S2_killed_at_every_operation(
    server: Server, quiet: dict[str, bytes], folder: Path, op: str, action: str
) -> None:
    acks = str(folder.parent.parent / "acks")
    for n in range(1, MORE_THAN_ENOUGH):
        end = server.run(Job(str(folder), op, n, action, acks))
        completed = end.status == 0
        assert completed or end.status == -signal.SIGKILL
        resumes(folder, end.acks, quiet)
        if completed:
            break
    assert completed
    assert n > POINTS.get(op, 1)


def test_S2_killed_again_while_resuming(server: Server, quiet: dict[str, bytes], folder: Path) -> None:
    """Two crashes in a row, at points drawn at random: recovery is itself crash-safe."""
    draw = random.Random(0)
    acks = str(folder.parent.parent / "acks")
    for _ in range(25):
        seen: list[str] = []
        for _ in range(3):
            job = Job(str(folder), draw.choice(OPERATIONS), draw.randint(1, 8), draw.choice(["before", "after"]), acks)
            seen += server.run(job).acks
        resumes(folder, seen, quiet)


def test_S2_killed_at_random_instants(server: Server, quiet: dict[str, bytes], folder: Path) -> None:
    acks = str(folder.parent.parent / "acks")
    # The quickest of a few runs, and as many tries as it takes: on a busy machine a single measure is far too long,
    # and most kills would come after the end.
    durations = []
    for _ in range(3):
        start = time.monotonic()
        assert server.run(Job(str(folder), acks=acks)).status == 0
        durations.append(time.monotonic() - start)
        resumes(folder, [], quiet)
    draw = random.Random(0)
    killed = tries = 0
    while killed < 20 and tries < 100:
        tries += 1
        pid = server.start(Job(str(folder), acks=acks))
        time.sleep(draw.uniform(0, min(durations)))
        os.kill(pid, signal.SIGKILL)  # a child that is done is a zombie until `end`
        end = server.end()
        killed += end.status == -signal.SIGKILL
        resumes(folder, end.acks, quiet)
    assert killed == 20


@pytest.mark.parametrize("error", ["ENOSPC", "EIO", "EACCES"])
@pytest.mark.parametrize("op", [*OPERATIONS, "open", "write", "mkdir"])
def test_S1_errors_at_every_operation(
    server: Server, quiet: dict[str, bytes], folder: Path, op: str, error: str
) -> None:
    """One call fails, or it and all later ones: a sentence, no temporary file, and a store that resumes."""
    sentence = {"ENOSPC": "disk is full", "EIO": "input/output error", "EACCES": "permission denied"}[error]
    acks = str(folder.parent.parent / "acks")
    for lasting in ("", "+"):
        for n in range(1, MORE_THAN_ENOUGH):
            end = server.run(Job(str(folder), op, n, error + lasting, acks))
            if end.status:
                assert sentence in end.error.splitlines()[0], end.error
                assert "where: " in end.error
                assert "do: " in end.error
            if op != "unlink" and folder.exists():
                assert list((folder / "tmp").iterdir()) == []
            if op not in ("unlink", "open"):  # removing a folder opens it
                assert not list(folder.parent.glob(".hoanalysis*"))
            units = len(os.listdir(folder / "units")) if folder.exists() else 0
            resumes(folder, end.acks, quiet)
            if end.status == 0 and units == workload.UNITS + 1 and n > POINTS.get(op, 1):
                break
        assert n < MORE_THAN_ENOUGH - 1


@pytest.mark.skipif(
    shutil.which("strace") is None, reason="strace is not installed; the in-process loops cover the same"
)
@pytest.mark.parametrize("op", OPERATIONS)
def test_S2_killed_at_every_system_call(server: Server, quiet: dict[str, bytes], folder: Path, op: str) -> None:
    """The same with the kernel's own calls: what the libraries below us call is counted too."""
    acks = str(folder.parent.parent / "acks")
    for n in range(1, MORE_THAN_ENOUGH):
        pid = server.start(Job(str(folder), acks=acks, stop=True))
        _wait_until_stopped(pid)  # a SIGCONT that comes before its SIGSTOP would be lost, and the child wait for ever
        calls = f"/^{op}(at2?)?$"
        fault = f"inject={calls}:signal=SIGKILL:when={n}"
        tracer = subprocess.Popen(
            ["strace", "-qq", "-o", os.devnull, "-p", str(pid), "-e", f"trace={calls}", "-e", fault],
            stderr=subprocess.PIPE,
        )
        attached = _attached(pid, tracer)
        os.kill(pid, signal.SIGCONT)
        end = server.end()
        _, said = tracer.communicate()
        if not attached:
            pytest.skip(f"strace may not attach here: {said.decode()}")
        resumes(folder, end.acks, quiet)
        if end.status == 0:
            break
        assert end.status == -signal.SIGKILL
    assert n > POINTS[op]


def _wait_until_stopped(pid: int) -> None:
    while "State:\tT" not in Path(f"/proc/{pid}/status").read_text():
        time.sleep(0.001)


def _attached(pid: int, tracer: subprocess.Popen[bytes]) -> bool:
    while tracer.poll() is None:
        status = Path(f"/proc/{pid}/status").read_text()
        if "TracerPid:\t0\n" not in status:
            return True
        time.sleep(0.001)
    return False
