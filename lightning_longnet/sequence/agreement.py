"""Agreement of ranks: an error on one rank is raised on all of them, so that no rank waits in a collective for it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class Strategy(Protocol):
    """The part of a Lightning strategy that `fault_of_rank_zero` calls.

    `is_global_zero` is True on rank 0 of all alone.  `broadcast` returns on all ranks, which call it together, the
    object that rank `src` has.
    """

    @property
    def is_global_zero(self) -> bool: ...

    def broadcast(self, obj: Any, src: int = 0) -> Any: ...


def fault_of(check: Callable[[], Any]) -> str:
    """Call `check`, and return the message of the ValueError or OSError that it raises, or "" if it raises none.

    A rank that raised the error at once would leave the others waiting in their next collective.  Callers therefore
    send the message to the other ranks first, as by `fault_of_rank_zero` or `check_same_batch`, and then all raise it:
    `BatchSplitter.fault_of`, DeepSpeed's `_load_from`, `CausalLMCheckpoints.save_pretrained`, and `stream`,
    `encode_cached` and `save_cache` of inference.
    """
    try:
        check()
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def fault_of_rank_zero(strategy: Strategy, attempt: Callable[[], str]) -> str:
    """Call `attempt` on rank 0 alone, and return on all ranks the message that it returns there.

    All ranks call this together: the strategies when they load a checkpoint (`CheckpointSaves.load_checkpoint`,
    DeepSpeed's `_load_from` and `_load`), `CausalLMCheckpoints.save_pretrained`, and `Preemption` when it requeues a
    job.  The message says what failed, and is "" if nothing did: the caller raises it.
    """
    fault: str = strategy.broadcast(attempt() if strategy.is_global_zero else "")
    return fault


def check_same_batch(
    digest: int,
    fault: str,
    sequence_group: dist.ProcessGroup,
    data_group: dist.ProcessGroup,
    data_position: tuple[int, int],
) -> None:
    """Raise a ValueError on all ranks if one rank has a wrong batch, or ranks that share sequences have unequal ones.

    All ranks call this together: `SequenceContext.check_same` does.

    Args:
        digest: the hash of this rank's batch, by `lightning_longnet.sequence.batches.digest`.
        fault: the message of what is wrong with the batch of this rank; "" if nothing is.
        sequence_group: the ranks that share sequences with this one, and must have the same hash.
        data_group: one rank of each sequence group, so that an error in one of these groups is raised in all.
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
    """Return the error message for a sequence group in which some ranks hold another batch than the first rank.

    The ranks of that group raise it, in `check_same_batch` and in `BatchComparison.check`; those of other groups raise
    `other_group_fault`.

    Args:
        others: the numbers of these ranks in their sequence group.
        data_position: (data_parallel_rank, data_parallel_size) of this rank.
        detail: words about the difference, which the message has after "rank 0".
    """
    return (
        f"ranks that share sequences must be given the same batches, and ranks {', '.join(map(str, others))} of "
        f"the sequence group hold others than rank 0{detail}: a sampler or an iterable dataset must go by "
        f"data_parallel_rank ({data_position[0]} of {data_position[1]} here), not by the rank among all"
    )


def other_group_fault(group: int) -> str:
    """Return the error message for a rank whose batch is right, where that of data_parallel_rank `group` is wrong.

    `BatchComparison.check` raises it before a step, and `check_same_batch`.
    """
    return f"the ranks of data_parallel_rank {group} were given a batch that does not fit: their own messages say why"


def warn_of_same_batch(digests: list[int]) -> None:
    """Warn on rank 0 if there are several data-parallel groups and all of them were given the same batch.

    `BatchComparison.check` calls it for the first batch of a loop, and `check_same_batch`.

    Args:
        digests: the hash of the batch of each data-parallel group.
    """
    if len(digests) > 1 and len(set(digests)) == 1 and dist.get_rank() == 0:
        warnings.warn(
            f"all {len(digests)} data-parallel groups were given the same batch: a custom sampler or iterable dataset "
            f"must go by data_parallel_rank, or samples count {len(digests)} times",
            stacklevel=2,
        )


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the x of each rank of a group, (ranks, *x.shape), on the CPU.

    All ranks of the group call it together, with an x of the same shape and dtype on any device: `check_same_batch`,
    the strategy's `check_predicted_batches`, `check_anomaly` and `MemoryCheck.check`, and `everywhere` of the
    callbacks.
    """
    x = x.to(device_of(group))
    parts = x.new_empty((dist.get_world_size(group), *x.shape))
    dist.all_gather(list(parts.unbind()), x, group=group)
    return parts.cpu()


def device_of(group: dist.ProcessGroup) -> torch.device:
    """Return the device on which the collectives of a group need their tensors: CUDA for NCCL, else the CPU.

    `BatchComparison`, `Preemption`, the `Ranks` of an evaluation and the split check ask, and `all_gather`.
    """
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
