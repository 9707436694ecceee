"""Units over the workers of a real cluster: the bits of the serial run, whatever dies meanwhile."""

import json
from pathlib import Path

import pytest
import torch
import xarray as xr
from distributed import Client

import hoanalysis as ho
from hoanalysis.cluster import driver
from hoanalysis.cluster.driver import ClusterWarning
from hoanalysis.errors import ClusterError
from hoanalysis.store import Store
from hoanalysis.store.container import digest_of
from hoanalysis.study import StudySpec
from hoanalysis.summaries import Settings, Work
from tests.cluster.conftest import STEPS, files
from tests.cluster.faults import Kill, deaths, plugged

SETTINGS = {
    "gradient": {"order": 3, "keep_batches": 2, "diagonal": 3},
    "unconditional": {"order": 2, "keep_batches": 2, "errors": "unconditional"},
    "weights": {"order": 2, "direction": "weights", "measure": ("along", "removed"), "dtype": "float64"},
    "random": {"order": 2, "direction": "random", "seed": 3, "partition": "layer", "engine": "nested"},
    "to:next": {"order": 1, "direction": "to:next", "measure": ("path",)},
    "tolerance": {"order": 1, "tolerance": 0.5, "memory": "20KB"},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_store_is_that_of_the_serial_run_byte_for_byte(
    client: Client, six: StudySpec, tmp_path: Path, setting
) -> None:
    stores = tmp_path / "serial", tmp_path / "workers"
    here = ho.summarize_run(six.run(), six.problem(), store=stores[0], progress=False, **SETTINGS[setting])
    there = ho.summarize_run(
        six.run(), six.problem(), store=stores[1], progress=False, client=client, **SETTINGS[setting]
    )
    assert files(stores[1]) == files(stores[0])
    for ds in (here, there):
        del ds.attrs["created_at"]
    xr.testing.assert_identical(there, here)


def test_without_a_store_the_dataset_is_the_same(client: Client, six: StudySpec) -> None:
    here, there = (
        ho.summarize_run(six.run(), six.problem(), 2, client=c, progress=False).drop_attrs() for c in (None, client)
    )
    xr.testing.assert_identical(there, here)


def test_workers_take_the_torch_threads_of_the_driver(client: Client, six: StudySpec, tmp_path: Path) -> None:
    torch.set_num_threads(2)
    stores = tmp_path / "serial", tmp_path / "workers"
    for store, c in zip(stores, (None, client), strict=True):
        ds = ho.summarize_run(six.run()[:1], six.problem(), 1, store=store, client=c, progress=False)
        assert ds.attrs["torch_threads"] == 2
    assert files(stores[1]) == files(stores[0])
    units = [Store.open(stores[1]).read(k) for k in _keys(stores[1])]
    assert {json.loads(u.attrs["unit"])["torch_threads"] for u in units if u is not None} == {2}


def _keys(store: Path) -> list[dict]:
    plan = Store.open(store).plan()
    assert plan is not None
    return [key for step in plan["steps"] for key in step["units"]]


_made = driver._Flight._made


def test_a_direction_is_computed_once_and_used_by_the_others(
    client: Client, six: StudySpec, tmp_path: Path, monkeypatch
) -> None:
    def call(partition: str, store: Path, c: Client | None) -> xr.Dataset:
        options = {"partition": partition, "store": store, "progress": False}
        return ho.summarize_run(six.run(), six.problem(), 2, client=c, **options).drop_attrs()

    call("canonical", tmp_path / "store", client)
    before = files(tmp_path / "store")
    directions: list[dict | None] = []

    def made(flight, item, future):
        directions.append(future.result().direction)
        return _made(flight, item, future)

    monkeypatch.setattr(driver._Flight, "_made", made)
    layers = call("layer", tmp_path / "store", client)
    assert directions == [None] * STEPS
    after = files(tmp_path / "store")
    assert sum(name.startswith("units/") for name in after.keys() - before.keys()) == STEPS
    monkeypatch.undo()
    xr.testing.assert_identical(layers, call("layer", tmp_path / "serial", None))


@pytest.mark.parametrize("workers", [False, True])
def test_a_direction_that_is_remembered_is_stored_as_well(
    client: Client, six: StudySpec, tmp_path: Path, workers
) -> None:
    """A process that has just computed it, for another store or for a driver that was killed meanwhile."""
    problem, stores = six.problem(), (tmp_path / "first", tmp_path / "second")
    for store in stores:
        c = client if workers else None
        ho.summarize_run(six.run()[:1], problem, 1, store=store, client=c, progress=False)
    assert len(list(stores[0].glob("units/*"))) == 2
    assert files(stores[1]) == files(stores[0])


# ---- what dies ----------------------------------------------------------------------------------------------------


@pytest.mark.row("K1", "K8")
@pytest.mark.parametrize("when", ["at work", "done"])
def test_a_worker_that_is_killed_costs_what_it_had_in_hand(
    client: Client, six: StudySpec, serial, tmp_path: Path, when: str
) -> None:
    """Mid-unit, and with a unit in hand that was done: it is computed twice and stored once."""
    kill = Kill(six.run().sha256(2), tmp_path, when=when)
    with plugged(client, kill), pytest.warns(ClusterWarning, match="^1 workers were lost"):
        ho.summarize_run(
            six.run(), six.problem(), 2, keep_batches=2, store=tmp_path / "store", client=client, progress=False
        )
    assert deaths(tmp_path) == 1
    assert files(tmp_path / "store") == serial


@pytest.mark.row("K2")
def test_a_unit_that_kills_every_worker_is_named_and_the_others_are_complete(
    client: Client, six: StudySpec, serial, tmp_path: Path
) -> None:
    run, store = six.run(), tmp_path / "store"
    options = {"keep_batches": 2, "store": store, "progress": False}
    with (
        plugged(client, Kill(run.sha256(3), tmp_path, times=99)),
        pytest.warns(ClusterWarning, match="workers were lost"),
        pytest.raises(ClusterError, match="kills the workers") as caught,
    ):
        ho.summarize_run(run, six.problem(), 2, client=client, **options)
    assert deaths(tmp_path) == 6  # three beside others, three alone
    assert "step 30" in caught.value.where
    assert run.paths[3].name in caught.value.where
    sha256 = run.sha256(3)
    poison = [_name(_keys(store)[3]), _name(Work(six.problem(), Settings(keep_batches=2)).direction_key(sha256))]
    assert files(store) == {name: data for name, data in serial.items() if name not in poison}
    ds = ho.open_store(store)
    assert ds.coverage.values.tolist() == [1, 1, 1, 0, 1, 1]
    # once it kills no more, only it is computed
    ho.summarize_run(run, six.problem(), 2, client=client, **options)
    assert files(store) == serial


def _name(key: dict) -> str:
    return f"units/{digest_of(key)}.unit"


@pytest.mark.row("K2")
def test_a_suspect_that_was_only_beside_is_computed_alone(
    client: Client, six: StudySpec, serial, tmp_path: Path
) -> None:
    """Three deaths, as of a machine that goes down again and again; then it computes."""
    with (
        plugged(client, Kill(six.run().sha256(0), tmp_path, times=3)),
        pytest.warns(ClusterWarning, match="workers were lost"),
    ):
        ho.summarize_run(
            six.run(), six.problem(), 2, keep_batches=2, store=tmp_path / "store", client=client, progress=False
        )
    assert deaths(tmp_path) == 3
    assert files(tmp_path / "store") == serial
