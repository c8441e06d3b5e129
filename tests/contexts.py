"""A context of ranks that are connected already."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lightning_longnet import SequenceContext


def made(group, placement="contiguous"):
    """Return a context of this world, whose ranks all share a sequence."""
    ranks = dist.get_process_group_ranks(group)
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    mesh = DeviceMesh.from_group(
        [alone, group], "cpu", mesh=torch.tensor([ranks]), mesh_dim_names=("data_parallel", "sequence_parallel")
    )
    return SequenceContext(mesh, placement=placement)
