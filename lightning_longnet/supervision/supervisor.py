"""The supervisor of a run: starts it, watches its ranks, ends them together, and starts them again."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_longnet.supervision.processes import Guard, end, members
from lightning_longnet.supervision.record import FOLDER, OUTSIDE, RESUME, read
from lightning_longnet.supervision.stacks import at_its_end, collect, culprits
from lightning_longnet.supervision.watch import Fault, Limits, Watch, place

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lightning_longnet.supervision.record import Entry

_PAUSE = 0.2  # seconds between two looks at the ranks
GRACE = 3.0  # seconds in which the other ranks may print errors of their own, when one has died
LEAVE = 30.0  # seconds in which a rank that reported an error may end by itself
AFTER = 8.0  # seconds in which the other ranks may end, when the first process has
SAVING = 60.0  # seconds in which ranks may end that were asked to
LONGEST_PAUSE = 30.0  # seconds between two attempts
MISUSE, TERMINATED, INTERRUPTED = 2, 128 + signal.SIGTERM, 128 + signal.SIGINT
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass
class Outcome:
    """The end of an attempt: the exit status of the run, the faults of its ranks, and the steps that it reached."""

    status: int
    faults: list[Fault]
    step: int = -1


class Supervisor:
    """Runs a command that starts the ranks of this node, or is one of them; `supervise` makes it and calls `run`.

    Args:
        command: the program and its arguments.
        limits: how long ranks may make no progress.
        restarts: how often the command is started again without a new step of training in between.
        resumes: whether the first attempt goes on from the newest checkpoint, too.
    """

    def __init__(self, command: Sequence[str], limits: Limits, restarts: int, *, resumes: bool = False) -> None:
        self.command, self.limits, self.restarts, self.resumes = list(command), limits, restarts, resumes
        self._received: list[int] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._kills = False

    def run(self) -> int:
        """Run the command until it ends well or has failed too often, and return the exit status."""
        self._began = time.time()
        self._folder = Path(tempfile.mkdtemp(prefix="longnet-supervision-"))
        guard = Guard(self._folder)
        try:
            with self._signals():
                return self._attempts(guard)
        finally:
            end(self._folder, -1)
            guard.dismiss()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _attempts(self, guard: Guard) -> int:
        """Run the command again until it ends well, was asked to end, or has failed too often; return the status."""
        best, failures = -1, 0
        while True:
            outcome = self._attempt(guard, resumes=self.resumes or failures > 0)
            if outcome.status == 0:
                return 0
            failures = 1 if outcome.step > best else failures + 1
            best = max(best, outcome.step)
            reason = outcome.faults[0].text if outcome.faults else f"the command ended with status {outcome.status}"
            for fault in outcome.faults[1:]:
                _print(fault.text)
            if self._is_asked_to_end():
                _print(f"ended after {signal.Signals(self._received[0]).name}: {reason}")
                return outcome.status
            if self.restarts == 0 or outcome.status in (MISUSE, TERMINATED, INTERRUPTED):
                _print(reason)
                return outcome.status
            if failures > self.restarts:
                _print(f"gave up after {self.restarts} restarts without a new step: {reason}")
                return outcome.status
            pause = 0 if failures == 1 else min(LONGEST_PAUSE, 2.0 ** (failures - 2))
            _print(f"{reason}; restart {failures} of {self.restarts} without a new step, in {pause:.0f} s")
            self._wait(pause)
            if self._is_asked_to_end():
                return outcome.status

    def _attempt(self, guard: Guard, *, resumes: bool) -> Outcome:
        """Run the command once, end all its processes, and return how it ended.

        `resumes` has the run go on from its newest checkpoint.
        """
        for path in (*self._folder.glob("rank-*"), *self._folder.glob("stacks-*")):
            path.unlink()
        environment = {**os.environ, FOLDER: str(self._folder)}
        environment.pop(RESUME, None)
        if resumes:
            environment[RESUME] = "last" if self.resumes else f"{self._began:.0f}"
        watch = Watch(self.limits, time.monotonic())
        process = subprocess.Popen(self.command, env=environment, start_new_session=True)
        self._process = process
        guard.watch(process.pid)
        try:
            return self._observe(process, watch)
        finally:
            if left := end(self._folder, process.pid):
                _print(f"processes {', '.join(map(str, left))} cannot be killed: the kernel holds them")
            process.wait()

    def _observe(self, process: subprocess.Popen[bytes], watch: Watch) -> Outcome:
        """Wait for the end of an attempt, or for a fault."""
        looked = time.monotonic()
        while True:
            time.sleep(_PAUSE)
            if self._kills:
                return self._outcome(process, [])
            if time.monotonic() - looked > _PAUSE + 2.0:  # this process was stopped, and its ranks may have been
                watch.resume(time.monotonic())
            looked = time.monotonic()
            has_ended = process.poll() is not None
            if has_ended:
                watch.died(process.pid, process.returncode)
            entries = read(self._folder)
            faults = watch.faults(entries)
            if faults:
                return self._failed(process, watch, entries, faults)
            if has_ended:
                self._await_others(process)
                return self._outcome(process, watch.faults(read(self._folder)))

    def _failed(
        self, process: subprocess.Popen[bytes], watch: Watch, entries: list[Entry], faults: list[Fault]
    ) -> Outcome:
        """Give the other ranks some time to say what they know, and end them."""
        if all(fault.stands and not fault.status for fault in faults) and not _have_errors(entries):
            return self._outcome(process, self._standing(entries, faults))
        begin, died = time.monotonic(), None
        while self._is_alive(process):
            if process.poll() is not None:
                watch.died(process.pid, process.returncode)
            entries = read(self._folder)
            now = time.monotonic()
            if died is None and any(watch.has_ended(each) for each in entries):
                died = now
            is_asked = self._is_asked_to_end() or process.returncode == TERMINATED or _was_terminated(entries)
            patience = SAVING if is_asked else GRACE
            if (died is not None and now - died > patience) or now - begin > max(LEAVE, patience):
                break
            time.sleep(_PAUSE / 2)
        faults = watch.faults(read(self._folder)) or faults
        for fault in faults:
            if stack := at_its_end(self._folder, fault.rank):
                _print(f"rank {fault.rank} at its end:\n{stack}")
        return self._outcome(process, faults)

    def _standing(self, entries: list[Entry], faults: list[Fault]) -> list[Fault]:
        """Print the stacks of ranks that stand still, and return the faults of those that the others wait for first."""
        stacks = collect(self._folder, entries)
        for entry in entries:
            if entry.rank in stacks:
                _print(f"rank {entry.rank} {place(entry)}:\n{stacks[entry.rank]}")
            else:
                _print(f"rank {entry.rank} {place(entry)} prints no stack")
        stopped = [fault.rank for fault in faults if "was stopped" in fault.text]
        guilty = stopped or culprits(entries, stacks)
        for fault in faults:
            fault.is_consequence = fault.rank not in guilty
        return sorted(faults, key=lambda each: each.order)

    def _outcome(self, process: subprocess.Popen[bytes], faults: list[Fault]) -> Outcome:
        """Return how an attempt ended, with the exit status that stands for it."""
        step = max((each.step for each in read(self._folder)), default=-1)
        code = process.poll()
        if code is None and faults:
            code = faults[0].status
        if not code:
            is_good = code == 0 and not faults
            return Outcome(0 if is_good else 1, faults, step)
        return Outcome(128 - code if code < 0 else code, faults, step)

    # Processes and signals

    def _is_alive(self, process: subprocess.Popen[bytes]) -> bool:
        """Return whether the command or another process of the attempt has not ended."""
        return process.poll() is None or bool(members(self._folder, process.pid))

    def _await_others(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for the end of the other processes of an attempt, for `AFTER` seconds at most."""
        limit = time.monotonic() + AFTER
        while members(self._folder, process.pid) and time.monotonic() < limit:
            time.sleep(_PAUSE / 2)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Forward signals to the command inside the block; the command saves and ends, or goes on."""
        heard = [number for number in _FORWARDED if signal.getsignal(number) != signal.SIG_IGN]  # as nohup has it
        before = {number: signal.signal(number, self._forward) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _forward(self, number: int, _: object) -> None:
        """Forward a signal to the command, and note one that asks for the end; a second Ctrl-C kills the ranks."""
        if number in _ENDING:
            self._kills = self._kills or signal.SIGINT in self._received  # Ctrl-C, and again
            self._received.append(number)
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def _is_asked_to_end(self) -> bool:
        """Return whether a signal has asked this process to end."""
        return bool(self._received)

    def _wait(self, seconds: float) -> None:
        """Wait between two attempts, until a signal asks for the end."""
        limit = time.monotonic() + seconds
        while time.monotonic() < limit and not self._is_asked_to_end():
            time.sleep(_PAUSE)


def _have_errors(entries: Sequence[Entry]) -> bool:
    """Return whether a rank in a run has written how that ended."""
    return any(each.outcome != 0 and each.phase != OUTSIDE for each in entries)


def _was_terminated(entries: Sequence[Entry]) -> bool:
    """Return whether a rank has written that SIGTERM ended its run."""
    return any("SIGTERM" in each.text for each in entries)


def _print(text: str) -> None:
    """Print a line of the supervisor to stderr."""
    print(f"supervise: {text}", file=sys.stderr, flush=True)  # noqa: T201
