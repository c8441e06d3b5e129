"""Signals to processes that Lightning's launcher started: all of them end, whoever was told, and none is left."""

import pytest
from launched import await_end_of_session, ended, losses, start, start_forked
from tiers import tiered

TERMINATED, KILLED = 143, -9
PATIENCE = 45  # seconds for those who are left: to see that the launcher is gone, and some grace
# forks of a process that has imported everything, or new processes
STARTS = tiered(["forks", "processes"], quick=[], full=["processes"])


@pytest.fixture
def call(request, forking_process):
    """Call a function with what starts the script, the folder and the options, and return its result."""

    def call(function, folder, **options):
        if request.param == "processes":
            if "timeout" in options:  # new processes do not connect at the same time
                options["timeout"] *= 4
            return function(start, folder, options)
        return forking_process.result(function, start_forked, folder, options)

    return call


def run(begin, folder, options):
    """The status of rank 0, once all ranks are gone by themselves."""
    process = begin(folder, **{"kind": "ddp", "steps": 1000, **options})
    try:
        process.wait(120)
        await_end_of_session(process.pid, PATIENCE)
    finally:
        status = ended(process, folder, 1)
    return status


def resumed(begin, folder, options):
    """The status of a run to its end."""
    return ended(begin(folder, **options), folder)


@pytest.mark.parametrize("call", STARTS, indirect=True)
@pytest.mark.parametrize("rank", tiered([0, 1], quick=[], full=[0]))
def test_sigterm_to_one_rank(call, tmp_path, rank):
    assert call(run, tmp_path, at=[rank, 3], signal="SIGTERM") == TERMINATED, (tmp_path / "output.txt").read_text()
    assert losses(tmp_path, 0) == losses(tmp_path, 1)
    assert sorted(losses(tmp_path, 0)) == [0, 1, 2, 3]
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["preemption-step=4.ckpt"]


@pytest.mark.parametrize("call", STARTS, indirect=True)
def test_sigkill_to_the_launcher(call, tmp_path):
    assert call(run, tmp_path, at=[0, 3], signal="SIGKILL") == KILLED
    assert sorted(losses(tmp_path, 0)) == [0, 1, 2, 3]


@pytest.mark.full
def test_sigterm_to_the_launcher_before_the_ranks_are_connected(tmp_path):
    assert run(start, tmp_path, {"at": ["connecting", 0], "timeout": 600}) < 0


@pytest.mark.parametrize("call", STARTS, indirect=True)
def test_a_rank_that_stands_still(call, tmp_path):
    assert call(run, tmp_path, at=[1, 3], signal="SIGSTOP", timeout=5) != 0
    assert sorted(losses(tmp_path, 1)) == [0, 1, 2, 3]


@pytest.mark.full
@pytest.mark.parametrize("call", STARTS, indirect=True)
def test_deepspeed_goes_on_after_sigterm(call, tmp_path):
    kind = "deepspeed_stage_2"
    status = call(run, tmp_path, kind=kind, at=[1, 1], signal="SIGTERM")
    assert status == TERMINATED, (tmp_path / "output.txt").read_text()
    resume = str(tmp_path / "preemption-step=2.ckpt")
    assert call(resumed, tmp_path, kind=kind, steps=3, resume=resume) == 0, (tmp_path / "output.txt").read_text()
    assert sorted(losses(tmp_path, 0)) == [0, 1, 2]
    assert losses(tmp_path, 0) == losses(tmp_path, 1)
