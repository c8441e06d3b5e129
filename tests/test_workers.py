"""Worker processes: one that crashes fails its own case alone."""

import os
from contextlib import closing

import pytest
from workers import CrashError, Workers, answer


def work(rank, pipe):
    while (case := pipe.recv()) is not None:
        function, _, arguments = case
        answer(pipe, function, rank, *arguments)


def crash(rank, culprit, once=None):
    if rank == culprit and not (once and once.exists()):
        if once:
            once.touch()
        os.abort()
    return rank


@pytest.fixture(autouse=True)
def crashes(monkeypatch):
    """The crashes of these tests alone."""
    monkeypatch.setattr("workers.CRASHES", result := [])
    return result


def test_a_crash_names_its_rank_and_the_next_case_runs():
    with closing(Workers(2, work)) as workers:
        with pytest.raises(
            CrashError, match=r"(?s)rank 1 of 2 ended with exit code -6:.*Fatal Python error: Aborted.* in crash"
        ):
            workers.attempt(2, crash, 1)
        assert workers.run(2, crash, None) == [0, 1]


def test_the_first_case_that_crashes_runs_again(tmp_path, crashes):
    with closing(Workers(2, work)) as workers:
        assert workers.run(2, crash, 0, tmp_path / "once") == [0, 1]
        with pytest.raises(pytest.fail.Exception, match="rank 1 of 2 ended"):
            workers.run(2, crash, 1, tmp_path / "twice")
    assert len(crashes) == 2
