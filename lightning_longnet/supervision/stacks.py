"""The Python stacks of ranks that stand still, and what they tell of who waits for whom."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from typing import TYPE_CHECKING

from lightning_longnet.supervision.processes import state_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lightning_longnet.supervision.record import Entry

SIGNAL = signal.SIGQUIT
_PATIENCE = 2.0  # seconds for a stack to be printed
_LINES = 12
_FRAME = re.compile(r'  File "(?P<file>.*)", line \d+ in (?P<function>\S+)')
_WAITS = ("torch/distributed/", "lightning_longnet/attention/parallel/comm.py")
_NEUTRAL = ("torch/_ops.py", "torch/_C/", "torch/utils/", "torch/nn/", "torch/autograd/function.py")
_BACKWARD = "torch/autograd/graph.py"  # whose compiled part may wait, or compute


def path_of(folder: Path, rank: int) -> Path:
    """Return the file that a rank prints its stacks to; `Progress.connect` opens it."""
    return folder / f"stacks-{rank}"


def collect(folder: Path, entries: Sequence[Entry]) -> dict[int, str]:
    """Have ranks print their stacks, and return that of the main thread of each rank that does so in time.

    A `Supervisor` calls it if ranks stand still, before it ends them.
    """
    asked = [each for each in entries if each.prints_stacks and state_of(each.pid) in ("R", "S")]
    sizes = {each.rank: _size(path_of(folder, each.rank)) for each in asked}
    for each in asked:
        with contextlib.suppress(ProcessLookupError):
            os.kill(each.pid, SIGNAL)
    limit, stacks = time.monotonic() + _PATIENCE, dict[int, str]()
    while len(stacks) < len(asked) and time.monotonic() < limit:
        time.sleep(0.1)
        for rank, size in sizes.items():
            path = path_of(folder, rank)
            if rank not in stacks and _size(path) > size:
                time.sleep(0.1)  # the rest of what is being written
                stacks[rank] = main_thread(path.read_bytes()[size:].decode(errors="replace"))
    return stacks


def at_its_end(folder: Path, rank: int) -> str:
    """Return the stack of the main thread of a rank that its own fault has ended, such as a segmentation fault.

    It is "" for another end.  A `Supervisor` asks for each rank that failed.
    """
    path = path_of(folder, rank)
    _, fatal, stack = (path.read_text(errors="replace") if path.exists() else "").partition("Fatal Python error")
    return main_thread(stack) if fatal else ""


def main_thread(text: str) -> str:
    """Return the part of a print of all stacks that is of the main thread, which is the oldest and comes last."""
    blocks = [block for block in text.split("\n\n") if _FRAME.search(block)]
    lines = blocks[-1].strip("\n").splitlines() if blocks else []
    return "\n".join(lines[:_LINES])


def waits(stack: str) -> bool | None:
    """Whether the newest frames of a stack wait for other ranks; None where they may."""
    for match in _FRAME.finditer(stack):
        name = match["file"]
        if any(each in name for each in _WAITS):
            return True
        if name.endswith(_BACKWARD):
            return None
        if not any(each in name for each in _NEUTRAL):
            return False
    return None


def culprits(entries: Sequence[Entry], stacks: dict[int, str]) -> list[int]:
    """Return the ranks that the others seem to wait for, or all where nothing distinguishes them.

    A rank without a stack cannot print one, which those that only wait can.  A `Supervisor` asks if ranks stand still,
    and no signal has stopped one.
    """
    verdicts = {each.rank: waits(stacks[each.rank]) if each.rank in stacks else False for each in entries}
    for answer in (False, None):
        ranks = [rank for rank, verdict in verdicts.items() if verdict is answer]
        if ranks and len(ranks) < len(verdicts):
            return ranks
    least = min((each.step, each.marks) for each in entries)
    behind = [each.rank for each in entries if (each.step, each.marks) == least]
    return behind if len(behind) < len(verdicts) else list(verdicts)


def _size(path: Path) -> int:
    """Return the bytes of a file; 0 if there is none."""
    return path.stat().st_size if path.exists() else 0
