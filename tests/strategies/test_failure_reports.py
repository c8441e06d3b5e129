"""What ranks report of a failure: all read the first one, and rank 0 waits for them no longer than it must."""

import threading
import time
from contextlib import contextmanager

import pytest
import torch.distributed as dist

from lightning_longnet.strategies import reports
from lightning_longnet.strategies.reports import PATIENCE, FailureReports


@pytest.fixture(autouse=True)
def store(monkeypatch):
    made = dist.HashStore()
    monkeypatch.setattr(reports, "_get_default_store", lambda: made)
    return made


@contextmanager
def connected(run, ranks, ends=()):
    """The reports of all ranks of a run; the threads of those in `ends` have ended before."""
    made = [FailureReports(run, rank, ranks) for rank in range(ranks)]
    try:
        for rank in ends:
            made[rank].end()
        yield made
    finally:
        for each in made:
            each.end()


def seconds(function):
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def test_rank_0_waits_until_the_others_have_read_its_failure():
    with connected(1, 4) as ranks:
        assert ranks[0].report("rank 0: the disk is gone") == "rank 0: the disk is gone"
        assert seconds(ranks[0].await_readers) < PATIENCE
        assert [each.text for each in ranks] == ["rank 0: the disk is gone"] * 4


def test_the_first_report_stands_and_each_rank_reads_it_once(store):
    with connected(1, 3, ends=[1, 2]) as ranks:
        assert [each.report(f"rank {rank}") for rank, each in enumerate(ranks)] == ["rank 0"] * 3
        assert [each.read() for each in ranks] == ["rank 0"] * 3
        assert store.add("lightning_longnet/failure/1/readers", 0) == 3
        assert seconds(ranks[0].await_readers) < 1


@pytest.mark.long
def test_a_rank_that_does_not_read_delays_rank_0_for_a_bounded_time():
    with connected(1, 3, ends=[2]) as ranks:
        ranks[0].report("rank 0")
        assert PATIENCE <= seconds(ranks[0].await_readers) < PATIENCE + 2
        assert [each.text for each in ranks] == ["rank 0", "rank 0", ""]


def test_another_run_has_its_own_failures():
    with connected(1, 2) as first, connected(2, 2) as second:
        first[1].report("rank 1")
        assert (first[0].read(), second[0].read(), second[1].read()) == ("rank 1", "", "")


def test_a_run_without_a_failure_ends_at_once():
    with connected(1, 8) as ranks:
        assert sum(seconds(each.end) for each in ranks) < 1
        assert [each.text for each in ranks] == [""] * 8
        assert not any(each._thread.is_alive() for each in ranks)


def test_a_program_may_destroy_its_groups_while_reports_are_read(monkeypatch):
    """After a run that could not be torn down, the thread still reads, and no error of it is printed."""
    monkeypatch.undo()
    raised = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        first, second = FailureReports(1, 0, 2), FailureReports(1, 1, 2)
    finally:
        dist.destroy_process_group()
    time.sleep(1.5 * reports._PERIOD)
    assert second._thread.is_alive()
    first.report("rank 0")
    assert seconds(first.await_readers) < PATIENCE
    second.end()
    assert (second.text, raised) == ("rank 0", [])


def test_the_thread_ends_before_the_interpreter_shuts_down(monkeypatch):
    """A thread in the store at that time aborts the process, and nothing else ends it where a teardown was skipped."""
    registered = []
    monkeypatch.setattr(reports.atexit, "register", registered.append)
    monkeypatch.setattr(reports.atexit, "unregister", registered.remove)
    first, second = FailureReports(1, 1, 2), FailureReports(2, 1, 2)
    assert len(registered) == 2
    first.end()
    assert len(registered) == 1
    registered[0]()
    assert registered == []
    assert not second._thread.is_alive()
