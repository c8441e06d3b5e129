"""The device mesh of all ranks: sequences are split along one axis, batches along the other."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

DATA, SEQUENCE = "data_parallel", "sequence_parallel"


def checked_sequence_size(ranks: int, sequence_parallel_size: int | None) -> int:
    """Return `sequence_parallel_size`, or `ranks` if it is None, after checking that it divides the number of ranks.

    A ValueError names the sizes that are allowed.  `SequenceRanks._configure_launcher` calls it before it starts
    processes, `sequence_mesh`, and `Job` of `longnet plan`.
    """
    size = ranks if sequence_parallel_size is None else sequence_parallel_size
    valid = [n for n in range(1, ranks + 1) if ranks % n == 0]
    if not isinstance(size, int) or isinstance(size, bool) or size not in valid:
        raise ValueError(
            f"sequence_parallel_size must divide the {ranks} ranks, one of {', '.join(map(str, valid))}, got {size!r}"
        )
    return size


def sequence_mesh(
    sequence_parallel_size: int | None = None, device_type: str = "cpu", timeout: float = 1800.0
) -> DeviceMesh:
    """Make a mesh of all ranks with the axes "data_parallel" and "sequence_parallel", for a `SequenceContext`.

    All ranks call it together, after `torch.distributed.init_process_group`: a training loop without the strategy does.
    The strategy does it by itself when the ranks are connected, and the `Ranks` of a command that scores or embeds
    texts.  Consecutive ranks share a sequence.  Each axis has new process groups, so that the messages of attention
    never mix with those of other collectives.

    Args:
        sequence_parallel_size: how many ranks share a sequence; all of them by default.
        device_type: "cpu" or "cuda".
        timeout: seconds after which a rank that waits for another raises an error.
    """
    world = dist.get_world_size()
    size = checked_sequence_size(world, sequence_parallel_size)
    ranks = torch.arange(world).view(world // size, size)
    groups = [_group_of(rows, timeout) for rows in (ranks.T.tolist(), ranks.tolist())]
    return DeviceMesh.from_group(groups, device_type, mesh=ranks, mesh_dim_names=(DATA, SEQUENCE))


def _group_of(rows: list[list[int]], timeout: float) -> dist.ProcessGroup:
    """Make a process group of each row of ranks, and return the one that this rank is in.

    All ranks make all groups: torch requires it of `new_group`.
    """
    own = None
    for row in rows:
        group = dist.new_group(row, timeout=timedelta(seconds=timeout))
        if dist.get_rank() in row:
            own = group
    assert isinstance(own, dist.ProcessGroup)
    return own
