"""The timeouts of process groups: short inside of a training step, longer in the first one and between steps."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout, _world

from lightning_longnet.attention.parallel.comm import timeout_of


class Timeouts:
    """Sets the timeouts of all process groups of this rank; `MarkedPhases` calls its methods.

    Args:
        short: seconds inside of a training step, for groups that were made with more.  In the first step, and in that
            after a validation or a save, when other ranks may still be at work, groups have the timeout that they were
            made with.
    """

    def __init__(self, short: float) -> None:
        self.short = timedelta(seconds=short)
        self.kept: list[dist.ProcessGroup] = []  # groups with messages between steps, which keep the long timeout
        self._steps = 0  # since ranks did something else
        self._own: dict[dist.ProcessGroup, timedelta] = {}  # the timeouts of groups that have the short one now

    def shorten(self) -> None:
        """Set the short timeout, before a training step, unless it is the first since the last `interrupt`.

        `MarkedPhases.training_step` calls it.
        """
        self._steps += 1
        if self._steps > 1 and not self._own:
            for group in _groups():
                own = timeout_of(group)
                if group not in self.kept and own > self.short:
                    self._own[group] = own
                    _set_pg_timeout(self.short, group)

    def restore(self) -> None:
        """Set the timeouts that groups were made with again, after the optimizer's step, for the time between steps."""
        for group, own in self._own.items():
            if group in _world.pg_map:  # a group that is not there was destroyed
                _set_pg_timeout(own, group)
        self._own.clear()

    def interrupt(self) -> None:
        """Set the timeouts that groups were made with again, before a validation or a save, say.

        The next training step keeps them, too.
        """
        self._steps = 0
        self.restore()


def _groups() -> list[dist.ProcessGroup]:
    """Return the process groups of this rank whose timeouts can be set: those of gloo and NCCL."""
    if not dist.is_initialized():
        return []
    return [group for group in _world.pg_map if dist.get_backend(group) in ("gloo", "nccl")]
