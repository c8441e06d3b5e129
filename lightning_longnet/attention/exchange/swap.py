"""Ranks trade tokens for heads: each then holds the whole sequence of its heads, and needs no other key."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from lightning_longnet.attention.exchange.blocks import merge, no_keys, readable_lse, rounded, spread
from lightning_longnet.attention.exchange.keys import OwnKeys
from lightning_longnet.attention.partial import Partial

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lightning_longnet.attention.exchange.blocks import Terms
    from lightning_longnet.attention.exchange.comm import Comm, Errand
    from lightning_longnet.attention.kernels import BlockKernel
    from lightning_longnet.attention.placement import Placement
    from lightning_longnet.attention.routes import Part


def refusal(ranks: int, kv_heads: int) -> str:
    """Why heads cannot be traded, or nothing."""
    if kv_heads % ranks:
        return f"swap needs key heads that {ranks} ranks divide, got {kv_heads}"
    return ""


class Swap(NamedTuple):
    """`parts` and `terms` are those of this rank's heads over the whole sequence."""

    comm: Comm
    errand: Errand
    placement: Placement
    parts: tuple[Part, ...]
    terms: Terms
    kernel: BlockKernel
    wants_lse: bool

    def forward(self, q: Tensor, k: Tensor, v: Tensor, branches: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Out, lse (nothing in it, where nobody wants it), and what the backward is to be given."""
        rows = q
        q, k, v = _heads(self, (q, k, v), "queries, keys and values")
        totals = [no_keys(q, v) for _ in range(branches)]
        merge(self.kernel, self.parts, q, OwnKeys(k, v, self.terms.hidden, self.terms.key_words()), self.terms, totals)
        whole = Partial(*(x.clone() for x in totals[0])) if branches > 1 else totals[0]
        for each in totals[1:]:
            whole.add_(*each)
        out, lse = rounded(whole, q)
        (own,) = _rows(self, (out,), "out")
        own_lse = whole.lse.new_empty((len(rows), rows.shape[2], rows.shape[1]))
        if self.wants_lse:
            own_lse.copy_(_rows(self, (whole.lse,), "lse")[0].squeeze(-1).transpose(1, 2))
        return own, own_lse, [q, k, v, lse, *([total.out for total in totals] if branches > 1 else [out])]

    def kept(self, branches: int) -> int:
        """How many tensors the backward is to be given."""
        return 4 + branches

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, kept: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, lse, *outs = kept
        wide = torch.promote_types(q.dtype, torch.float32)
        (grad,) = _heads(self, (grad,), "the gradient of out")
        dq, dk, dv = (torch.zeros_like(x, dtype=wide, memory_format=torch.contiguous_format) for x in (q, k, v))
        keys = OwnKeys(k, v, self.terms.hidden, self.terms.key_words(), (dk, dv))
        spread(self.kernel, self.parts, grad, q, keys, outs, readable_lse(lse), self.terms, dq)
        found = _rows(self, [x.to(q.dtype) for x in (dq, dk, dv)], "gradients")
        return found[0], found[1], found[2]


def _heads(swap: Swap, tensors: Sequence[Tensor], what: str) -> list[Tensor]:
    """(B, L, H, D) -> (B, N, H / P, D), each."""
    comm, lengths = swap.comm, swap.placement.lengths
    send, receive = {}, {}
    for peer in range(comm.ranks):
        pieces = [x.unflatten(2, (comm.ranks, -1))[:, :, peer] for x in tensors]
        send[peer] = torch.cat([piece.transpose(0, 1).flatten(1) for piece in pieces], 1)
        receive[peer] = send[peer].new_empty((lengths[peer], send[peer].shape[1]))
    _traded(swap, send, receive, f"swap of {what} to heads")
    found = []
    widths = [_width(x, comm.ranks) for x in tensors]
    for i, x in enumerate(tensors):
        shape = (len(x), x.shape[2] // comm.ranks, x.shape[3])
        whole = x.new_empty((swap.placement.length, *shape))
        for peer, pieces_of in receive.items():
            piece = pieces_of.split(widths, 1)[i].unflatten(1, shape)
            for stretch in swap.placement.stretches(peer):
                whole[stretch.begin : stretch.end] = piece[stretch.local : stretch.local + stretch.end - stretch.begin]
        found.append(whole.transpose(0, 1))
    return found


def _rows(swap: Swap, tensors: Sequence[Tensor], what: str) -> list[Tensor]:
    """The inverse: (B, N, H / P, D) -> (B, L, H, D), each."""
    comm, lengths = swap.comm, swap.placement.lengths
    send, receive = {}, {}
    for peer in range(comm.ranks):
        stretches = swap.placement.stretches(peer)
        pieces = [torch.cat([x[:, s.begin : s.end] for s in stretches], 1) if stretches else x[:, :0] for x in tensors]
        send[peer] = torch.cat([piece.transpose(0, 1).flatten(1) for piece in pieces], 1)
        receive[peer] = send[peer].new_empty((lengths[comm.rank], send[peer].shape[1]))
    _traded(swap, send, receive, f"swap of {what} to rows")
    widths = [_width(x, 1) for x in tensors]
    found = []
    for i, x in enumerate(tensors):
        shape = (len(x), x.shape[2], x.shape[3])
        pieces = [piece.split(widths, 1)[i].unflatten(1, shape) for _, piece in sorted(receive.items())]
        found.append(torch.cat(pieces, 2).transpose(0, 1).contiguous())
    return found


def _width(x: Tensor, ranks: int) -> int:
    return len(x) * x.shape[2] // ranks * x.shape[3]


def _traded(swap: Swap, send: dict[int, Tensor], receive: dict[int, Tensor], what: str) -> None:
    comm = swap.comm
    receive[comm.rank].copy_(send.pop(comm.rank))
    others = {peer: tensor for peer, tensor in receive.items() if peer != comm.rank and tensor.numel()}
    comm.swap({peer: x.contiguous() for peer, x in send.items() if x.numel()}, others, swap.errand, what).wait()
