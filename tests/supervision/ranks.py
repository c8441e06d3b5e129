"""Ranks that do nothing but keep records, started as Lightning starts them: `ranks.py FOLDER RANKS FAULT RANK [STEPS]`.

Each attempt adds a line to `attempts`, and a checkpoint is the number in `step`.
"""

import ctypes
import faulthandler
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from lightning_longnet.supervision.record import (
    BETWEEN,
    DISCONNECTED,
    FAILED,
    FOLDER,
    FORWARD,
    OUTSIDE,
    RESUME,
    SAVE,
    Record,
)
from lightning_longnet.supervision.stacks import SIGNAL, path_of


def main(folder, ranks, fault, guilty, steps):
    rank = int(os.environ.get("LOCAL_RANK", 0))
    if rank == 0:
        with (folder / "attempts").open("a") as file:
            file.write("again\n" if RESUME in os.environ else "first\n")
        for path in (*folder.glob("pid-*"), *folder.glob("done-*")):
            path.unlink()
        for other in range(1, ranks):
            subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, "LOCAL_RANK": str(other)})
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    record = Record(os.environ[FOLDER], rank, ranks)
    with path_of(Path(os.environ[FOLDER]), rank).open("w") as stacks:
        faulthandler.register(SIGNAL, stacks, all_threads=True)
        record.print_stacks_at_signal()
        begin = int((folder / "step").read_text()) if RESUME in os.environ and (folder / "step").exists() else 0
        for step in range(begin, steps):
            record.mark(FORWARD, step)
            if step == (begin if fault == "at once" else 2) and rank == guilty:
                fail(record, fault, folder)
            time.sleep(0.05)
            record.add_step(0.05)
            record.mark(BETWEEN, step)
            if rank == guilty == 1 and step % 2 == 0:
                (folder / "step").write_text(str(step + 1))
            (folder / f"done-{rank}").write_text(str(step))
            await_peers(record, folder, rank, ranks, step)
        record.mark(OUTSIDE, steps)


def await_peers(record, folder, rank, ranks, step):
    """Wait until the others have done a step, or lose the connection to one that has died."""
    for other in set(range(ranks)) - {rank}:
        while number(folder / f"done-{other}") < step:
            pid = number(folder / f"pid-{other}")
            if pid > 0 and state(pid) in ("", "Z") and number(folder / f"done-{other}") < step:
                record.end(DISCONNECTED, "RuntimeError: Connection closed by peer")
                sys.exit(1)
            time.sleep(0.01)


def number(path):
    text = path.read_text() if path.exists() else ""
    return int(text or -1)


def state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


def fail(record, fault, folder):
    once = folder / "failed"
    if once.exists() and fault != "at once":
        return
    once.touch()
    if fault in ("exception", "at once"):
        record.end(FAILED, "OSError: the disk is gone")
        sys.exit(1)
    elif fault == "exit 0":
        os._exit(0)
    elif fault == "GIL held":
        ctypes.PyDLL(None).sleep(10**6)
    elif fault == "slow save":
        record.mark(SAVE, 2)
        time.sleep(3)
    elif fault == "endless loop":
        while True:
            pass
    else:
        os.kill(os.getpid(), getattr(signal, fault))


if __name__ == "__main__":
    words = [*sys.argv[1:], "6"]
    main(Path(words[0]), int(words[1]), words[2], int(words[3]), int(words[4]))
