"""Starts `program.py` under a supervisor, and waits for its end and for that of all that it started."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).parent / "program.py"
PATIENCE = 240  # seconds until a program must have ended, of which its ranks need most for imports
STALL = 5
IN_TIME = 30  # seconds on a machine that does other things, too
# what the last line says of each
WORDS = {
    "exception": "OSError: the disk is gone",
    "exit 0": "sys.exit(0) before the run had ended",
    "exit 3": "sys.exit(3) before the run had ended",
    "abort": "was ended by SIGABRT",
    "segfault": "was ended by SIGSEGV",
    "SIGINT": "KeyboardInterrupt",
    "SIGTERM": "SIGTERM",
    "SIGKILL": "was ended by SIGKILL",
    "SIGSTOP": "was stopped by a signal",
    "endless loop": "made no progress",
    "GIL held": "made no progress",
}


def environment(**changes):
    """That of a user's shell: nothing of the ranks of this process or of its job."""
    foreign = ("SLURM", "LIGHTNING_", "PL_", "TORCHELASTIC")
    names = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK")
    kept = {name: text for name, text in os.environ.items() if not name.startswith(foreign) and name not in names}
    common = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "ignore"}
    return {**kept, **common, **changes}


def command(folder, **settings):
    return [sys.executable, str(PROGRAM), json.dumps({"folder": str(folder), **settings})]


def start(folder, *options, **settings):
    """A supervisor of the program, and the file of what it and all ranks print."""
    allowed = [word for name in ("validation", "save", "load") for word in ("--allow", f"{name}={STALL}")]
    words = [sys.executable, "-m", "lightning_longnet.supervise", "--stall", str(STALL), *allowed, *options]
    with (folder / "output.txt").open("a") as output:
        return subprocess.Popen(
            [*words, "--", *command(folder, **settings)], stdout=output, stderr=output, cwd=folder, env=environment()
        )


def ended(process, folder, patience=PATIENCE):
    """(exit status, the lines that were printed, seconds since the fault, processes that are left)"""
    try:
        status = process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"no end in {patience} s\n{(folder / 'output.txt').read_text()[-3000:]}") from None
    failed = folder / "failed"
    seconds = time.time() - failed.stat().st_mtime if failed.exists() else None
    lines = (folder / "output.txt").read_text().strip().splitlines()
    return status, lines, seconds, left(folder)


def left(folder):
    """Processes with the folder in their command line; those found are ended."""
    result = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            is_ours = str(folder).encode() in path.read_bytes() and path.parent.name != str(os.getpid())
            if is_ours and path.with_name("stat").read_text().rpartition(")")[2].split()[0] != "Z":
                result.append(int(path.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    for pid in result:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return result


def losses(folder, rank=0):
    """(step, loss) in the order in which they were written."""
    rows = (folder / f"losses-{rank}.txt").read_text().splitlines()
    return [(int(step), float(loss)) for step, loss in map(str.split, rows)]


def check_end(fault, rank, phase, has_failed, status, lines, seconds, left):
    """Assert that a run ended as it must after a fault: in time, with a status that says so, and a last line of it."""
    text = "\n".join(lines[-40:])
    assert not left
    assert has_failed, text
    assert status != 0, text
    assert seconds < IN_TIME, text
    assert lines[-1].startswith("supervise: "), text
    assert f"rank {rank} " in lines[-1], text
    assert WORDS[fault] in lines[-1], text
    assert "step " in lines[-1], text
    if fault in ("abort", "segfault"):
        assert "in fail\n" in "\n".join(lines).rpartition(f"rank {rank} at its end:")[2], text
    if fault != "SIGTERM":  # which is obeyed after the step or the validation
        assert f"in {phase} of step" in lines[-1], text
