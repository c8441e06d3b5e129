import pytest


@pytest.fixture(scope="session")
def trainers():
    from trainers import Trainers

    found = Trainers(4)
    yield found
    found.close()
