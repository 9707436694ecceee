"""What workers cannot do is said before it costs anything, or by the unit that it concerns, with the host."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from distributed import Client, LocalCluster
from torch import nn

import hoanalysis as ho
from hoanalysis.cluster import clients
from hoanalysis.cluster.clients import checked, opened
from hoanalysis.cluster.parcels import Source
from hoanalysis.errors import ArgumentError, ClusterError
from hoanalysis.reports import Outcome, compute
from hoanalysis.study import StudySpec
from tests.cluster.faults import as_version, with_ttl
from tests.conftest import FACTORIES, write_study

WITHOUT = """
import sys
sys.modules["dask"] = sys.modules["distributed"] = None  # from here on importing them raises ImportError
from hoanalysis.cli import app
app(sys.argv[1:])
"""


def called(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", WITHOUT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_serial_run_needs_no_dask_and_workers_say_how_to_get_it(six: StudySpec, tmp_path: Path) -> None:
    assert called("summarize", six.path, "--out", tmp_path, "-q").returncode == 0
    refused = called("summarize", six.path, "--out", tmp_path, "-q", "--workers", "2")
    assert refused.returncode == 1
    assert "pip install 'hoanalysis[dask]'" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_scheduler_that_does_not_answer(monkeypatch) -> None:
    monkeypatch.setattr(clients, "CONNECT", 1.0)
    with pytest.raises(ClusterError, match="the scheduler does not answer"), opened("tcp://127.0.0.1:1"):
        pass
    with pytest.raises(ArgumentError, match="exclude each other"), opened("tcp://127.0.0.1:1", 2):
        pass


def test_what_is_no_client() -> None:
    with pytest.raises(ArgumentError, match="client= is a str"):
        checked("tcp://127.0.0.1:8786")


def test_a_worker_of_several_threads_and_a_scheduler_without_workers(monkeypatch) -> None:
    local = {"processes": False, "dashboard_address": None}
    with (
        LocalCluster(n_workers=1, threads_per_worker=2, **local) as cluster,
        Client(cluster) as several,
        pytest.raises(ClusterError, match=r"have several Dask threads: .* has 2"),
    ):
        checked(several)
    monkeypatch.setattr(clients, "FIRST_WORKER", 0.1)
    with (
        LocalCluster(n_workers=0, **local) as cluster,
        Client(cluster) as none,
        pytest.raises(ClusterError, match="the scheduler has no workers"),
    ):
        checked(none)


@pytest.mark.row("K4")
def test_workers_of_another_version_are_refused_with_a_table(client: Client) -> None:
    first, second = client.nthreads()
    kept = client.run(as_version, "2.1.0", workers=[first])[first]
    try:
        with pytest.raises(ClusterError, match="other versions") as caught:
            checked(client)
        assert f"{first}: torch 2.1.0 there, {torch.__version__} here" in caught.value.why
        assert second not in caught.value.why
    finally:
        client.run(as_version, kept, workers=[first])
    checked(client)


@pytest.mark.row("K5")
def test_a_worker_that_sees_no_or_another_checkpoint_is_named(
    client: Client, six: StudySpec, tmp_path: Path, monkeypatch
) -> None:
    """``/proc/self/cwd`` is another folder for each process, as a path is that is local to a machine."""
    monkeypatch.chdir(six.folder)
    run = ho.open_run("/proc/self/cwd")[:1]
    homes = client.run(os.getcwd)
    try:
        with pytest.raises(ClusterError, match="does not see the checkpoint") as caught:
            ho.summarize_run(run, six.problem(), 1, client=client, progress=False)
        assert "step_0.safetensors on " in caught.value.where
        (tmp_path / "step_0.safetensors").write_bytes((six.folder / "step_10.safetensors").read_bytes())
        client.run(os.chdir, str(tmp_path))
        with pytest.raises(ClusterError, match="is not the driver's") as caught:
            ho.summarize_run(run, six.problem(), 1, client=client, progress=False)
        assert run.sha256(0)[:12] in caught.value.why
        (tmp_path / "step_0.safetensors").unlink()  # of several it costs its own step alone
        (tmp_path / "step_10.safetensors").write_bytes((six.folder / "step_10.safetensors").read_bytes())
        with pytest.warns(UserWarning, match="step 0 is NaN: a worker does not see"):
            ds = ho.summarize_run(ho.open_run("/proc/self/cwd")[:2], six.problem(), 1, client=client, progress=False)
        assert ds.coverage.values.tolist() == [0, 1]
    finally:
        for address, home in homes.items():
            client.run(os.chdir, home, workers=[address])


def test_data_that_differ_on_a_worker_are_told_from_the_drivers(client: Client, tmp_path: Path, monkeypatch) -> None:
    study = write_study(tmp_path / "other", "factories_of_other_data", steps=1)
    seed = 'torch.Generator().manual_seed(int(__import__("pathlib").Path("/proc/self/cwd/seed").read_text()))'
    (study.parent / "factories_of_other_data.py").write_text(
        FACTORIES.replace("torch.Generator().manual_seed(1)", seed)
    )
    for name, value in (("here", "1"), ("there", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "seed").write_text(value)
    monkeypatch.chdir(tmp_path / "here")
    homes = client.run(os.getcwd)
    spec = StudySpec.read(study)
    outcome = Outcome("other", tmp_path / "out")
    try:
        client.run(os.chdir, str(tmp_path / "there"))
        compute(spec, outcome, progress=False, say=lambda _: None, client=client)
    finally:
        for address, home in homes.items():
            client.run(os.chdir, home, workers=[address])
    assert isinstance(outcome.error, ClusterError)
    assert "the data on a worker differ from the driver's" in outcome.error.what


@pytest.mark.row("K6")
def test_a_module_that_only_the_driver_has(client: Client, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "beside_the_notebook.py").write_text(FACTORIES + "\nclass Net(nn.Linear):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import beside_the_notebook as mine

    model = mine.Net(4, 3)
    torch.save(model.state_dict(), tmp_path / "step_0.pt")
    run = ho.open_run(tmp_path, "*.pt")
    problem = ho.Problem(model, mine.data(), F.cross_entropy)
    with pytest.raises(ClusterError, match="upload_file") as caught:
        ho.summarize_run(run, problem, 2, client=client, progress=False)
    assert "No module named 'beside_the_notebook'" in caught.value.why
    client.upload_file(str(tmp_path / "beside_the_notebook.py"))
    ho.summarize_run(run, problem, 2, client=client, progress=False)


@pytest.mark.row("K6")
def test_classes_of_the_notebook_itself_travel(client: Client, tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3, 4))

        def forward(self, x):
            return torch.tanh(x @ self.w.T)

    torch.manual_seed(0)
    model, batches = Net(), [(torch.randn(5, 4), torch.randint(0, 3, (5,))) for _ in range(3)]
    torch.save(model.state_dict(), tmp_path / "step_0.pt")
    run = ho.open_run(tmp_path, "*.pt")

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    problem = ho.Problem(model, batches, batch_loss=loss, batch_size=lambda batch: len(batch[1]))
    here, there = (ho.summarize_run(run, problem, 2, client=c, progress=False).drop_attrs() for c in (None, client))
    assert there.identical(here)


@pytest.mark.row("K7")
def test_a_scheduler_that_takes_busy_workers_for_dead_is_warned_of(client: Client) -> None:
    before = client.run_on_scheduler(with_ttl, 5.0)
    try:
        with pytest.warns(UserWarning, match="silent for 5 s"):
            checked(client)
    finally:
        client.run_on_scheduler(with_ttl, before)


# ---- what travels -------------------------------------------------------------------------------------------------


def test_weights_do_not_travel_and_one_model_stays_one() -> None:
    model = nn.Sequential(nn.Linear(4, 400), nn.BatchNorm1d(400), nn.Linear(400, 1000))
    model.register_buffer("scale", torch.tensor(2.0), persistent=False)
    batches = [(torch.randn(8, 4), torch.randint(0, 9, (8,))) for _ in range(2)]
    penalized = lambda m, b: F.cross_entropy(m(b[0]), b[1]) + 0 * model[0].weight.sum()  # noqa: E731
    problem = ho.Problem(model, batches, batch_loss=penalized, batch_size=lambda b: 8)
    source = Source.of_problem(problem)
    assert len(source.content) < 20_000 < 4 * sum(p.numel() for p in model.parameters())
    there = source.problem()
    (cell,) = there._batch_loss.__closure__
    assert cell.cell_contents is there.model
    assert all(bool(p.isnan().all()) for p in there.model.parameters())
    assert there.model.scale == 2
    assert there.fingerprint() == problem.fingerprint()
    assert there.splittable is problem.splittable is False
    assert not any(bool(p.isnan().any()) for p in model.parameters())


def test_what_cannot_be_sent_is_named() -> None:
    class Loader(list):
        lock = None

    data = Loader([(torch.randn(8, 4), torch.randint(0, 3, (8,)))])
    data.lock = threading.Lock()
    with pytest.raises(ClusterError, match="cannot be sent") as caught:
        Source.of_problem(ho.Problem(nn.Linear(4, 3), data, F.cross_entropy))
    assert caught.value.where.startswith("its data (")
    assert "lock" in caught.value.why
