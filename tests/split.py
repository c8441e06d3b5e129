"""A step of attention over ranks, and the same in one process."""

import torch
from cells import held

from lightning_longnet import Pattern, SequenceShard, attend

LONGNET = Pattern.dilated((16, 64, 256), (1, 2, 4), is_causal=True)


def step(group, tensors, placement, ids, hidden, settings, dtype):
    """Return (out, lse, dq, dk, dv, bytes sent, messages) of one rank's forward and backward."""
    at = held(placement, group.rank())
    q, k, v, grad = (x[:, at].to(dtype) for x in tensors)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    shard = SequenceShard(
        group,
        len(at),
        placement.kind,
        None if ids is None else ids[..., at],
        None if hidden is None else hidden[:, at],
    )
    out, lse = attend(*leaves, shard=shard, return_lse=True, **settings)
    gradients = torch.autograd.grad(out, leaves, grad)
    return *(x.detach() for x in (out, lse, *gradients)), shard.comm.sent_bytes, shard.comm.messages


def whole(tensors, pattern, placement, **settings):
    """Return out, dq, dk and dv of one process, in the order in which ranks hold tokens."""
    leaves = [x.clone().requires_grad_() for x in tensors[:3]]
    out = attend(*leaves, pattern, **settings)
    order = torch.cat([held(placement, rank) for rank in range(placement.ranks)])
    return [x[:, order] for x in (out, *torch.autograd.grad(out, leaves, tensors[3]))]


def side_by_side(per_rank):
    """Return the same from the results of all ranks."""
    return [torch.cat([(each[0], *each[2:5])[i] for each in per_rank], 1) for i in range(4)]
