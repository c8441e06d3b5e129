"""Signals to processes that Lightning's launcher started: all of them end, whoever was told, and none is left."""

import pytest
from launched import await_end_of_session, ended, losses, start
from tiers import tiered

TERMINATED, KILLED = 143, -9
PATIENCE = 45  # seconds for those who are left: to see that the launcher is gone, and some grace


def run(folder, kind="ddp", **told):
    """The status of rank 0, once all ranks are gone by themselves."""
    process = start(folder, kind=kind, steps=1000, **told)
    try:
        process.wait(120)
        await_end_of_session(process.pid, PATIENCE)
    finally:
        status = ended(process, folder, 1)
    return status


@pytest.mark.parametrize("rank", tiered([0, 1], quick=[], full=[0]))
def test_sigterm_to_one_rank(tmp_path, rank):
    assert run(tmp_path, at=[rank, 3], signal="SIGTERM") == TERMINATED, (tmp_path / "output.txt").read_text()
    assert losses(tmp_path, 0) == losses(tmp_path, 1)
    assert sorted(losses(tmp_path, 0)) == [0, 1, 2, 3]
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["preemption-step=4.ckpt"]


@pytest.mark.long
def test_sigkill_to_the_launcher(tmp_path):
    assert run(tmp_path, at=[0, 3], signal="SIGKILL") == KILLED


@pytest.mark.long
def test_sigterm_to_the_launcher_before_the_ranks_are_connected(tmp_path):
    assert run(tmp_path, at=["connecting", 0], timeout=600) < 0


@pytest.mark.long
def test_a_rank_that_stands_still(tmp_path):
    assert run(tmp_path, at=[1, 3], signal="SIGSTOP", timeout=5) != 0


@pytest.mark.long
def test_deepspeed_goes_on_after_sigterm(tmp_path):
    kind = "deepspeed_stage_2"
    assert run(tmp_path, kind, at=[1, 1], signal="SIGTERM") == TERMINATED, (tmp_path / "output.txt").read_text()
    resume = str(tmp_path / "preemption-step=2.ckpt")
    assert ended(start(tmp_path, kind=kind, steps=3, resume=resume), tmp_path) == 0
    assert sorted(losses(tmp_path, 0)) == [0, 1, 2]
    assert losses(tmp_path, 0) == losses(tmp_path, 1)
