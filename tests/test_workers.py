"""Worker processes: one that crashes fails its own case alone."""

import os
from contextlib import closing

import pytest
from workers import Workers, answer


def work(rank, pipe):
    while (case := pipe.recv()) is not None:
        function, _, arguments = case
        answer(pipe, function, rank, *arguments)


def crash(rank, culprit):
    if rank == culprit:
        os.abort()
    return rank


def test_a_crash_names_its_rank_and_the_next_case_runs(capfd):
    with closing(Workers(2, work)) as workers:
        with pytest.raises(pytest.fail.Exception, match="rank 1 of 2 ended with exit code -6"):
            workers.run(2, crash, 1)
        assert workers.run(2, crash, None) == [0, 1]
    assert "Fatal Python error: Aborted" in capfd.readouterr().err
