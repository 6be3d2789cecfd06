import pytest

from tests.distributed.processes import Processes


@pytest.fixture(scope="session")
def two():
    processes = Processes(2)
    yield processes
    processes.close()


@pytest.fixture(scope="session")
def four():
    processes = Processes(4)
    yield processes
    processes.close()
