"""The matrix of faults: whatever becomes of a rank, wherever it is, the run ends in time and names it."""

import json
import subprocess
import time

import program
from forks import children, left, supervised
from program import FAULTS, PHASES
from supervised import PATIENCE, STALL, check_end, environment

from lightning_longnet.supervision.watch import Limits

RANKS = 2
CELLS = [(fault, rank, phase) for fault in FAULTS for rank in (0, RANKS - 1) for phase in PHASES]
LIMITS = Limits(STALL, dict.fromkeys(("validation", "save", "load"), STALL))


def run(folder, restarts=0, main=program.main, **options):
    """(exit status, lines, seconds since the fault, processes that are left) of a run under a supervisor."""
    before = children()
    words = [json.dumps({"folder": str(folder), **options})]
    process = supervised(main, words, folder, LIMITS, restarts, environment())
    try:
        status = process.wait(PATIENCE)
        failed = folder / "failed"
        seconds = time.time() - failed.stat().st_mtime if failed.exists() else None
    except subprocess.TimeoutExpired:
        text = (folder / "output.txt").read_text()[-2000:]
        raise AssertionError(f"no end in {PATIENCE} s\n{text}") from None
    finally:
        process.kill()
        rest = left(before)
    return status, (folder / "output.txt").read_text().strip().splitlines(), seconds, rest


def saved(folder, engine):
    """Save the checkpoints that cells load."""
    folder.mkdir()
    status, lines, _, rest = run(folder, steps=2, kind=engine)
    assert (status, rest) == (0, []), "\n".join(lines)


def cell(folder, checkpoints, engine, fault, rank, phase):
    """Run a cell, and return what it shows; an AssertionError says what does not hold."""
    resume = str(checkpoints / "step=2.ckpt") if phase == "load" else None
    status, lines, seconds, rest = run(folder, kind=engine, fault=fault, rank=rank, phase=phase, resume=resume)
    check_end(fault, rank, phase, (folder / "failed").exists(), status, lines, seconds, rest)
    return {"status": status, "ended_after": round(seconds, 1), "last_line": lines[-1]}
