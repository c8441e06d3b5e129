"""The processes of a run, which are known by a mark in their environment, whatever became of their parents."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_longnet.supervision.record import FOLDER

if TYPE_CHECKING:
    from collections.abc import Iterator

_PAUSE = 0.05
PATIENCE = 10.0  # seconds for the kernel to end processes
GONE, ZOMBIE, STOPPED = "", "Z", "T"


def state_of(pid: int) -> str:
    """Return the letter of a process's state, "Z" where it has ended and nobody has waited for it, "" for none.

    A `Watch` and `collect` of stacks.py ask for ranks, and `NamedFailures` for those that this process started.
    """
    fields = _fields(pid)
    return fields[0] if fields else GONE


def wait_status_of(pid: int) -> int | None:
    """Return the exit status of a process that has ended and that its parent has not waited for.

    It is negative for a signal, as with `subprocess`, and None where it cannot be known.  `Watch.has_ended` asks.
    """
    fields = _fields(pid)
    if not fields or fields[0] != ZOMBIE:
        return None
    return os.waitstatus_to_exitcode(int(fields[-1]))


def members(folder: Path, session: int) -> list[int]:
    """Return the processes of a run that have not ended: those of its session, and those that carry its mark.

    A `Supervisor` asks whether an attempt has ended, and `end` for those to kill.

    Args:
        folder: the folder of the run's records; the mark is its path in the environment of a process.
        session: the id of the session that the command of an attempt began; -1 for none.
    """
    mark = f"{FOLDER}={folder}".encode()
    pids = []
    for pid in _pids():
        if pid == os.getpid():
            continue
        fields = _fields(pid)
        if not fields or fields[0] == ZOMBIE:
            continue
        if int(fields[3]) == session or mark in _environment(pid):
            pids.append(pid)
    return pids


def end(folder: Path, session: int) -> list[int]:
    """Kill all processes of a run, and return those that are still there after `PATIENCE` seconds.

    A `Supervisor` calls it after each attempt and at its own end, and the `Guard` if the supervisor is killed.  The
    arguments are those of `members`.
    """
    limit = time.monotonic() + PATIENCE
    while left := members(folder, session):
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > limit:
            return left
        time.sleep(_PAUSE)
    return []


class Guard:
    """A separate process that ends the processes of a run if its supervisor is killed.

    `Supervisor.run` makes it before it starts the command, and dismisses it at its end.
    """

    def __init__(self, folder: Path) -> None:
        reads, self._writes = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            _stand_guard(folder, reads, self._writes)
        os.close(reads)

    def watch(self, session: int) -> None:
        """Name the session of the run's processes; the supervisor calls it for each attempt."""
        os.write(self._writes, f"{session}\n".encode())

    def dismiss(self) -> None:
        """End the guard, when no process of the run is left."""
        os.kill(self.pid, signal.SIGKILL)
        os.close(self._writes)
        os.waitpid(self.pid, 0)


def _stand_guard(folder: Path, reads: int, writes: int) -> None:
    """Wait in the guard's process for the end of the supervisor, and end the run; it never returns.

    Args:
        folder: the folder of the run's records, which is removed then.
        reads: the end of a pipe on which the supervisor names sessions, and which closes with its process.
        writes: the other end, which this process closes.
    """
    try:
        os.setsid()
        os.close(writes)
        # those that the supervisor forwards: launchers send them to all processes of a job
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(signum, signal.SIG_IGN)
        with Path(os.devnull).open("r+b") as nothing:  # who reads what the supervisor prints must not wait for us
            for number in range(3):
                os.dup2(nothing.fileno(), number)
        content = b""
        while piece := os.read(reads, 4096):
            content += piece
        session = content.split()[-1:] or [b"-1"]
        end(folder, int(session[0]))
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os._exit(0)


def _pids() -> Iterator[int]:
    """Yield the ids of all processes."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            yield int(name)


def _fields(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat after the name: state, parent, group, session, ..., exit status.

    The list is empty if there is no such process.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _environment(pid: int) -> bytes:
    """Return the environment with which a process was started; empty if it has ended or may not be read."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""
