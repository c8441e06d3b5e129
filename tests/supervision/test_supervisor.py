"""The supervisor of ranks that keep records and do nothing else: no torch, so that each case takes a second or two."""

import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiers import tiered

from lightning_longnet.cli import main as longnet
from lightning_longnet.supervise import main
from lightning_longnet.supervision.arguments import split, supervise
from lightning_longnet.supervision.processes import Guard
from lightning_longnet.supervision.record import FORWARD, OUTSIDE, SAVE, Record, read
from lightning_longnet.supervision.watch import Limits, Watch

ROOT = Path(__file__).parents[2]
RANKS = Path(__file__).parent / "ranks.py"
SUPERVISE = (sys.executable, "-m", "lightning_longnet.supervise")
PATIENCE = 30


def start(folder, fault, rank, *options, steps=6, ignored=None):
    names = ("SLURM", "TORCHELASTIC", "LIGHTNING_LONGNET", "LOCAL_RANK")
    environment = {name: text for name, text in os.environ.items() if not name.startswith(names)}
    command = [*SUPERVISE, "--stall", "1", *options, "--", sys.executable, str(RANKS), folder, "2", fault, rank, steps]
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)},
        preexec_fn=None if ignored is None else lambda: signal.signal(ignored, signal.SIG_IGN),
    )  # fmt: skip


def ended(process, folder):
    """(exit status, lines of the supervisor), when none of its ranks is left."""
    try:
        _, text = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert not left(folder)
    return process.returncode, [line for line in text.splitlines() if line.startswith("supervise: ")]


def left(folder):
    pids = [int(path.read_text()) for path in folder.glob("pid-*")]
    return [pid for pid in pids if state(pid) not in ("", "Z")]


def state(pid):
    path = Path(f"/proc/{pid}/stat")
    try:
        return path.read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def attempts(folder):
    return (folder / "attempts").read_text().split()


FAULTS = [
    ("exception", 1, "rank 1 failed in forward of step 2: OSError: the disk is gone"),
    ("SIGKILL", 1, "rank 1 was ended by SIGKILL in forward of step 2"),
    ("SIGKILL", 0, "rank 0 was ended by SIGKILL in forward of step 2"),
    ("exit 0", 1, "rank 1 ended with exit status 0 in forward of step 2"),
    ("exit 0", 0, "rank 0 ended with exit status 0 in forward of step 2"),
    ("SIGSTOP", 0, "rank 0 was stopped by a signal (state T) in forward of step 2"),
    ("GIL held", 0, "rank 0 made no progress for"),
]


@pytest.mark.parametrize(("fault", "rank", "said"), tiered(FAULTS, FAULTS[:1], long=FAULTS[3::3]))
def test_a_fault_ends_all_ranks_and_is_named_in_the_last_line(tmp_path, fault, rank, said):
    begin = time.monotonic()
    status, lines = ended(start(tmp_path, fault, rank, "--restarts", "0"), tmp_path)
    assert status != 0
    assert said in lines[-1], lines
    assert time.monotonic() - begin < 10
    assert attempts(tmp_path) == ["first"]


@pytest.mark.parametrize("fault", tiered(["SIGKILL", "endless loop"], ["SIGKILL"], long=[]))
def test_a_restart_goes_on_and_ends_well(tmp_path, fault):
    status, lines = ended(start(tmp_path, fault, 1, "--restarts", "3"), tmp_path)
    assert status == 0, lines
    assert attempts(tmp_path) == ["first", "again"]
    assert "restart 1 of 3" in lines[-1]
    assert "rank 1" in lines[-1]


@pytest.mark.long
def test_it_gives_up_after_restarts_without_a_new_step(tmp_path):
    status, lines = ended(start(tmp_path, "at once", 0, "--restarts", "1"), tmp_path)
    assert status == 1
    assert attempts(tmp_path) == ["first", "again"]
    assert lines[-1].startswith("supervise: gave up after 1 restarts without a new step: rank 0 failed")


@pytest.mark.long
def test_the_stack_of_a_rank_that_loops_is_printed_but_none_of_one_that_is_stopped(tmp_path):
    process = start(tmp_path, "endless loop", 1, "--restarts", "0")
    _, text = process.communicate(timeout=PATIENCE)
    assert "in fail" in text.partition("supervise: rank 1 in forward of step 2:\n")[2].splitlines()[1]
    for path in tmp_path.iterdir():
        path.unlink()
    process = start(tmp_path, "SIGSTOP", 1, "--restarts", "0")
    _, text = process.communicate(timeout=PATIENCE)
    assert "rank 1 in forward of step 2 prints no stack" in text


@pytest.mark.long
def test_a_save_may_take_longer_than_a_step(tmp_path):
    status, lines = ended(start(tmp_path, "slow save", 1, "--restarts", "0"), tmp_path)
    assert (status, lines) == (0, [])


def test_ranks_end_where_their_supervisor_is_killed(tmp_path):
    process = start(tmp_path, "GIL held", 1, "--stall", "60")
    try:
        await_(lambda: (tmp_path / "failed").exists())
        time.sleep(0.3)
        assert len(left(tmp_path)) == 2
    finally:
        process.kill()
    await_(lambda: not left(tmp_path))
    process.communicate(timeout=PATIENCE)


def test_sigterm_is_forwarded_and_no_attempt_follows(tmp_path):
    process = start(tmp_path, "none", -1, "--stall", "60", steps=10_000)
    await_(lambda: (tmp_path / "pid-1").exists())
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    status, lines = ended(process, tmp_path)
    assert status == 128 + signal.SIGTERM
    assert "ended after SIGTERM" in lines[-1]
    assert attempts(tmp_path) == ["first"]


