"""The mesh of ranks: sequences are split along one axis, batches along the other."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

DATA, SEQUENCE = "data_parallel", "sequence_parallel"


def checked_sequence_size(ranks: int, sequence_parallel_size: int | None) -> int:
    """Return how many ranks share a sequence, all of them by default; a ValueError names the sizes that are allowed."""
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
    """Make a mesh of all ranks with the axes "data_parallel" and "sequence_parallel"; all ranks call it together.

    Consecutive ranks share a sequence.  Each axis has separate groups, whose messages never mix with those of the
    group of all ranks.

    Args:
        sequence_parallel_size: how many ranks share a sequence; all of them by default.
        device_type: "cpu" or "cuda".
        timeout: seconds after which a rank that waits for another gives up.
    """
    world = dist.get_world_size()
    size = checked_sequence_size(world, sequence_parallel_size)
    ranks = torch.arange(world).view(world // size, size)
    groups = [_group_of(rows, timeout) for rows in (ranks.T.tolist(), ranks.tolist())]
    return DeviceMesh.from_group(groups, device_type, mesh=ranks, mesh_dim_names=(DATA, SEQUENCE))


def _group_of(rows: list[list[int]], timeout: float) -> dist.ProcessGroup:
    """Make a group of each row of ranks, as all ranks must, and return the one that holds this rank."""
    own = None
    for row in rows:
        group = dist.new_group(row, timeout=timedelta(seconds=timeout))
        if dist.get_rank() in row:
            own = group
    assert isinstance(own, dist.ProcessGroup)
    return own
