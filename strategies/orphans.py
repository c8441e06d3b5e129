"""Processes that Lightning's launcher started end when it does.

A rank that is killed cannot tell the others.  Those that are in a collective learn of it by an error, but not those
that wait for the ranks to connect, or for data.
"""

from __future__ import annotations

import os
import signal
import threading
import time

PARENT = "LIGHTNING_LONGNET_LAUNCHER"
GRACE = 10.0  # seconds in which an error may show, or a checkpoint's end
_NAME = "lightning-longnet-launcher-watch"


def watch_launcher() -> None:
    """In a process that may start others, and in those that it started."""
    given = os.environ.get(PARENT)
    if given is None or int(given) != os.getppid() or os.environ.get("LOCAL_RANK", "0") == "0":
        os.environ[PARENT] = str(os.getpid())
        return
    if all(thread.name != _NAME for thread in threading.enumerate()):
        threading.Thread(target=_watch, args=(int(given),), name=_NAME, daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    time.sleep(GRACE)
    # a process that hangs in a collective does not look at anything else
    os.kill(os.getpid(), signal.SIGKILL)
