"""How long a rank waits for the others: minutes inside of a step, longer for the first, for saves and between steps."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout, _world


class Timeouts:
    """The timeouts of all groups of this rank.

    Args:
        long: seconds outside of steps, in the first step, and in that after a validation or a save, when other ranks
            may still be at work.
        short: seconds inside of the other steps.
    """

    def __init__(self, long: float, short: float) -> None:
        self.long, self.short = long, min(long, short)
        self.kept: list[dist.ProcessGroup] = []  # groups with messages between steps, which keep the long timeout
        self._steps = 0  # since ranks did something else
        self._is_short = False

    def begin_step(self) -> None:
        """Set what fits a step of training."""
        self._steps += 1
        if self._steps > 1 and not self._is_short:
            self._is_short = True
            self._set(self.short)

    def end_step(self) -> None:
        """Set what fits the time between steps."""
        if self._is_short:
            self._is_short = False
            self._set(self.long)

    def interrupt(self) -> None:
        """Set what fits all else; the next step counts as the first."""
        self._steps = 0
        self.end_step()

    def _set(self, seconds: float) -> None:
        if self.short == self.long or not dist.is_initialized():
            return
        if not any(name in dist.get_backend() for name in ("gloo", "nccl")):
            return
        for group in list(_world.pg_map):
            if group not in self.kept:
                _set_pg_timeout(timedelta(seconds=seconds), group)
