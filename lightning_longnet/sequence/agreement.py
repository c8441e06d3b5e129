"""Ranks tell each other what they were given, so that a fault of one is an error on all of them."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Callable


def fault_of(check: Callable[[], Any]) -> str:
    """What a check says is wrong, said rather than raised: the other ranks wait to be told."""
    try:
        check()
    except ValueError as error:
        return str(error)
    return ""


def compare(
    number: int, fault: str, sequence_group: dist.ProcessGroup, data_group: dist.ProcessGroup, place: tuple[int, int]
) -> None:
    """A ValueError on all ranks where one has a fault, or where those that share sequences have unequal numbers.

    `place`: this rank's data_parallel_rank, and how many there are.
    """
    numbers, faults = gathered([number, bool(fault)], sequence_group)
    others = [rank for rank, each in enumerate(numbers) if each != numbers[0]]
    firsts, wrong = gathered([numbers[0], any(faults) or bool(others)], data_group)
    if fault:
        raise ValueError(fault)
    if others:
        raise ValueError(
            f"ranks that share sequences must be given the same batches, and ranks {', '.join(map(str, others))} of "
            f"the sequence group hold others than rank 0: a sampler or an iterable dataset must go by "
            f"data_parallel_rank ({place[0]} of {place[1]} here), not by the rank among all"
        )
    if any(wrong):
        raise ValueError(
            f"the ranks of data_parallel_rank {wrong.index(1)} were given a batch that does not fit: their own "
            f"messages say why"
        )
    if len(firsts) > 1 and len(set(firsts)) == 1 and dist.get_rank() == 0:
        warnings.warn(
            f"all {len(firsts)} data-parallel groups were handed the same batch: a sampler or an iterable dataset of "
            f"your own must go by data_parallel_rank, or samples count {len(firsts)} times",
            stacklevel=2,
        )


def gathered(own: list[int], group: dist.ProcessGroup) -> list[list[int]]:
    """Of each number its values on the ranks of a group."""
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    told = torch.tensor(own, dtype=torch.int64, device=device)
    found = [torch.empty_like(told) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, told, group=group)
    columns: list[list[int]] = torch.stack(found, 1).tolist()
    return columns
