"""One cluster of two worker processes for the tests of this folder, and a study with its serial store."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import hoanalysis as ho
from hoanalysis.study import StudySpec
from tests.conftest import write_study

pytest.importorskip("distributed")
from distributed import Client

from hoanalysis.cluster.clients import opened

STEPS = 6


@pytest.fixture(scope="session")
def client() -> Iterator[Client]:
    """What ``--workers 2`` computes with."""
    with warnings.catch_warnings(), opened(workers=2, threads=1, say=lambda _: None) as client:
        assert client is not None
        yield client


@pytest.fixture(autouse=True)
def _all_workers(request: pytest.FixtureRequest) -> None:
    if "client" in request.fixturenames:
        request.getfixturevalue("client").wait_for_workers(2, timeout=60)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def six(tmp_path_factory: pytest.TempPathFactory) -> StudySpec:
    folder = tmp_path_factory.mktemp("cluster") / "six"
    return StudySpec.read(write_study(folder, "factories_of_six", steps=STEPS))


def files(store: Path) -> dict[str, bytes]:
    """Every file of a store and its bytes."""
    return {str(p.relative_to(store)): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file()}


@pytest.fixture(scope="session")
def serial(six: StudySpec, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run that knows no cluster."""
    store = tmp_path_factory.mktemp("serial") / "store"
    ho.summarize_run(six.run(), six.problem(), 2, keep_batches=2, store=store, progress=False)
    return files(store)
