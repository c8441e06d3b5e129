"""Communication of ranks on the host, which does not wait for what a GPU computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from lightning_longnet.sequence.agreement import all_gather

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def host_group(trainer: Trainer) -> dist.ProcessGroup | None:
    """Return a process group of all ranks whose collectives run on the host, by gloo; None without torch.distributed.

    `Monitor`, `NonFiniteGuard` and `Preemption` call it on all ranks together, at the start of training or of `fit`.
    With gloo as the backend, and if torch has no gloo, it is the default group; else a new one.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_backend() == "fake":
        return None
    if dist.get_backend() == "gloo" or not dist.is_gloo_available():
        return dist.group.WORLD
    timeout = getattr(trainer.strategy, "_timeout", None)
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)
    return group


def everywhere(own: list[float], group: dist.ProcessGroup | None) -> torch.Tensor:
    """Return the numbers of each rank, (ranks, len(own)) in float64 on the CPU.

    All ranks of the group call it together, with equally many numbers: the last `Monitor` of a Trainer does at logging
    steps.

    Args:
        own: the numbers of this rank.
        group: what `host_group` returned.
    """
    numbers = torch.tensor(own, dtype=torch.float64)
    return numbers[None] if group is None else all_gather(numbers, group)
