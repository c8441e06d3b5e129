"""What a rank does at the end of its process: it waits for gloo's threads, and prints its stacks if a fault ends it."""

from __future__ import annotations

import atexit
import faulthandler
import sys
import time
from functools import cache

# A thread that waits for the interpreter's lock gets it as soon as the main thread sleeps. Torch does not say when its
# threads are done, so a process that gets no CPU time for longer than this can still end with SIGABRT.
SECONDS = 0.1


@cache
def await_gloo_at_exit() -> None:
    """Let gloo's threads release the tensors of their last messages before the interpreter shuts down.

    A thread of gloo needs the interpreter's lock to release a tensor. One that asks for it while the interpreter
    shuts down ends the process with SIGABRT ("terminate called without an active exception"), after a run that went
    well. torch does not wait for these threads: see its pull request 179291 and its issue 190489.
    """
    atexit.register(time.sleep, SECONDS)


def print_stacks_at_crash() -> None:
    """Print the Python stack of each thread to stderr if SIGSEGV, SIGABRT or a similar signal ends the process.

    The other ranks name only the signal.  A handler that the program or the supervisor has installed stays.
    """
    if sys.__stderr__ is not None and not faulthandler.is_enabled():
        faulthandler.enable(sys.__stderr__)
