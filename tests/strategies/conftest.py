from contextlib import ExitStack, closing
from functools import cache

import pytest


@pytest.fixture(scope="session")
def deepspeed_trainers(checks_splits):
    """Trainers with DeepSpeed, of a number of processes."""
    from trainers import Trainers

    with ExitStack() as stack:
        yield cache(
            lambda ranks: stack.enter_context(
                closing(Trainers(ranks, stays_connected=True, checks_splits=checks_splits))
            )
        )
