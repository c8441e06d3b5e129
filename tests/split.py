"""A step of attention over ranks, and the same in one process."""

import torch
from cells import held

from lightning_longnet import Pattern, SequenceShard, attend

LONGNET = Pattern.dilated((16, 64, 256), (1, 2, 4), is_causal=True)


def step(group, tensors, placement, ids, hidden, settings, dtype):
    """One rank's forward and backward: (out, lse, dq, dk, dv, bytes sent, messages)."""
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
    found = torch.autograd.grad(out, leaves, grad)
    return *(x.detach() for x in (out, lse, *found)), shard.comm.sent_bytes, shard.comm.messages


def whole(tensors, pattern, placement, **settings):
    """What one process gives, in the order in which ranks hold tokens: out, dq, dk, dv."""
    leaves = [x.clone().requires_grad_() for x in tensors[:3]]
    out = attend(*leaves, pattern, **settings)
    order = torch.cat([held(placement, rank) for rank in range(placement.ranks)])
    return [x[:, order] for x in (out, *torch.autograd.grad(out, leaves, tensors[3]))]


def side_by_side(found):
    """The same, of what each rank gave."""
    return [torch.cat([(each[0], *each[2:5])[i] for each in found], 1) for i in range(4)]
