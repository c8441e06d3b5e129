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
    """Return the message of the ValueError that a check raises, or an empty string.

    A rank that raised at once would leave the others waiting for it; with the message it can agree first.
    """
    try:
        check()
    except ValueError as error:
        return str(error)
    return ""


def fault_of_rank_zero(strategy: Strategy, attempt: Callable[[], str]) -> str:
    """Return on all ranks the fault that an attempt of rank 0 returns, or an empty string."""
    fault: str = strategy.broadcast(attempt() if strategy.is_global_zero else "")
    return fault


def check_same_batch(
    number: int, fault: str, sequence_group: dist.ProcessGroup, data_group: dist.ProcessGroup, place: tuple[int, int]
) -> None:
    """Raise a ValueError on all ranks where one has a fault, or where ranks that share sequences differ in `number`.

    Args:
        number: the digest of this rank's batch.
        fault: what is wrong with it; "" where nothing is.
        sequence_group: the ranks that must have the same number.
        data_group: the ranks that hear of faults in other sequence groups.
        place: this rank's data_parallel_rank, and how many there are.
    """
    numbers, faults = all_gather(torch.tensor([number, bool(fault)]), sequence_group).T.tolist()
    others = [rank for rank, each in enumerate(numbers) if each != numbers[0]]
    state = torch.tensor([numbers[0], any(faults) or bool(others)])
    firsts, wrong = all_gather(state, data_group).T.tolist()
    if fault:
        raise ValueError(fault)
    if others:
        raise ValueError(batch_difference(others, place))
    if any(wrong):
        raise ValueError(other_group_fault(wrong.index(1)))
    warn_of_same_batch(firsts)


def batch_difference(others: list[int], place: tuple[int, int], detail: str = "") -> str:
    """Return the message where ranks of the sequence group hold other batches than its first."""
    return (
        f"ranks that share sequences must be given the same batches, and ranks {', '.join(map(str, others))} of "
        f"the sequence group hold others than rank 0{detail}: a sampler or an iterable dataset must go by "
        f"data_parallel_rank ({place[0]} of {place[1]} here), not by the rank among all"
    )


def other_group_fault(group: int) -> str:
    """Return the message for the ranks of a group where those of another have a fault."""
    return f"the ranks of data_parallel_rank {group} were given a batch that does not fit: their own messages say why"


def warn_of_same_batch(firsts: list[int]) -> None:
    """Warn on rank 0 where all data-parallel groups, of which there are several, have the same digest."""
    if len(firsts) > 1 and len(set(firsts)) == 1 and dist.get_rank() == 0:
        warnings.warn(
            f"all {len(firsts)} data-parallel groups were handed the same batch: a sampler or an iterable dataset of "
            f"your own must go by data_parallel_rank, or samples count {len(firsts)} times",
            stacklevel=2,
        )


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the x of each rank of a group, (ranks, *x.shape), on the CPU; shapes must be equal."""
    x = x.to(device_of(group))
    parts = x.new_empty((dist.get_world_size(group), *x.shape))
    dist.all_gather(list(parts.unbind()), x, group=group)
    return parts.cpu()


def device_of(group: dist.ProcessGroup) -> torch.device:
    """Return the device of the tensors that a group takes."""
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
