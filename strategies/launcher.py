"""Lightning's launcher, and the end of what it started: no process outlives the others.

A rank that is killed cannot tell the others.  Those that are in a collective learn of it by an error, but not those
that wait for the ranks to connect, or for data, nor those that a debugger or a signal has stopped.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time

from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

GRACE = 5.0  # seconds in which an error may show, and callbacks may save
_PARENT = "LIGHTNING_LONGNET_LAUNCHER"


class WatchedLauncher(_SubprocessScriptLauncher):
    """Starts the other ranks of a node; those end when it does, and it ends them where it fails."""

    def _call_children_scripts(self) -> None:
        os.environ[_PARENT] = str(os.getpid())
        try:
            super()._call_children_scripts()
        finally:
            del os.environ[_PARENT]  # what is started besides is nothing of ours

    def end_children(self) -> None:
        end = time.monotonic() + GRACE
        for process in self.procs:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()


def watch_launcher() -> None:
    """In a process that a `WatchedLauncher` has started; others are not concerned."""
    parent = os.environ.pop(_PARENT, None)
    if parent is not None:
        threading.Thread(target=_watch, args=(int(parent),), name="launcher-watch", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    time.sleep(GRACE)
    # a process that hangs in a collective does not look at anything else
    os.kill(os.getpid(), signal.SIGKILL)
