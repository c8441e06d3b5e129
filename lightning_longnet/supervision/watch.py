"""The watch over the ranks of an attempt: which of them failed, stands still, or makes no progress."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from signal import Signals
from statistics import median
from typing import TYPE_CHECKING

from lightning_longnet.supervision.processes import GONE, STOPPED, ZOMBIE, state_of, wait_status_of
from lightning_longnet.supervision.record import (
    BACKWARD,
    BETWEEN,
    COMPILATION,
    CONNECT,
    DISCONNECTED,
    ENDED,
    FORWARD,
    LOAD,
    OPTIMIZER,
    OUTSIDE,
    PREDICT,
    RUNS,
    SAVE,
    SET_UP,
    START,
    TEST,
    VALIDATION,
    Entry,
    place_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# Seconds without progress after which a phase counts as stalled.  Steps have a limit of their own.
ALLOWANCES = {START: 1800.0, LOAD: 1800.0, COMPILATION: 1800.0, VALIDATION: 600.0, SAVE: 1800.0}
LEAST_STALL = 60.0  # seconds that a step may take at least
STEPS_OF_STALL = 10  # median steps
STOPPED_LIMIT = 10.0  # seconds that a process may be stopped by a signal
_STEP = (FORWARD, BACKWARD, OPTIMIZER, BETWEEN)
_SHARED = {CONNECT: START, SET_UP: START, TEST: VALIDATION, PREDICT: VALIDATION}


@dataclass(frozen=True)
class Limits:
    """The times for which ranks may make no progress.

    Attributes:
        stall: seconds of a step; None for ten median steps, at least a minute.
        allowances: seconds of each other phase, for those that differ from `ALLOWANCES`.
    """

    stall: float | None = None
    allowances: Mapping[str, float] = field(default_factory=dict)

    def of(self, entry: Entry) -> float:
        """Return how many seconds a rank may stay in the phase that its record names."""
        phase = _SHARED.get(entry.phase, entry.phase)
        if phase in _STEP:
            if entry.steps > 0:
                return self.of_step(entry)
            phase = COMPILATION  # the first step, which may compile
        if phase == OUTSIDE:
            return float("inf")
        return self.allowances.get(phase, ALLOWANCES.get(phase, LEAST_STALL))

    def of_step(self, entry: Entry) -> float:
        """Return how many seconds a step may take."""
        if self.stall is not None:
            return self.stall
        return max(LEAST_STALL, STEPS_OF_STALL * median(entry.times or (0.0,)))

    @property
    def of_stopped(self) -> float:
        """The number of seconds for which a process may be stopped by a signal."""
        return STOPPED_LIMIT if self.stall is None else min(STOPPED_LIMIT, self.stall)


@dataclass
class Fault:
    """A fault of a rank.

    Attributes:
        rank: the rank.
        when: when it happened, by `time.monotonic()`, as far as this is known.
        text: what happened, and where.
        is_consequence: the rank lost its connection to another, which is the one that failed.
        stands: the rank is still there.
        status: the exit status of its process, if it is known.
    """

    rank: int
    when: float
    text: str
    is_consequence: bool = False
    stands: bool = False
    status: int | None = None

    @property
    def order(self) -> tuple[bool, float]:
        """The key by which the faults of several ranks are sorted: that which explains the others comes first."""
        return self.is_consequence, self.when


class Watch:
    """Compares the records of ranks and the state of their processes with what is allowed.

    A `Supervisor` makes one for each attempt, and calls its methods whenever it looks at the ranks.

    Args:
        limits: how long ranks may make no progress.
        started: when the processes were started, by `time.monotonic()`.
    """

    def __init__(self, limits: Limits, started: float) -> None:
        self.limits = limits
        self._started = self._resumed = started
        self._stopped: dict[int, float] = {}  # since when a process is stopped
        self._died: dict[int, tuple[float, int | None]] = {}  # when a process ended, and its exit status

    def resume(self, now: float) -> None:
        """Begin to count anew, as after the supervisor itself was stopped."""
        self._resumed = now
        self._stopped.clear()

    def died(self, pid: int, status: int | None) -> None:
        """Take note of the exit status of a process that has ended; None if it is not known.

        The supervisor calls it for the process that it has started itself, and `has_ended` for others.
        """
        self._died.setdefault(pid, (time.monotonic(), status))

    def faults(self, entries: Sequence[Entry]) -> list[Fault]:
        """Return what is wrong, and with which rank; that which explains the rest is first.

        The list is empty if nothing is.  That ranks stand still is looked at only if none has another fault.
        """
        now = time.monotonic()
        faults_of_ranks = [fault for entry in entries if (fault := self._fault(entry, now)) is not None]
        return sorted(faults_of_ranks, key=lambda each: each.order) or self._stalled(entries, now)

    def has_ended(self, entry: Entry) -> bool:
        """Whether the process of a rank has ended."""
        if entry.pid in self._died:
            return True
        state = state_of(entry.pid)
        if state not in (GONE, ZOMBIE):
            return False
        self.died(entry.pid, wait_status_of(entry.pid))
        return True

    def _fault(self, entry: Entry, now: float) -> Fault | None:
        """Return the fault of one rank: its error, its end in a run, or a signal that stopped it; None without one."""
        ended = self.has_ended(entry)
        when, status = self._died.get(entry.pid, (now, None))
        where = place(entry)
        if entry.outcome not in (RUNS, ENDED):
            text = f"rank {entry.rank} failed {where}: {entry.text}"
            return Fault(entry.rank, entry.failed_at, text, entry.outcome == DISCONNECTED, not ended, status)
        if ended:
            if entry.phase == OUTSIDE or entry.outcome == ENDED:
                return None
            return Fault(entry.rank, when, f"rank {entry.rank} {_ending(status)} {where}", status=status)
        return self._stop(entry, now)

    def _stop(self, entry: Entry, now: float) -> Fault | None:
        """Return the fault of a rank that a signal has stopped for too long; None for others."""
        if state_of(entry.pid) != STOPPED:
            self._stopped.pop(entry.pid, None)
            return None
        since = self._stopped.setdefault(entry.pid, now)
        if now - since < self.limits.of_stopped:
            return None
        return Fault(entry.rank, since, _stopped(entry, now - since), stands=True)

    def _stalled(self, entries: Sequence[Entry], now: float) -> list[Fault]:
        """Return a fault for each rank where none of them has made progress for as long as is allowed.

        A rank may wait for another that saves, or compiles: the group stalls when the last of them does.
        """
        if not entries:
            since, limit = max(self._started, self._resumed), self.limits.allowances.get(START, ALLOWANCES[START])
            if now - since > limit:
                return [Fault(0, since, f"no rank has begun a run for {now - since:.0f} s", stands=True)]
            return []
        stalled = []
        for entry in entries:
            if entry.phase == OUTSIDE and self.has_ended(entry):
                continue
            since = max(entry.since, self._resumed)
            if now - since <= self.limits.of(entry):
                return []
            text = f"rank {entry.rank} made no progress for {now - entry.since:.0f} s {place(entry)}"
            if entry.pid in self._stopped:
                text = _stopped(entry, now - self._stopped[entry.pid])
            stalled.append(Fault(entry.rank, since, text, stands=True))
        return stalled


def place(entry: Entry) -> str:
    """Return where a rank is, as a part of a sentence, for faults and for what the supervisor prints of ranks."""
    return place_of(entry.phase, entry.step)


def _stopped(entry: Entry, seconds: float) -> str:
    """Return the text of the fault of a rank that a signal stopped `seconds` ago."""
    return f"rank {entry.rank} was stopped by a signal (state T) {place(entry)}, {seconds:.0f} s ago"


def _ending(status: int | None) -> str:
    """Return how a process ended, by its exit status, as a part of a sentence."""
    if status is None:
        return "ended"
    if status < 0:
        name = Signals(-status).name if -status in {*Signals} else f"signal {-status}"
        return f"was ended by {name}"
    return f"ended with exit status {status}"
