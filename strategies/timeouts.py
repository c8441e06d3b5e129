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
        self._has_stepped = False  # whether the optimizer has stepped since the last `interrupt`
        self._shortened: dict[dist.ProcessGroup, timedelta] = {}  # groups with the short timeout now, with their own

    def shorten(self) -> None:
        """Set the short timeout, unless the optimizer has not stepped since the last `interrupt`.

        `MarkedPhases.training_step` calls it for each micro-batch: of those of the first step, the last one may be the
        first that reduces gradients.
        """
        if self._has_stepped and not self._shortened:
            for group in _groups():
                own = timeout_of(group)
                if group not in self.kept and own > self.short:
                    self._shortened[group] = own
                    _set_pg_timeout(self.short, group)

    def end_step(self) -> None:
        """Set the timeouts that groups were made with again; the next step may have the short one.

        `MarkedPhases.optimizer_step` calls it after the optimizer's step, for the time between steps.
        """
        self._has_stepped = True
        self._restore()

    def interrupt(self) -> None:
        """Set the timeouts that groups were made with again, which the next training step keeps, too.

        `MarkedPhases` calls it before set-up, a load, a save, a validation, a test or a prediction, and at the end of
        training.
        """
        self._has_stepped = False
        self._restore()

    def _restore(self) -> None:
        """Set the timeouts again that `shorten` has changed."""
        for group, own in self._shortened.items():
            if group in _world.pg_map:  # a group that is not there was destroyed
                _set_pg_timeout(own, group)
        self._shortened.clear()


def _groups() -> list[dist.ProcessGroup]:
    """Return the process groups of this rank whose timeouts can be set: those of gloo and NCCL."""
    if not dist.is_initialized():
        return []
    return [group for group in _world.pg_map if dist.get_backend(group) in ("gloo", "nccl")]
