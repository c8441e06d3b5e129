"""The timeouts of a rank that waits for others: minutes in a step, longer in the first, in saves and between steps."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout, _world

from lightning_longnet.attention.parallel.comm import timeout_of


class Timeouts:
    """The timeouts of all groups of this rank.

    Args:
        short: seconds inside of a step, for groups that were made with more.  The first step, and that after a
            validation or a save, when other ranks may still be at work, keep what groups were made with.
    """

    def __init__(self, short: float) -> None:
        self.short = timedelta(seconds=short)
        self.kept: list[dist.ProcessGroup] = []  # groups with messages between steps, which keep the long timeout
        self._steps = 0  # since ranks did something else
        self._own: dict[dist.ProcessGroup, timedelta] = {}  # the timeouts of groups that have the short one now

    def shorten(self) -> None:
        """Set the short timeout for a step of training, unless it is the first since ranks did something else."""
        self._steps += 1
        if self._steps > 1 and not self._own:
            for group in _groups():
                own = timeout_of(group)
                if group not in self.kept and own > self.short:
                    self._own[group] = own
                    _set_pg_timeout(self.short, group)

    def restore(self) -> None:
        """Set the timeouts that groups were made with, for the time between steps."""
        for group, own in self._own.items():
            if group in _world.pg_map:  # a group that is not there was destroyed
                _set_pg_timeout(own, group)
        self._own.clear()

    def interrupt(self) -> None:
        """Set the timeouts that groups were made with; the next step counts as the first."""
        self._steps = 0
        self.restore()


def _groups() -> list[dist.ProcessGroup]:
    """Return the groups of this rank whose timeouts can be set."""
    if not dist.is_initialized():
        return []
    return [group for group in _world.pg_map if dist.get_backend(group) in ("gloo", "nccl")]
