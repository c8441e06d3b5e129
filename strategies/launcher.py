"""Lightning's launcher for a node, with a watch: no process that it started outlives the others.

A rank that is killed cannot notify the others.  Those in a collective get an error, but not those that wait for the
ranks to connect, or for data, nor those that a debugger or a signal has stopped.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from typing import TYPE_CHECKING

from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from lightning_longnet.supervision import standby
from lightning_longnet.supervision.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Sequence

GRACE = 5.0  # seconds in which a rank may print its error, and its callbacks may save
_PARENT = "LIGHTNING_LONGNET_LAUNCHER"
_PARENTS: list[int] = []  # at most one entry: the process id of the launcher of this rank


class WatchedLauncher(_SubprocessScriptLauncher):
    """Starts the other ranks of a node: they end when this process ends, and `end_children` kills those that do not.

    `SequenceRanks._configure_launcher` puts it in place of Lightning's launcher, on the rank that starts the others.
    """

    def _call_children_scripts(self) -> None:
        """Start the other ranks of this node as processes; Lightning calls it when this process begins its first run.

        The environment of each has the id of this process, for `watch_parent`.  On a single node the ranks connect at a
        free port, unless the environment names one.
        """
        os.environ[_PARENT] = str(os.getpid())
        if self.num_nodes == 1 and not {"MASTER_PORT", "STANDALONE_PORT"} & os.environ.keys():
            os.environ["MASTER_PORT"] = str(free_port())
        # before the others start, which then have the same share of the cores: Lightning sets it in this process alone,
        # and threads of the others that wait for a core would take it from those that compute
        _set_num_threads_if_needed(self.num_processes)
        try:
            if waiting := standby.take(self.num_processes - 1):
                self._begin(waiting)
            else:
                super()._call_children_scripts()
        finally:
            del os.environ[_PARENT]  # other processes that this one starts must not watch it

    def _begin(self, waiting: Sequence[standby.Standby]) -> None:
        """Let processes that wait go on as the other ranks, with the environment that Lightning gives to these."""
        self._check_can_spawn_children()
        place = self.cluster_environment
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = place.main_address, str(place.main_port)
        os.environ["NODE_RANK"], os.environ["LOCAL_RANK"] = str(place.node_rank()), str(place.local_rank())
        os.environ["WORLD_SIZE"] = str(self.num_processes * self.num_nodes)
        for rank, each in enumerate(waiting, 1):
            each.begin({**os.environ, "LOCAL_RANK": str(rank)})
            self.procs.append(each.process)

    def end_children(self) -> None:
        """Kill the processes that this one started and that have not ended after `GRACE` seconds.

        `SplitSteps.teardown` calls it after an error or Ctrl-C.
        """
        end = time.monotonic() + GRACE
        for process in self.procs:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()


def launcher_has_ended() -> bool:
    """Return whether the process that started this one as a rank has ended; False if no rank started it.

    `NamedFailures` asks it to explain a lost connection.
    """
    return bool(_PARENTS) and os.getppid() != _PARENTS[0]


def watch_parent() -> None:
    """Start a thread that kills this process if the one that started it ends; do nothing if no rank started it.

    `SequenceRanks._configure_launcher` calls it when a Trainer is made.
    """
    parent = os.environ.pop(_PARENT, None)
    if parent is not None:
        _PARENTS[:] = [int(parent)]
        threading.Thread(target=_watch, args=(int(parent),), name="launcher-watch", daemon=True).start()


def _watch(parent: int) -> None:
    """Kill this process `GRACE` seconds after its parent has ended; the target of the watch's thread."""
    while os.getppid() == parent:
        time.sleep(1.0)
    time.sleep(GRACE)
    # a process that hangs in a collective handles no other signal
    os.kill(os.getpid(), signal.SIGKILL)
