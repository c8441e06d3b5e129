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


def environment(**changes):
    """That of a user's shell: nothing of the ranks of this process or of its job."""
    foreign = ("SLURM", "LIGHTNING_", "PL_", "TORCHELASTIC")
    names = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK")
    kept = {name: text for name, text in os.environ.items() if not name.startswith(foreign) and name not in names}
    common = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "ignore"}
    return {**kept, **common, **changes}


def command(folder, **told):
    return [sys.executable, str(PROGRAM), json.dumps({"folder": str(folder), **told})]


def start(folder, *options, **told):
    """A supervisor of the program, and the file of what it and all ranks print."""
    allowed = [word for name in ("validation", "save", "load") for word in ("--allow", f"{name}={STALL}")]
    words = [sys.executable, "-m", "lightning_longnet.supervise", "--stall", str(STALL), *allowed, *options]
    with (folder / "output.txt").open("a") as output:
        return subprocess.Popen(
            [*words, "--", *command(folder, **told)], stdout=output, stderr=output, cwd=folder, env=environment()
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
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            is_ours = str(folder).encode() in path.read_bytes() and path.parent.name != str(os.getpid())
            if is_ours and path.with_name("stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(int(path.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    for pid in found:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return found


def losses(folder, rank=0):
    """(step, loss) in the order in which they were written."""
    rows = (folder / f"losses-{rank}.txt").read_text().splitlines()
    return [(int(step), float(loss)) for step, loss in map(str.split, rows)]
