"""Agreement of ranks: a fault of one rank becomes an error on all of them, so that none waits for the others."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class Strategy(Protocol):
    """The part of a Lightning strategy that `fault_of_rank_zero` calls."""

    @property
    def is_global_zero(self) -> bool: ...

    def broadcast(self, obj: Any, src: int = 0) -> Any: ...


def fault_of(check: Callable[[], Any]) -> str:
    """Return the message of the ValueError or OSError that a check raises, or an empty string.

    A rank that raised at once would leave the others waiting for it; with the message it can agree first.
    """
    try:
        check()
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def fault_of_rank_zero(strategy: Strategy, attempt: Callable[[], str]) -> str:
    """Return on all ranks the fault that an attempt of rank 0 returns, or an empty string."""
    fault: str = strategy.broadcast(attempt() if strategy.is_global_zero else "")
    return fault


def check_same_batch(
    digest: int,
    fault: str,
    sequence_group: dist.ProcessGroup,
    data_group: dist.ProcessGroup,
    data_position: tuple[int, int],
) -> None:
    """Raise a ValueError on all ranks where one has a fault, or where ranks that share sequences differ in `digest`.

    Args:
        digest: the digest of this rank's batch.
        fault: the message of what is wrong with it; "" where nothing is.
        sequence_group: the ranks that must have the same digest.
        data_group: the ranks that raise for faults in other sequence groups.
        data_position: (data_parallel_rank, data_parallel_size) of this rank.
    """
    digests, faults = all_gather(torch.tensor([digest, bool(fault)]), sequence_group).T.tolist()
    others = [rank for rank, theirs in enumerate(digests) if theirs != digests[0]]
    state = torch.tensor([digests[0], any(faults) or bool(others)])
    first_digests, wrong_groups = all_gather(state, data_group).T.tolist()
    if fault:
        raise ValueError(fault)
    if others:
        raise ValueError(batch_difference(others, data_position))
    if any(wrong_groups):
        raise ValueError(other_group_fault(wrong_groups.index(1)))
    warn_of_same_batch(first_digests)


def batch_difference(others: list[int], data_position: tuple[int, int], detail: str = "") -> str:
    """Return the message for a sequence group whose ranks `others` hold other batches than its first rank."""
    return (
        f"ranks that share sequences must be given the same batches, and ranks {', '.join(map(str, others))} of "
        f"the sequence group hold others than rank 0{detail}: a sampler or an iterable dataset must go by "
        f"data_parallel_rank ({data_position[0]} of {data_position[1]} here), not by the rank among all"
    )


def other_group_fault(group: int) -> str:
    """Return the message for a rank without a fault, where the ranks of data-parallel group `group` have one."""
    return f"the ranks of data_parallel_rank {group} were given a batch that does not fit: their own messages say why"


def warn_of_same_batch(digests: list[int]) -> None:
    """Warn on rank 0 if there are several data-parallel groups and the digests of their batches are all equal."""
    if len(digests) > 1 and len(set(digests)) == 1 and dist.get_rank() == 0:
        warnings.warn(
            f"all {len(digests)} data-parallel groups were given the same batch: a custom sampler or iterable dataset "
            f"must go by data_parallel_rank, or samples count {len(digests)} times",
            stacklevel=2,
        )


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the x of each rank of a group, (ranks, *x.shape), on the CPU; its shape must be equal on all ranks."""
    x = x.to(device_of(group))
    parts = x.new_empty((dist.get_world_size(group), *x.shape))
    dist.all_gather(list(parts.unbind()), x, group=group)
    return parts.cpu()


def device_of(group: dist.ProcessGroup) -> torch.device:
    """Return the device of the tensors that a group takes."""
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
