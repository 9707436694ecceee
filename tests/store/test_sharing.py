"""Readers and writers at the same time."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import xarray as xr

from hoanalysis.errors import StoreError
from hoanalysis.store import Store
from tests.store import workload
from tests.store.faults import Job, Server, acks_in

UNITS = 60


def test_a_reader_during_writing_sees_whole_units_only(server: Server, folder: Path) -> None:
    """The reader never waits, never errs, sees no half, and misses nothing that was acknowledged before it looked."""
    acks = str(folder.parent.parent / "acks")
    server.start(Job(str(folder), acks=acks, units=UNITS))
    looks, seen = 0, 0
    while seen < UNITS:
        said = acks_in(acks)
        if "plan" not in said:
            continue
        store = Store.open(folder)
        assert store.plan("study") == workload.plan()
        first, last = seen, sum(a.isdigit() for a in said)
        for step in range(first, min(last + 2, UNITS)):
            ds = store.read(workload.key(step))
            if ds is not None:
                xr.testing.assert_identical(ds, workload.unit(step))
            assert ds is not None or step >= last
        assert store.notes == []
        looks, seen = looks + 1, last
    assert server.end().status == 0
    assert looks > 3


@pytest.mark.parametrize("attempt", range(10))
def test_of_many_writers_one_makes_the_store(folder: Path, attempt: int) -> None:
    """Eight threads open a store that is not there; one gets it, the others hear who has it, nothing is left over."""
    start = threading.Barrier(8)

    def open_it(_: int) -> Store | StoreError:
        start.wait()
        try:
            return Store.open(folder, mode="w")
        except StoreError as error:
            return error

    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(open_it, range(8)))
    (store,) = (g for g in got if isinstance(g, Store))
    assert all("another writer holds" in str(g) for g in got if isinstance(g, StoreError))
    store.publish({"a": 1}, workload.unit(0))
    store.close()
    assert sorted(os.listdir(folder.parent)) == ["store"]


def test_threads_of_one_writer(folder: Path) -> None:
    """Results arrive in callbacks of several threads, in any order: the files are the same."""
    with Store.open(folder, mode="w") as store:
        threads = [
            threading.Thread(target=store.publish, args=(workload.key(i % 8), workload.unit(i % 8))) for i in range(16)
        ]
        for thread in reversed(threads):
            thread.start()
        for thread in threads:
            thread.join()
    for i in range(8):
        xr.testing.assert_identical(store.read(workload.key(i)), workload.unit(i))
    assert list((folder / "tmp").iterdir()) == []


def test_results_do_not_depend_on_the_order_of_arrival(folder: Path) -> None:
    other = folder.parent / "other"
    for path, steps in ((folder, (0, 1)), (other, (1, 0))):
        with Store.open(path, mode="w") as store:
            store.register("study", workload.plan())
            store.publish_arrays(workload.DIRECTION, workload.direction())
            for step in steps:
                store.publish(workload.key(step), workload.unit(step))
    assert workload.reduced(folder) == workload.reduced(other)


def test_what_dead_writers_left_goes(server: Server, folder: Path) -> None:
    acks = str(folder.parent.parent / "acks")
    assert server.run(Job(str(folder), "rename", 1, "before", acks)).status == -signal.SIGKILL
    assert len(list(folder.parent.glob(".hoanalysis-new-*"))) == 1
    assert server.run(Job(str(folder), "link", 2, "before", acks)).status == -signal.SIGKILL
    assert list(folder.parent.glob(".hoanalysis-new-*")) == []
    assert len(list((folder / "tmp").iterdir())) == 1
    Store.open(folder)
    assert len(list((folder / "tmp").iterdir())) == 1  # a reader touches nothing
    Store.open(folder, mode="w").close()
    assert list((folder / "tmp").iterdir()) == []


def test_opening_never_waits_for_a_holder(server: Server, folder: Path) -> None:
    acks = str(folder.parent.parent / "acks")
    pid = server.start(Job(str(folder), task="hold", acks=acks))
    while not acks_in(acks):
        time.sleep(0.001)
    os.kill(pid, signal.SIGSTOP)  # a holder that does nothing at all
    start = time.monotonic()
    Store.open(folder).keys()
    with pytest.raises(StoreError):
        Store.open(folder, mode="w")
    assert time.monotonic() - start < 5
    os.kill(pid, signal.SIGKILL)
    server.end()
