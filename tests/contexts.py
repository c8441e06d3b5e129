"""A context of ranks that are connected already."""

from functools import cache

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lightning_longnet import SequenceContext


def made(group, placement="contiguous"):
    """Return a context of this world, whose ranks all share a sequence."""
    return SequenceContext(mesh_of(group), placement=placement)


@cache  # as each new group keeps sockets and threads
def mesh_of(group):
    ranks = dist.get_process_group_ranks(group)
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    return DeviceMesh.from_group(
        [alone, group], "cpu", mesh=torch.tensor([ranks]), mesh_dim_names=("data_parallel", "sequence_parallel")
    )
