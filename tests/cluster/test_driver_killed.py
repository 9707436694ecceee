"""The driver is killed; called again it ends as the serial run does, and computes only what was in flight."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from distributed import Client

from hoanalysis.reports import Outcome, compute
from hoanalysis.study import StudySpec
from tests.cluster.conftest import STEPS, files
from tests.cluster.faults import Slow, plugged

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def expected(six: StudySpec, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("quiet")
    compute(six, Outcome("six", out), progress=False, say=lambda _: None)
    return files(out / "store")


def call(six: StudySpec, out: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "hoanalysis", "summarize", str(six.path), "--out", str(out), "-q", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def kill_after(process: subprocess.Popen, store: Path, units: int) -> int:
    """SIGKILL when so many files of units are there; how many there were then."""
    while len(found := list(store.glob("units/*.unit"))) < units:
        assert process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    return len(found)


@pytest.mark.row("K3")
def test_the_driver_of_a_scheduler_is_killed_and_called_again(
    client: Client, six: StudySpec, expected, tmp_path: Path
) -> None:
    address = client.cluster.scheduler_address
    with plugged(client, Slow(0.3)):
        kill_after(call(six, tmp_path, "--scheduler", address), tmp_path / "store", 4)
        again = call(six, tmp_path, "--scheduler", address)
        output, _ = again.communicate(timeout=200)
    assert again.returncode == 0, output
    computed = re.search(rf"computed (\d) of {STEPS} summaries", output)
    assert computed is not None, output
    assert 1 <= int(computed[1]) <= STEPS - 2  # a direction and a unit are two files
    assert files(tmp_path / "store") == expected


@pytest.mark.row("K3")
def test_the_workers_of_a_killed_driver_end_and_the_serial_call_goes_on(
    six: StudySpec, expected, tmp_path: Path
) -> None:
    process = call(six, tmp_path, "--workers", "2")
    seen: list[psutil.Process] = []
    while not list((tmp_path / "store").glob("units/*.unit")):
        assert process.poll() is None, process.stdout and process.stdout.read()
        seen = psutil.Process(process.pid).children(recursive=True) or seen
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert len(seen) >= 2
    assert not psutil.wait_procs(seen, timeout=60)[1]
    last = call(six, tmp_path)
    output, _ = last.communicate(timeout=200)
    assert last.returncode == 0, output
    assert files(tmp_path / "store") == expected
