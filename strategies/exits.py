"""What a rank does at the end of its process: it waits for gloo's threads, and prints its stacks if a fault ends it."""

from __future__ import annotations

import atexit
import faulthandler
import sys
import threading
import time
from functools import cache
from pathlib import Path

# A thread that waits for the interpreter's lock gets it as soon as the main thread sleeps.  Torch does not say when its
# threads are done: the process waits for the first of these seconds, and on Linux then until no other thread runs, for
# the second at most
LEAST_WAIT, MOST_WAIT = 0.1, 5.0
_LOOKS, _PAUSE = 3, 0.02


@cache
def await_gloo_at_exit() -> None:
    """Have the process wait at its exit, so that gloo's threads can release the tensors of their last messages.

    `SequenceRanks._make_context` calls it when the ranks are connected; further calls in a process do nothing.

    A thread of gloo needs the interpreter's lock to release a tensor. One that asks for it while the interpreter
    shuts down ends the process with SIGABRT ("terminate called without an active exception"), after a run that went
    well. torch does not wait for these threads: see pull request 179291 and issue 190489 of pytorch/pytorch.
    """
    atexit.register(_await_threads)


def _await_threads() -> None:
    """Wait until no other thread has run in `_LOOKS` consecutive looks, for `MOST_WAIT` seconds at most."""
    time.sleep(LEAST_WAIT)
    end, idle = time.monotonic() + MOST_WAIT, 0
    while idle < _LOOKS and time.monotonic() < end:
        idle = 0 if _other_threads_run() else idle + 1
        time.sleep(_PAUSE)


def _other_threads_run() -> bool:
    """Return whether another thread of this process runs or waits for a core; False where the system does not tell."""
    own = str(threading.get_native_id())
    for task in Path("/proc/self/task").glob("*"):
        try:
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:  # it has ended
            continue
        if state == "R" and task.name != own:
            return True
    return False


def print_stacks_at_crash() -> None:
    """Have the Python stack of each thread printed to stderr if SIGSEGV, SIGABRT or a similar signal ends the process.

    `SequenceRanks._make_context` calls it when the ranks are connected, as the errors of the other ranks name only the
    signal.  If the program or the supervisor has enabled faulthandler, this does nothing.
    """
    if sys.__stderr__ is not None and not faulthandler.is_enabled():
        faulthandler.enable(sys.__stderr__)
