"""One process that forks calls of the command line, for all tests of a worker."""

from collections.abc import Iterator

import pytest

from tests.reports.forks import Forks


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    made = Forks()
    yield made
    made.close()
