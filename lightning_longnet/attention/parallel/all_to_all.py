"""Ranks trade tokens for heads: each then holds the whole sequence of its heads, and needs no other key."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch

from lightning_longnet.attention.kernels.blocks import merge, no_keys, readable_lse, rounded, spread
from lightning_longnet.attention.kernels.keys import OwnKeys
from lightning_longnet.attention.kernels.partial import Partial

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from lightning_longnet.attention.kernels import BlockKernel
    from lightning_longnet.attention.kernels.blocks import Terms
    from lightning_longnet.attention.parallel.comm import Comm, Errand
    from lightning_longnet.attention.parallel.placement import Placement
    from lightning_longnet.attention.parallel.routes import Part


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
    comm, placement = swap.comm, swap.placement
    shapes = [(len(x), x.shape[2] // comm.ranks, x.shape[3]) for x in tensors]
    found = [x.new_empty((placement.length, *shape)) for x, shape in zip(tensors, shapes, strict=True)]

    def of_heads(peer: int) -> list[Tensor]:
        return [x.unflatten(2, (comm.ranks, -1))[:, :, peer].transpose(0, 1) for x in tensors]

    def put(peer: int, pieces: Sequence[Tensor]) -> None:
        for whole, piece in zip(found, pieces, strict=True):
            for stretch in placement.stretches(peer):
                whole[stretch.begin : stretch.end] = piece[stretch.local : stretch.local + stretch.end - stretch.begin]

    _traded(swap, tensors[0], shapes, placement.lengths, of_heads, put, f"swap of {what} to heads")
    return [whole.transpose(0, 1) for whole in found]


def _rows(swap: Swap, tensors: Sequence[Tensor], what: str) -> list[Tensor]:
    """The inverse: (B, N, H / P, D) -> (B, L, H, D), each."""
    comm, placement = swap.comm, swap.placement
    shapes = [(len(x), x.shape[2], x.shape[3]) for x in tensors]
    here = placement.lengths[comm.rank]
    found = [x.new_empty((batch, here, comm.ranks, *rest)) for x, (batch, *rest) in zip(tensors, shapes, strict=True)]

    def of_rows(peer: int) -> list[Tensor]:
        stretches = placement.stretches(peer)
        if len(stretches) == 1:
            return [x[:, stretches[0].begin : stretches[0].end].transpose(0, 1) for x in tensors]
        return [torch.cat([x[:, :0], *(x[:, s.begin : s.end] for s in stretches)], 1).transpose(0, 1) for x in tensors]

    def put(peer: int, pieces: Sequence[Tensor]) -> None:
        for own, piece in zip(found, pieces, strict=True):
            own[:, :, peer] = piece.transpose(0, 1)

    _traded(swap, tensors[0], shapes, [here] * comm.ranks, of_rows, put, f"swap of {what} to rows")
    return [own.flatten(2, 3) for own in found]


def _traded(
    swap: Swap,
    like: Tensor,
    shapes: Sequence[tuple[int, ...]],
    rows: Sequence[int],
    pieces_of: Callable[[int], list[Tensor]],
    put: Callable[[int, Sequence[Tensor]], None],
    what: str,
) -> None:
    """Each rank's pieces, (rows, *shape), go to it in one message; `rows[peer]` come back.

    One's own are put while the others are on their way.
    """
    comm = swap.comm
    widths = [prod(shape) for shape in shapes]

    def split(packed: Tensor) -> list[Tensor]:
        return [part.unflatten(1, shape) for part, shape in zip(packed.split(widths, 1), shapes, strict=True)]

    send, receive = {}, {}
    for peer in range(comm.ranks):
        if peer == comm.rank:
            continue
        pieces = pieces_of(peer)
        if len(pieces[0]) and sum(widths):
            send[peer] = like.new_empty((len(pieces[0]), sum(widths)))
            for into, piece in zip(split(send[peer]), pieces, strict=True):
                into.copy_(piece)
        if rows[peer] and sum(widths):
            receive[peer] = like.new_empty((rows[peer], sum(widths)))
    pending = comm.swap(send, receive, swap.errand, what)
    put(comm.rank, pieces_of(comm.rank))
    pending.wait()
    for peer, packed in receive.items():
        put(peer, split(packed))
