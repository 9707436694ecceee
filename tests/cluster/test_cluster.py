"""Units over the workers of a real cluster: the bits of the serial run, whatever dies meanwhile."""

import json
from pathlib import Path

import pytest
import torch
import xarray as xr
from distributed import Client

import hoanalysis as ho
from hoanalysis.cluster import jobs
from hoanalysis.cluster.driver import ClusterWarning
from hoanalysis.errors import CheckpointError, ClusterError, DataError
from hoanalysis.reports import Outcome, compute
from hoanalysis.store import Store
from hoanalysis.store.container import digest_of
from hoanalysis.study import StudySpec
from hoanalysis.summaries import Settings, Work
from tests.cluster.conftest import STEPS, files
from tests.cluster.faults import Curved, Kill, Together, deaths, plugged

SETTINGS = {
    "gradient": {"order": 3, "keep_batches": 2, "diagonal": 3},
    "unconditional": {"order": 2, "keep_batches": 2, "errors": "unconditional"},
    "weights": {"order": 2, "direction": "weights", "measure": ("along", "removed"), "dtype": "float64"},
    "random": {"order": 2, "direction": "random", "seed": 3, "partition": "layer", "engine": "nested"},
    "to:next": {"order": 1, "direction": "to:next", "measure": ("path",)},
    "tolerance": {"order": 1, "tolerance": 0.5, "memory": "20KB"},
    "shards": {"order": 2, "shards": 3, "keep_batches": 4, "dtype": "float64"},
    "shards of weights": {"order": 2, "shards": 2, "direction": "weights", "max_batches": 3},
    "shards of to:next": {"order": 1, "shards": 2, "direction": "to:next"},
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


def test_a_direction_is_computed_once_and_used_by_the_others(
    client: Client, six: StudySpec, tmp_path: Path, monkeypatch
) -> None:
    def call(partition: str, store: Path, c: Client | None) -> xr.Dataset:
        options = {"partition": partition, "store": store, "progress": False}
        return ho.summarize_run(six.run(), six.problem(), 2, client=c, **options).drop_attrs()

    call("canonical", tmp_path / "store", client)
    before = files(tmp_path / "store")
    directions: list[dict | None] = []
    publish = jobs.Units.publish

    def published(units, item, direction):
        directions.append(direction)
        publish(units, item, direction)

    monkeypatch.setattr(jobs.Units, "publish", published)
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


# ---- fewer checkpoints than workers -------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [False, True])
def test_workers_share_the_data_of_one_checkpoint(
    client: Client, six: StudySpec, tmp_path: Path, monkeypatch, stored
) -> None:
    """Parts of the gradient, and units, each time two at once: they wait for each other. Also where a direction is
    large and comes out of the store of an earlier call, so that it is a result of its own."""
    run, options = six.run()[2:3], {"keep_batches": 4, "shards": 2, "progress": False}
    monkeypatch.setattr(jobs, "SMALL", 1)
    here, store = (tmp_path / name for name in ("serial", "workers"))
    expected = ho.summarize_run(run, six.problem(), 2, store=here, **options).drop_attrs()
    ho.summarize_run(run, six.problem(), 1, store=here, **options)
    with plugged(client, Together(tmp_path)):
        if stored:
            ho.summarize_run(run, six.problem(), 1, store=store, client=client, **options)
        ds = ho.summarize_run(run, six.problem(), 2, store=store, client=client, **options)
        if not stored:
            ho.summarize_run(run, six.problem(), 1, store=store, client=client, **options)
    assert {p.name[:4] for p in tmp_path.glob("*.met")} == {"part", "unit"}
    assert not list(tmp_path.glob("*.alone"))
    xr.testing.assert_identical(ds.drop_attrs(), expected)
    assert units_of(store) == units_of(here)


def units_of(store: Path) -> dict[str, bytes]:
    return {name: data for name, data in files(store).items() if name.startswith("units/")}


def test_a_checkpoint_without_a_gradient_and_a_batch_that_fails_are_told_as_by_the_serial_run(
    client: Client, tmp_path: Path
) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(2))

    for step in range(3):
        torch.save({"w": torch.full((2,), float(step))}, tmp_path / f"step_{step}.pt")
    run = ho.open_run(tmp_path, "*.pt")

    def problem(labels: list[int]) -> ho.Problem:
        def loss(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
            classes = torch.zeros(1, 4) + 0 * model.w.sum()
            return ((model.w - 1) ** 2).sum() + 0 * torch.nn.functional.cross_entropy(classes, batch)

        return ho.Problem(Net(), [torch.tensor([k]) for k in labels], batch_loss=loss, batch_size=lambda b: 1)

    fine, stores = problem([0, 1, 2, 3]), (tmp_path / "serial", tmp_path / "workers")
    both = [
        ho.summarize_run(run, fine, 2, shards=2, store=s, client=c, progress=False).drop_attrs()
        for s, c in zip(stores, (None, client), strict=True)
    ]
    xr.testing.assert_identical(both[1], both[0])
    assert "zero everywhere" in both[1].gap.values[1]
    assert files(stores[1]) == files(stores[0])
    told = []
    for c in (None, client):
        with pytest.raises(DataError, match="out of bounds") as caught:
            ho.summarize_run(run[:1], problem([0, 1, 2, 9]), 2, shards=2, client=c, store=tmp_path / str(c is None))
        told.append(str(caught.value))
    assert "batch 3" in told[0]
    assert told[1] == told[0]


def test_the_curvature_of_a_study_is_computed_by_workers(client: Client, six: StudySpec, tmp_path: Path) -> None:
    (tmp_path / "curved").mkdir()
    for path in six.folder.iterdir():
        if path.is_file():
            (tmp_path / "curved" / path.name).write_bytes(path.read_bytes())
    study = tmp_path / "curved" / "study.toml"
    study.write_text(study.read_text() + "\n[summaries.curvature]\nprobes = 3\n")
    (tmp_path / "curved" / "step_0.safetensors").write_bytes(b"\0" * 40)  # costs its own step
    found = []
    for name, c in (("serial", None), ("workers", client)):
        outcome = Outcome(name, tmp_path / name)
        with plugged(client, Curved(tmp_path)):
            datasets = compute(StudySpec.read(study), outcome, progress=False, say=lambda _: None, client=c)
        assert isinstance(outcome.error, CheckpointError)
        found.append(datasets[tmp_path / name / "summaries.nc"].drop_attrs())
    assert len(list(tmp_path.glob("*.curvature"))) == STEPS - 1
    xr.testing.assert_identical(found[1], found[0])
    assert int(found[0].hessian_largest.notnull().sum()) == STEPS - 1
    assert units_of(tmp_path / "workers" / "store") == units_of(tmp_path / "serial" / "store")


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


@pytest.mark.row("K1")
@pytest.mark.parametrize("when", ["in a part", "done"])
def test_a_worker_that_is_killed_in_a_shard_costs_that_shard(
    client: Client, six: StudySpec, tmp_path: Path, when: str
) -> None:
    options = {"keep_batches": 4, "shards": 2, "progress": False}
    ho.summarize_run(six.run(), six.problem(), 2, store=tmp_path / "serial", **options)
    kill = Kill(six.run().sha256(2), tmp_path, when=when)
    with plugged(client, kill), pytest.warns(ClusterWarning, match="^1 workers were lost"):
        ho.summarize_run(six.run(), six.problem(), 2, store=tmp_path / "store", client=client, **options)
    assert deaths(tmp_path) == 1
    assert files(tmp_path / "store") == files(tmp_path / "serial")


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
