"""Processes that import what ranks need while the first rank does, and wait for its word to begin.

The first rank alone knows from its configuration how many others it starts.  Without these processes each of the others
would import torch and Lightning after that, for seconds, while the first waits for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_PIPE = "LIGHTNING_LONGNET_STANDBY"  # the number of the pipe from which a process reads its word
_WAITING: list[Standby] = []  # the processes that this one has started


class Standby(NamedTuple):
    """A process that waits for its word.

    Attributes:
        process: the process.
        pipe: the end of a pipe to which the word is written; the process ends where it is closed without one.
    """

    process: subprocess.Popen[bytes]
    pipe: int

    def begin(self, environment: Mapping[str, str]) -> None:
        """Let the process go on, with an environment; `WatchedLauncher` calls it in place of starting a rank."""
        # of one that has ended, the launcher's watch tells
        with contextlib.suppress(BrokenPipeError), os.fdopen(self.pipe, "wb") as file:
            file.write(json.dumps(dict(environment)).encode())

    def dismiss(self) -> None:
        """End the process, and wait for its end."""
        os.close(self.pipe)
        self.process.terminate()
        self.process.wait()


def start(command: Sequence[str], count: int) -> None:
    """Start a command as the local ranks 1 to `count`; it must call `await_word` before it does anything but import.

    `start_ranks` of the command line calls it for the commands of the Trainer, before the configuration is read.
    Modules read the rank and the number of threads when they are imported, so the environment holds both from the
    start.  The threads are those that Lightning gives to each rank.  On Windows, where a process does not inherit pipes
    by their numbers, none is started.
    """
    if os.name != "posix":
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for rank in range(1, count + 1):
        reads, writes = os.pipe()
        environment = {"OMP_NUM_THREADS": str(max(1, cores // (count + 1))), **os.environ}
        environment |= {"LOCAL_RANK": str(rank), _PIPE: str(reads)}
        process = subprocess.Popen(command, env=environment, pass_fds=[reads])
        os.close(reads)
        _WAITING.append(Standby(process, writes))


def take(count: int) -> list[Standby]:
    """Return the processes that wait, in the order of their ranks, where there are `count`; else end them.

    `WatchedLauncher` asks when it starts the other ranks.  The list is empty if there were others or none.
    """
    if len(_WAITING) == count and all(each.process.poll() is None for each in _WAITING):
        taken = [*_WAITING]
        _WAITING.clear()
        return taken
    dismiss()
    return []


def dismiss() -> None:
    """End the processes that wait; `main` of the command line calls it at the end of every command."""
    while _WAITING:
        _WAITING.pop().dismiss()


def prepare() -> bool:
    """Return whether this process is to wait for a word; until then, Ctrl-C is for the process that started it.

    `main` of the command line asks before it imports Lightning.
    """
    if _PIPE not in os.environ:
        return False
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return True


def await_word() -> None:
    """Wait for the word in a process that `start` has started, and take its environment; end where there is none.

    `main` of the command line calls it in each process, between the imports and the work; others go on at once.
    """
    pipe = os.environ.pop(_PIPE, None)
    if pipe is None:
        return
    with os.fdopen(int(pipe), "rb") as file:
        word = file.read()
    if not word:
        sys.exit(0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(json.loads(word))
