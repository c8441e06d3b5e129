"""SIGKILLs of a run that its supervisor starts again, beside the same run that nobody disturbed."""

import json
import os
import signal
import time

import killed_run
import torch
from faults_of_ranks import LIMITS
from forks import children, left, supervised
from killed_run import EVERY, RANKS
from supervised import environment

from lightning_longnet.supervision.processes import GONE, ZOMBIE, state_of

# (engine, whether saves are in the background, number of runs)
MODES = (
    *(("ddp", False, 2), ("ddp", True, 3), ("fsdp2", False, 3), ("fsdp2", True, 3)),
    *(("deepspeed_stage_2", False, 3), ("deepspeed_stage_2", True, 3)),
    *(("deepspeed_stage_3", False, 3), ("deepspeed_stage_3", True, 2)),
)
MOST = max(runs for _, _, runs in MODES)
# one run of each mode, then the second of each
CELLS = [(engine, background, number) for number in range(MOST) for engine, background, runs in MODES if number < runs]
STEPS = 24
IN_SAVES, AT_TIMES = 2, 3  # kills of a run
LONGEST_WAIT = 1.0  # seconds after a step
TRAINS_AGAIN = 90.0  # seconds after a kill
PATIENCE = 600.0  # seconds for a run
RESTARTS = 10


def start(folder, engine, background, kills):
    (folder / "checkpoints").mkdir(parents=True)
    words = {"folder": str(folder), "engine": engine, "background": background, "kills": kills, "steps": STEPS}
    return supervised(killed_run.main, [json.dumps(words)], folder, LIMITS, RESTARTS, environment())


def undisturbed(folder, engine, background):
    """Run without a kill, whose losses and parameters all other runs must have."""
    before = children()
    process = start(folder, engine, background, [])
    try:
        status = awaited(process)
    finally:
        process.kill()
        rest = left(before)
    assert (status, rest) == (0, []), printed(folder)


def awaited(process):
    """The exit status of a run, or None if it does not end."""
    limit = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < limit:
        time.sleep(0.05)
    return process.poll()


def drawn(draws, whole):
    """The kills of a run: (rank, step of the save, operation) and (rank, step, seconds after it)."""
    saves = draws.sample(range(EVERY, STEPS, EVERY), IN_SAVES)
    operations = [json.loads((whole / f"operations-{rank}.json").read_text()) for rank in range(RANKS)]
    kills = []
    for step in saves:
        rank = draws.choice([rank for rank in range(RANKS) if operations[rank][str(step)]])
        kills.append((rank, step, draws.randrange(operations[rank][str(step)])))
    steps = draws.sample(range(1, STEPS - 1), AT_TIMES)
    return kills, [(draws.randrange(RANKS), step, draws.uniform(0, LONGEST_WAIT)) for step in sorted(steps)]


def cell(folder, whole, draws, engine, background):
    """Run and kill, and return what it shows; an AssertionError says what does not hold."""
    in_saves, at_times = drawn(draws, whole)
    before = children()
    process = start(folder, engine, background, in_saves)
    try:
        kills = killed_at(process, folder, at_times)
        status = awaited(process)
    finally:
        process.kill()
        rest = left(before)
    assert (status, rest) == (0, []), printed(folder)
    marks = [folder / f"killed-{number}" for number in range(IN_SAVES)]
    kills += [path.stat().st_mtime for path in marks if path.exists()]
    trained, end = times(folder), (folder / "parameters.pt").stat().st_mtime
    longest = max(min((again for again in trained if again > kill), default=end) - kill for kill in kills)
    assert longest < TRAINS_AGAIN, printed(folder)
    assert equal(whole, folder), printed(folder)
    return {
        "kills": len(kills),
        "in_saves": sum(path.exists() for path in marks),
        "trains_again_after": round(longest, 1),
        "drawn": [in_saves, at_times],
    }


def killed_at(process, folder, moments):
    """Kill ranks at their times, and return when; those that the end of the run comes before are left out."""
    kills, limit = [], time.monotonic() + PATIENCE
    for rank, step, wait in moments:
        while last_step(folder) < step and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.005)
        time.sleep(wait)
        while process.poll() is None and last_step(folder) < STEPS - 1 and time.monotonic() < limit:
            pid = int((folder / f"pid-{rank}").read_text() or -1)
            if state_of(pid) in (GONE, ZOMBIE):  # it is being started again
                time.sleep(0.005)
                continue
            os.kill(pid, signal.SIGKILL)
            kills.append(time.time())
            break
    return kills


def losses(folder, rank):
    """(step, loss, time) of each step in the order in which a rank wrote them."""
    path = folder / f"losses-{rank}.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.split() for line in lines if line.count(" ") == 2]


def last_step(folder):
    return int(losses(folder, 0)[-1][0]) if losses(folder, 0) else -1


def times(folder):
    return [float(when) for _, _, when in losses(folder, 0)]


def equal(whole, folder):
    """Whether each loss that was written, and all parameters at the end, are equal bit by bit."""
    for rank in range(RANKS):
        right = {step: loss for step, loss, _ in losses(whole, rank)}
        result = losses(folder, rank)
        if {step for step, _, _ in result} != set(right) or any(right[step] != loss for step, loss, _ in result):
            return False
    first, second = (torch.load(path / "parameters.pt") for path in (whole, folder))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def printed(folder):
    return (folder / "output.txt").read_text()[-3000:]
