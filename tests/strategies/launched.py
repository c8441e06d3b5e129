"""Starts `script.py` and waits for its end, for so long and no longer."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

SCRIPT = Path(__file__).parent / "script.py"
ROOT = Path(__file__).parents[2]
PATIENCE = 120  # seconds until a program must have ended


def environment():
    """Return the environment of a user's shell: nothing of the ranks of this process or of its job."""
    foreign = ("SLURM", "LIGHTNING_", "PL_", "TORCHELASTIC")
    names = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK")
    kept = {name: text for name, text in os.environ.items() if not name.startswith(foreign) and name not in names}
    return {**kept, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def start(folder, *launcher, **options):
    folder.mkdir(exist_ok=True)
    command = [*(launcher or (sys.executable,)), str(SCRIPT), json.dumps({"folder": str(folder), **options})]
    with (folder / "output.txt").open("a") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment(), cwd=folder, start_new_session=True
        )


def start_forked(folder, **options):
    """Start the script as a fork of this process, which must be a `ForkingProcess`."""
    import forks
    import script

    folder.mkdir(exist_ok=True)
    words = [json.dumps({"folder": str(folder), **options})]
    return forks.launched(script.main, words, folder, environment())


def ended(process, folder, patience=PATIENCE):
    """Wait for a process, and return its exit status."""
    try:
        return process.wait(patience)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"no end in {patience} s\n{(folder / 'output.txt').read_text()[-3000:]}") from None
    finally:
        end_group(process)


def end_group(process):
    """End all processes of a group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def losses(folder, rank):
    rows = (folder / f"losses-{rank}.txt").read_text().split("\n")[:-1]
    return {int(number): float(loss) for number, loss in map(str.split, rows)}


def await_end_of_session(leader, patience):
    """Wait for the processes of a session to end; one that has ended and was not waited for does not count."""
    end = time.monotonic() + patience
    while left := [pid for pid, session, state in _processes() if session == leader and state != "Z"]:
        assert time.monotonic() < end, f"{left} still run"
        time.sleep(0.2)


def _processes():
    """Yield (pid, session, state) of all processes, on Linux."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
            yield int(path.parent.name), int(session), state
