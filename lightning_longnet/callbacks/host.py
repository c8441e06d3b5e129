"""What ranks tell each other on the host, where nobody waits for what a GPU does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def host_group(trainer: Trainer) -> dist.ProcessGroup | None:
    """All ranks, over gloo where it can be had; None where there is one.  All ranks make it together."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_backend() == "fake":
        return None
    if dist.get_backend() == "gloo" or not dist.is_gloo_available():
        return dist.group.WORLD
    timeout = getattr(trainer.strategy, "_timeout", None)
    found = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(found, dist.ProcessGroup)
    return found


def device_of(group: dist.ProcessGroup, trainer: Trainer) -> torch.device:
    return torch.device("cpu") if dist.get_backend(group) == "gloo" else trainer.strategy.root_device


def everywhere(own: list[float], group: dist.ProcessGroup | None, trainer: Trainer) -> torch.Tensor:
    """(ranks, numbers) in float64, of lists that are as long on all ranks."""
    numbers = torch.tensor(own, dtype=torch.float64)
    if group is None:
        return numbers[None]
    numbers = numbers.to(device_of(group, trainer))
    found = numbers.new_empty((dist.get_world_size(group), len(own)))
    dist.all_gather(list(found.unbind()), numbers, group=group)
    return found.cpu()
