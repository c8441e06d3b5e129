"""What a rank waits for before its process ends."""

from __future__ import annotations

import atexit
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
