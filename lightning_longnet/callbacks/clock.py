"""Timing of steps without waiting for a GPU: its events are read when figures are logged."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import torch


class StepClock:
    """Measures the seconds of each optimizer step, without pauses such as a validation; `TokenThroughput` has one.

    Args:
        device: the device of this rank; on CUDA the times are those of its events.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def start(self) -> None:
        """Mark the begin of the first step."""
        self._marks = [("step", self._now())]

    def step(self) -> None:
        """Mark the end of a step."""
        self._marks.append(("step", self._now()))

    def pause(self) -> None:
        """Mark the begin of a pause, which does not count."""
        self._marks.append(("pause", self._now()))

    def resume(self) -> None:
        """Mark the end of a pause."""
        self._marks.append(("resume", self._now()))

    def seconds(self) -> list[float]:
        """Return the seconds of each step since the last call; this method alone waits for the GPU.

        `TokenThroughput` calls it at logging steps.
        """
        marks, steps = self._marks, []
        if not marks:
            return []
        if self._on_gpu:
            marks[-1][1].synchronize()
        begin, away, paused = marks[0][1], 0.0, None
        last = 0
        for at, (kind, stamp) in enumerate(marks[1:], 1):
            if kind == "pause":
                paused = stamp
            elif kind == "resume" and paused is not None:
                away += self._between(paused, stamp)
                paused = None
            elif kind == "step":
                steps.append(self._between(begin, stamp) - away)
                begin, away, last = stamp, 0.0, at
        self._marks = marks[last:]
        return steps

    def _now(self) -> Any:
        """Return a time stamp: seconds, or a recorded event of the GPU."""
        if not self._on_gpu:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, begin: Any, end: Any) -> float:
        """Return the seconds between two time stamps of `_now`."""
        return float(begin.elapsed_time(end)) / 1e3 if self._on_gpu else end - begin
