"""The record of a rank: a small file mapped to memory, which the rank writes and its supervisor reads.

Nothing of it waits: a write is a copy of a few bytes, and a reader that meets a write repeats.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path

FOLDER = "LIGHTNING_LONGNET_SUPERVISION"  # the environment variable with the folder of a run's records
# "last" where a run is to go on from its newest checkpoint, or the time since which that was saved
RESUME = "LIGHTNING_LONGNET_RESUME"

# The phases of a rank
START, CONNECT, SET_UP, LOAD = "start", "connecting", "set-up", "load"
FORWARD, BACKWARD, OPTIMIZER, BETWEEN = "forward", "backward", "optimizer step", "between steps"
VALIDATION, TEST, PREDICT, SAVE, COMPILATION = "validation", "test", "predict", "save", "compilation"
OUTSIDE = "outside of a run"

# What became of a rank: nothing yet, its own error, the lost connection to another, or an end that was asked for
RUNS, FAILED, DISCONNECTED, ENDED = range(4)

_HEAD = struct.Struct("<8siiii")  # magic, rank, ranks, pid, whether it prints its stacks at a signal
_STATE = struct.Struct("<q32sqdqqd")  # writes, phase, step, since, marks, steps, when the process began its run
_TIMES = struct.Struct("<32d")  # seconds of the last steps
_ERROR = struct.Struct("<idi")  # outcome, when, length of the text that follows
_MAGIC = b"longnet1"
_TEXT = 3072
_STATE_AT = _HEAD.size
_TIMES_AT = _STATE_AT + _STATE.size
_ERROR_AT = _TIMES_AT + _TIMES.size
_SIZE = _ERROR_AT + _ERROR.size + _TEXT
_ATTEMPTS = 100
STEPS = 32


@dataclass(frozen=True)
class Entry:
    """The content of the record of a rank: what `read` returns to the supervisor.

    Attributes:
        rank, ranks, pid: the rank, the number of ranks of the run, and the process.
        prints_stacks: whether the process prints its Python stacks at `SIGQUIT`.
        phase, step: what it is at, and the number of optimizer steps that were complete before.
        since: when it began, by `time.monotonic()`.
        marks: how many phases have begun.
        steps: how many steps of training this process has completed.
        times: seconds of the last steps.
        outcome, failed_at, text: what became of the rank, when, and its own words.
    """

    rank: int
    ranks: int
    pid: int
    prints_stacks: bool
    phase: str
    step: int
    since: float
    marks: int
    steps: int
    times: tuple[float, ...]
    outcome: int
    failed_at: float
    text: str


class Record:
    """The record of this process, in a folder that its supervisor has made.

    `Progress` of the strategy makes it when a Trainer is made, and calls its methods.
    """

    def __init__(self, folder: str | Path, rank: int, ranks: int) -> None:
        path = Path(folder) / f"rank-{rank}"
        unnamed = path.with_name(f".{path.name}-{os.getpid()}")
        unnamed.write_bytes(bytes(_SIZE))
        with unnamed.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _SIZE)
        self._head = (_MAGIC, rank, ranks, os.getpid())
        self._writes = self._marks = self._steps = 0
        self._began = time.monotonic()
        _HEAD.pack_into(self._memory, 0, *self._head, 0)
        self.mark(START, 0)
        unnamed.rename(path)  # so that a reader finds no half of a record

    def print_stacks_at_signal(self) -> None:
        """Say that the process prints its stacks at `SIGQUIT`, once faulthandler does so."""
        _HEAD.pack_into(self._memory, 0, *self._head, 1)

    def mark(self, phase: str, step: int) -> None:
        """Write that a phase begins now, and the number `step` of optimizer steps that are complete."""
        self._marks += 1
        self._writes += 2
        state = (phase.encode(), step, time.monotonic(), self._marks, self._steps, self._began)
        _STATE.pack_into(self._memory, _STATE_AT, self._writes - 1, *state)
        _STATE.pack_into(self._memory, _STATE_AT, self._writes, *state)

    def add_step(self, seconds: float | None) -> None:
        """Count a step of training, and keep how long it took unless something else was part of it."""
        if seconds is not None:
            struct.pack_into("<d", self._memory, _TIMES_AT + 8 * (self._steps % STEPS), seconds)
        self._steps += 1

    def end(self, outcome: int, text: str) -> None:
        """Write what became of the rank: RUNS, FAILED, DISCONNECTED or ENDED, with the error or "".

        `MarkedPhases._end_run` calls it.
        """
        words = text.encode()[:_TEXT]
        place = _ERROR_AT + _ERROR.size
        self._memory[place : place + len(words)] = words
        _ERROR.pack_into(self._memory, _ERROR_AT, outcome, time.monotonic(), len(words))


def place_of(phase: str, step: int) -> str:
    """Return a phase of a step as a part of a sentence, for errors of `NamedFailures` and of the supervisor."""
    if phase == OUTSIDE:
        return phase
    return f"{phase}, step {step}" if phase == BETWEEN else f"in {phase} of step {step}"


def read(folder: Path) -> list[Entry]:
    """Return the records in a folder, in the order of ranks; a `Supervisor` asks whenever it looks at the ranks."""
    entries = [_read(path) for path in folder.glob("rank-*") if path.suffix == ""]
    return sorted((each for each in entries if each is not None), key=lambda each: each.rank)


def _read(path: Path) -> Entry | None:
    """Return the content of one record; None if the file is none."""
    for _ in range(_ATTEMPTS):
        content = path.read_bytes()
        if len(content) < _SIZE or not content.startswith(_MAGIC):
            return None
        writes, phase, step, since, marks, steps, _ = _STATE.unpack_from(content, _STATE_AT)
        if writes % 2 == 0 and content[_STATE_AT:_TIMES_AT] == path.read_bytes()[_STATE_AT:_TIMES_AT]:
            break  # else it is being written, or the rank was stopped while it wrote, and stays as it is
    _, rank, ranks, pid, prints_stacks = _HEAD.unpack_from(content)
    times = tuple(each for each in _TIMES.unpack_from(content, _TIMES_AT) if each > 0)
    outcome, failed_at, length = _ERROR.unpack_from(content, _ERROR_AT)
    place = _ERROR_AT + _ERROR.size
    text = content[place : place + length].decode(errors="replace")
    name = phase.rstrip(b"\0").decode(errors="replace")
    return Entry(
        rank, ranks, pid, bool(prints_stacks), name, step, since, marks, steps, times, outcome, failed_at, text
    )
