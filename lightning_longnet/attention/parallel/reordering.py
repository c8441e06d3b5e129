"""Tokens brought into another order and back again, over the ranks that hold them where a sequence is split."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lightning_longnet.attention.parallel.comm import Errand
from lightning_longnet.attention.pattern.ordering import causal_order, inverse_order, sequence_hilbert_order
from lightning_longnet.attention.pattern.pattern import Pattern

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_longnet.attention.parallel.shard import SequenceShard
    from lightning_longnet.attention.pattern.ordering import Ordering


def check_ordering(ordering: Ordering, pattern: Pattern) -> None:
    """A ValueError where no order of a sequence serves the pattern."""
    if ordering == "hilbert":
        order_of_sequence(ordering, 1, pattern, torch.device("cpu"))


def order_of_sequence(ordering: Ordering, length: int, pattern: Pattern, device: torch.device) -> tuple[Tensor, Tensor]:
    """`order[p]` is the token at place p of the line that the pattern is drawn on; the inverse stands beside it.

    Where the pattern is causal, a query sees those of its segment and residue that do not come after it in the
    sequence; this is possible for a pattern of one branch alone, see `causal_order`.
    """
    return _order(ordering, length, pattern.dumps(), device)


@lru_cache(32)
@torch.inference_mode(False)  # training uses it, too
def _order(ordering: Ordering, length: int, text: str, device: torch.device) -> tuple[Tensor, Tensor]:
    pattern = Pattern.loads(text)
    order = torch.arange(length)
    if ordering == "hilbert":
        order = sequence_hilbert_order(length)
        causal = [branch.is_causal for branch in pattern.branches]
        if any(causal) and not all(causal):
            raise ValueError("pattern must be causal in all of its branches or in none where ordering is 'hilbert'")
        if all(causal):
            order = causal_order(order, pattern)
    return order.to(device), inverse_order(order).to(device)


class Reordering:
    """What brings tensors (B, L, ...) into an order, and what comes of them back.

    Over ranks each token travels to the rank that holds its place, and its result home: all ranks call both together.
    `name` tells orders of one length apart, and is equal on all ranks.
    """

    def __init__(self, order: Tensor, inverse: Tensor, name: str, shard: SequenceShard | None = None) -> None:
        self.order, self.inverse, self.name, self.shard = order, inverse, name, shard
        self._trade: _Trade | None = None
        if shard is not None:
            self._trade = shard.once(("reordering", name), partial(_trade, order, shard))

    def there(self, *tensors: Tensor) -> list[Tensor]:
        """Into the order."""
        if self._trade is None:
            return [x.index_select(1, self.order) for x in tensors]
        found: list[Tensor] = self._traded(tensors, is_back=False)
        return found

    def back(self, x: Tensor) -> Tensor:
        """Out of it again."""
        if self._trade is None:
            return x.index_select(1, self.inverse)
        found: list[Tensor] = self._traded([x], is_back=True)
        return found[0]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _traded(self, tensors: Sequence[Tensor], is_back: bool) -> list[Tensor]:
        """One message to each rank for all of the tensors."""
        assert self.shard is not None
        kinds = {f"type of tensor {i} to reorder": x.dtype for i, x in enumerate(tensors)}
        sizes = {f"shape of tensor {i} to reorder": (len(x), *x.shape[2:]) for i, x in enumerate(tensors)}
        self.shard.check({"reordering": ("into", "out of")[is_back], **kinds, **sizes})
        if len({x.dtype for x in tensors}) > 1:
            raise ValueError(f"tensors to reorder must have one type, got {[x.dtype for x in tensors]}")
        rows = torch.cat([x.transpose(0, 1).flatten(1) for x in tensors], 1)
        if rows.shape[1] and self.shard.length:
            rows = _Traded.apply(rows, self.shard, self._trade, is_back)  # type: ignore[no-untyped-call]
        widths = [len(x) * x.shape[2:].numel() for x in tensors]
        pieces = rows.split(widths, 1)
        return [
            piece.unflatten(1, (len(x), *x.shape[2:])).transpose(0, 1) for piece, x in zip(pieces, tensors, strict=True)
        ]


class _Trade(NamedTuple):
    """For each rank: which of this one's tokens it takes, and at which of this one's places its own come to stand."""

    taken: dict[int, Tensor]
    placed: dict[int, Tensor]


def _trade(order: Tensor, shard: SequenceShard) -> _Trade:
    order = order.cpu()
    holder, index = torch.empty_like(order), torch.empty_like(order)
    held = [shard.tokens(rank) for rank in range(shard.comm.ranks)]
    for rank, tokens in enumerate(held):
        holder[tokens] = rank
        index[tokens] = torch.arange(len(tokens))
    taken, placed = {}, {}
    for rank, tokens in enumerate(held):
        wanted = order[tokens]
        taken[rank] = index[wanted[holder[wanted] == shard.rank]]
        placed[rank] = (holder[order[held[shard.rank]]] == rank).nonzero().squeeze(1)
    return _Trade(taken, placed)


class _Traded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, shard: SequenceShard, trade: _Trade, is_back: bool) -> Tensor:
        ctx.shard, ctx.trade, ctx.is_back, ctx.call = shard, trade, is_back, shard.call_of(shard.calls)
        return _moved(rows, shard, trade, is_back, f"forward of reordering, {ctx.call}")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        words = f"backward of reordering, {ctx.call}"
        return _moved(grad.contiguous(), ctx.shard, ctx.trade, not ctx.is_back, words), None, None, None


def _moved(rows: Tensor, shard: SequenceShard, trade: _Trade, is_back: bool, call: str) -> Tensor:
    """Rows (L, width) to where they belong."""
    comm = shard.comm
    taken, placed = (trade.placed, trade.taken) if is_back else trade
    out = torch.empty_like(rows)
    with comm.finished(call):
        send = {rank: rows[at.to(rows.device)] for rank, at in taken.items() if len(at)}
        come = {rank: rows.new_empty((len(at), rows.shape[1])) for rank, at in placed.items() if len(at)}
        own = send.pop(comm.rank, None)
        if own is not None:
            come[comm.rank] = own
        others = {rank: x for rank, x in come.items() if rank != comm.rank}
        comm.swap(send, others, Errand(call, "reordering"), call).wait()
        for rank, x in come.items():
            out[placed[rank].to(rows.device)] = x
    return out
