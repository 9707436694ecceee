import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.store import workload
from tests.store.faults import Server


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="session")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("quiet") / "store"
    workload.run(folder)
    return workload.snapshot(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where a store may be made; nothing is there.

    In memory where that is possible: a killed process loses nothing that it wrote, so thousands of real fsyncs would
    test only the patience of the disk. What fsync is for is tested in `test_power_loss`.
    """
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(dir=memory) as place:
        (Path(place) / "place").mkdir()
        yield Path(place) / "place" / "store"