@pytest.mark.long
def test_a_signal_that_was_ignored_stays_so(tmp_path):
    process = start(tmp_path, "none", -1, steps=30, ignored=signal.SIGHUP)
    await_(lambda: (tmp_path / "pid-1").exists())
    process.send_signal(signal.SIGHUP)
    status, lines = ended(process, tmp_path)
    assert (status, lines) == (0, [])


def test_the_guard_ignores_what_the_supervisor_forwards(tmp_path):
    guard = Guard(tmp_path)
    try:
        signals = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
        await_(lambda: all(ignored_by(guard.pid) >> (each - 1) & 1 for each in signals), 2)
    finally:
        guard.dismiss()


def ignored_by(pid):
    """The mask of the signals that a process ignores."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("SigIgn:")[2].split()[0], 16)


def await_(condition, patience=PATIENCE):
    limit = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.05)


# Parts


def entry(tmp_path, phase, *, steps=1, seconds=0.0):
    record = Record(tmp_path, 0, 1)
    for _ in range(steps):
        record.add_step(seconds)
    record.mark(phase, steps)
    return read(tmp_path)[0]


def test_limits_of_phases(tmp_path):
    limits = Limits(allowances={"save": 7.0})
    assert limits.of(entry(tmp_path, FORWARD, seconds=0.1)) == 60
    assert limits.of(entry(tmp_path, FORWARD, seconds=20.0)) == 200
    assert Limits(stall=5.0).of(entry(tmp_path, FORWARD, seconds=20.0)) == 5
    assert limits.of(entry(tmp_path, FORWARD, steps=0)) == 1800  # which may compile
    assert limits.of(entry(tmp_path, SAVE)) == 7
    assert limits.of(entry(tmp_path, OUTSIDE)) == float("inf")


def test_a_group_stalls_only_when_all_its_ranks_do(tmp_path):
    first, second = Record(tmp_path, 0, 2), Record(tmp_path, 1, 2)
    for each, phase in ((first, FORWARD), (second, SAVE)):
        each.add_step(0.1)
        each.mark(phase, 1)
    watch = Watch(Limits(stall=0.05, allowances={"save": 0.3}), time.monotonic())
    time.sleep(0.1)
    assert not watch.faults(read(tmp_path))
    time.sleep(0.3)
    assert [each.rank for each in watch.faults(read(tmp_path))] == [0, 1]
    watch.resume(time.monotonic())  # as after the whole job was suspended
    assert not watch.faults(read(tmp_path))


def test_a_rank_that_is_stopped_is_the_one_that_is_named_however_long_the_others_wait(tmp_path):
    with subprocess.Popen(["sleep", "60"]) as stopped, subprocess.Popen(["sleep", "60"]) as waiting:
        for rank, process in enumerate((waiting, stopped)):
            (tmp_path / f"rank-{rank}").write_bytes(recorded(tmp_path, rank, process.pid))
        stopped.send_signal(signal.SIGSTOP)
        await_(lambda: state(stopped.pid) == "T")
        watch = Watch(Limits(stall=0.2), time.monotonic())
        time.sleep(0.3)  # both have made no progress for longer than is allowed
        result = {fault.rank: fault.text for fault in watch.faults(read(tmp_path))}
        stopped.kill()
        waiting.kill()
    assert "rank 1 was stopped by a signal (state T) in forward of step 1" in result[1]
    assert "rank 0 made no progress" in result[0]


def recorded(folder, rank, pid):
    """The record of another process."""
    part = folder / "part"
    part.mkdir(exist_ok=True)
    record = Record(part, rank, 2)
    record.add_step(0.1)
    record.mark(FORWARD, 1)
    content = bytearray((part / f"rank-{rank}").read_bytes())
    struct.pack_into("<i", content, 16, pid)
    return bytes(content)


def test_options_among_those_of_fit():
    options, rest = split(["fit", "--config", "a.yaml", "--restarts", "3", "--stall=5", "--allow", "save=9"])
    assert rest == ["fit", "--config", "a.yaml"]
    assert options == (3, Limits(5.0, {"save": 9.0}))
    with pytest.raises(ValueError, match="need --restarts"):
        split(["fit", "--stall", "5"])
    with pytest.raises(ValueError, match="whole number"):
        split(["fit", "--restarts", "-1"])


def test_fit_refuses_wrong_options_of_a_supervisor_in_one_line(capsys):
    for words, said in ((["--restarts", "many"], "whole number"), (["--restarts=2", "--allow", "lunch=5"], "one of")):
        assert longnet(["fit", *words]) == 2
        shown = capsys.readouterr().err
        assert shown.startswith("longnet: error: argument --")
        assert said in shown
        assert shown.count("\n") == 1


@pytest.mark.parametrize("words", [["--stall", "5", "--"], ["--"], ["--restarts=3"], []])
def test_a_command_may_follow_without_a_mark(monkeypatch, words):
    result = []
    monkeypatch.setattr("lightning_longnet.supervise.supervise", lambda command, options: result.append(command) or 0)
    assert main([*words, "python", "train.py", "--restarts", "7", "--", "x"]) == 0
    assert result == [["python", "train.py", "--restarts", "7", "--", "x"]]


def test_torchrun_is_not_to_be_supervised_from_outside():
    options, _ = split(["fit", "--restarts", "3"])
    for command in (["torchrun", "train.py"], ["python", "-m", "torch.distributed.run", "train.py"]):
        with pytest.raises(ValueError, match="inside of it"):
            supervise(command, options)
    with pytest.raises(ValueError, match="needs a command"):
        supervise([], options)
