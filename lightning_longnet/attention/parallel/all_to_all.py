"""The exchange "swap": an all_to_all over heads, as in DeepSpeed-Ulysses.

Each rank trades its tokens of all heads for all tokens of its heads, by point-to-point messages, and then needs no
other key.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from lightning_longnet.attention.parallel.exchange import ExchangePlan, RankWork, Volume
from lightning_longnet.attention.parallel.lines import LinesCall
from lightning_longnet.attention.parallel.reordering import LocalOrder
from lightning_longnet.attention.parallel.rounds import RoundsCall
from lightning_longnet.attention.parallel.routes import heads_route

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lightning_longnet.attention.parallel.comm import Comm, MessageContext
    from lightning_longnet.attention.parallel.exchange import RankCall, Sizes
    from lightning_longnet.attention.parallel.placement import Placement
    from lightning_longnet.attention.parallel.shard import SequenceShard
    from lightning_longnet.attention.spec import AttentionSpec


def refusal(ranks: int, kv_heads: int) -> str:
    """Return why an all_to_all over heads cannot serve, or an empty text.

    `schedule` asks before it plans "swap", and `refusal_of` for the planner, before it proposes it.
    """
    if kv_heads % ranks:
        return f"swap needs key heads that {ranks} ranks divide, got {kv_heads}"
    return ""


class AllToAllPlan(ExchangePlan):
    """A plan in which a rank computes all branches on whole sequences of some of the heads: the exchange "swap".

    `exchange_plan` makes it, of the exchanges that `schedule` chose.  For who calls each method see `ExchangePlan`.
    """

    @property
    def overlaps(self) -> bool:
        """False: no block can be computed before all tokens of its heads are there."""
        return False

    def volume(self, rank: int, sizes: Sizes) -> Volume:
        """Return what a rank sends: its tokens of other ranks' heads, and other ranks' tokens of its own heads.

        The forward sends q, k and v to the ranks of their heads and out back to those of its tokens; the backward sends
        the gradient of out and those of q, k and v.  See `ExchangePlan.volume`.
        """
        placement = self.layout.placement
        lengths, ranks = placement.lengths, placement.ranks
        to_heads, to_tokens = lengths[rank] * (ranks - 1), placement.length - lengths[rank]
        inputs = self.layout.heads * sizes.head_dim + self.layout.kv_heads * (sizes.head_dim + sizes.value_dim)
        out = self.layout.heads * sizes.value_dim  # or its gradient
        per_token = sizes.batch * sizes.itemsize * (inputs + out) // ranks
        forward = sizes.batch * sizes.itemsize * (inputs * to_heads + out * to_tokens) // ranks
        peers = sum(1 for r in range(ranks) if r != rank and lengths[r])
        messages = peers + (ranks - 1 if lengths[rank] else 0)
        return Volume((to_heads + to_tokens) * per_token, 2 * messages, placement.length * per_token, forward)

    def branch_volumes(self, rank: int, sizes: Sizes) -> tuple[Volume, ...]:
        """Return an empty tuple: a message holds the heads of all branches."""
        return ()

    def work(self, rank: int, weighted_segments: int = 0) -> RankWork:
        """Return the blocks of a rank's heads over the whole sequence, and no rounds; see `ExchangePlan.work`."""
        layout, kv_heads = self.layout._replace(weighted_segments=weighted_segments), self._kv_heads_of(rank)
        lengths = self.layout.placement.lengths
        received = {peer: length * len(kv_heads) for peer, length in enumerate(lengths) if length and peer != rank}
        return RankWork(heads_route(layout, kv_heads).own, received)

    def footprint(self, rank: int) -> AllToAllFootprint:
        """Return the memory of whole sequences of a rank's heads; it is the same for all ranks."""
        return AllToAllFootprint(self.layout.placement.ranks, self.layout.placement.length)

    def call(self, call: RankCall) -> AllToAllCall:
        """Return the object that computes a forward or backward on this rank, with the branches of all lines.

        `distributed_calls` calls it in each forward and backward, once for each group of samples.
        """
        first, *others = call.by_line()
        own = self._heads_call(first)
        inner: RoundsCall | LinesCall = own
        if others:
            # a rank has whole sequences of its heads, so no row has to travel to another line
            orders = [LocalOrder.between(first.line, other.line, call.device) for other in others]
            inner = LinesCall(own, tuple(zip(orders, map(self._heads_call, others), strict=True)))
        shard, returns_lse = call.shard, call.options.spec.returns_lse
        order = shard.cached(("rank order", call.device), partial(_sequence_order, shard, call.device))
        return AllToAllCall(shard.comm, call.message, shard.placement, inner, returns_lse, order)

    def _heads_call(self, call: RankCall) -> RoundsCall:
        """Return the call on whole sequences of this rank's heads, for the branches of one line.

        `AllToAllPlan.call` calls it for each line.  The blocks are planned at the first call of their kind, and kept in
        the shard.
        """
        shard, kv_heads = call.shard, self._kv_heads_of(call.shard.rank)
        layout = self.layout._replace(pattern=call.line.pattern, weighted_segments=call.weighted_segments)
        own_route = shard.cached(("heads", *call.key), partial(heads_route, layout, kv_heads))
        group = layout.heads // layout.kv_heads
        heads = slice(kv_heads.start * group, kv_heads.stop * group)
        places = shard.cached(("all places", call.device), partial(torch.arange, shard.length, device=call.device))
        options = call.pair_options(layout, places, heads)
        return RoundsCall(call.kernel, own_route, options, call.branch_outs, saves_outs=True)

    def _kv_heads_of(self, rank: int) -> range:
        """Return the key/value heads of a rank, as many as of each other rank, in the order of ranks."""
        heads = self.layout.kv_heads // self.layout.placement.ranks
        return range(rank * heads, (rank + 1) * heads)


def _sequence_order(shard: SequenceShard, device: torch.device) -> LocalOrder | None:
    """Return the order that brings the rows of the ranks, one rank after the other, into that of the sequence.

    It is None where the ranks hold them in that order.
    """
    placement = shard.placement
    begins = [chunk.begin for rank in range(placement.ranks) for chunk in placement.chunks(rank)]
    if begins == sorted(begins):
        return None
    tokens = torch.cat([shard.tokens(rank, device) for rank in range(placement.ranks)])
    return LocalOrder(tokens.argsort(), tokens)


class AllToAllFootprint(NamedTuple):
    """The memory of a call that holds whole sequences of `length` tokens for one in `ranks` heads.

    `longnet plan` counts with it; it is a `Footprint`, which says who calls each method.
    """

    ranks: int
    length: int

    @property
    def saves_inputs(self) -> bool:
        """True, as of `AllToAllCall`."""
        return True

    def saved(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> list[Tensor]:
        """Return uninitialized tensors like those that the forward saves of a rank's heads.

        These are q, k and v in one tensor (N, B, width), lse with as many elements as that of the forward, and outs
        (B, N, H / P, D).  For "detached" there is an out of each branch, in float32 or wider; else one, in the type of
        q for the mix "exact".
        """
        wide = torch.promote_types(q.dtype, torch.float32)
        width = sum(x.shape[2] // self.ranks * x.shape[3] for x in (q, k, v))
        saved = [q.new_empty((self.length, q.shape[0], width))]
        rows = q.shape[0], self.length, q.shape[2] // self.ranks
        saved.append(q.new_empty(rows, dtype=wide))
        dtype = q.dtype if spec.mix == "exact" else wide
        return saved + [q.new_empty((*rows, v.shape[3]), dtype=dtype) for _ in range(spec.partials)]

    def kv_rows(self, layers: int) -> int:
        """Return 0: an all_to_all holds as many KV rows as the rank gives away."""
        return 0

    def in_flight_bytes(self, q: Tensor, k: Tensor, v: Tensor, *, is_backward: bool) -> int:
        """Return the bytes of a rank's heads that are sent and received at once.

        In the backward their gradients, in the type of accumulators, are in memory besides.
        """
        # what is sent and what is received, and the wide gradients of this rank's heads
        wide = torch.promote_types(q.dtype, torch.float32).itemsize
        rows = self.length * q.shape[0] // self.ranks
        own = rows * (q.shape[2] * q.shape[3] + k.shape[2] * (k.shape[3] + v.shape[3]))
        return own * (2 * q.element_size() + (wide if is_backward else 0))


class AllToAllCall(NamedTuple):
    """One forward or backward by all_to_all, an `ExchangeCall`: the operators of op.py call it.

    `inner` is the call on this rank's heads over the whole sequence.  `order` brings rows as the ranks hold them, those
    of one rank after the other, into the order of the sequence; None where that is the same order.  All ranks run
    `forward` and `backward` together.
    """

    comm: Comm
    message: MessageContext
    placement: Placement
    inner: RoundsCall | LinesCall
    returns_lse: bool
    order: LocalOrder | None = None

    @property
    def saves_inputs(self) -> bool:
        """True: the forward saves q, k, v and lse of this rank's heads, which the backward need not exchange again."""
        return True

    @property
    def saved_count(self) -> int:
        """The number of tensors that the forward saves: q, k and v in one, lse, and the outs of branches or of all."""
        return 2 + (self.inner.saved_count or 1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return out, lse and the tensors that the backward needs.

        lse is uninitialized unless `returns_lse`: to exchange it would cost one more all_to_all.  The operator
        `lightning_longnet::attend` calls it once for each group of samples with equal documents.
        """
        rows = self._to_heads((q, k, v), "queries, keys and values")
        out, lse, saved = self.inner.forward(*self._sequences(rows, (q, k, v)))
        (local_out,) = self._to_tokens((out,), "out")
        local_lse = lse.new_empty((q.shape[0], q.shape[2], q.shape[1]))
        if self.returns_lse:
            (lse_rows,) = self._to_tokens((lse.transpose(1, 2).unsqueeze(-1),), "lse")
            local_lse.copy_(lse_rows.squeeze(-1).transpose(1, 2))
        return local_out, local_lse, [rows, lse, *(saved or [out])]

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, saved: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk and dv of this rank's tokens, from what the forward saved; of q, k and v none is read.

        The operator `lightning_longnet::attend_backward` calls it, once for each call of `forward`.
        """
        rows, lse, *outs = saved
        (whole_grad,) = self._sequences(self._to_heads((grad,), "the gradient of out"), (grad,))
        # the inner call saves the outs of branches for "detached"; otherwise the out of all branches is saved
        whole_q, whole_k, whole_v = self._sequences(rows, (q, k, v))
        gradients = self.inner.backward(whole_grad, whole_q, whole_k, whole_v, outs[0], lse, outs)
        dq, dk, dv = self._to_tokens(gradients, "gradients")
        return dq, dk, dv

    def _to_heads(self, tensors: Sequence[Tensor], content: str) -> Tensor:
        """Return all tokens of this rank's heads for its tokens of all heads, of several tensors (B, L, H, D).

        The result is (N, B, the sum of H / P * D), with the heads of the tensors side by side: one message brings all
        of them, and to save it takes no more memory than to save each.
        """
        ranks = self.comm.ranks
        # (P, L, B, width): for each rank its heads of this rank's tokens
        sent = torch.cat([x.unflatten(2, (ranks, -1)).permute(2, 1, 0, 3, 4).flatten(3) for x in tensors], 3)
        rows = sent.new_empty((self.placement.length, *sent.shape[2:]))
        self._exchange(sent.unbind(), rows.split(self.placement.lengths), f"swap of {content} to heads")
        del sent
        return rows if self.order is None else rows.index_select(0, self.order.order)

    def _sequences(self, rows: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """Return views (B, N, H / P, D) of the rows that `_to_heads` returned for tensors of these shapes."""
        (length, batch, width), views, first = rows.shape, [], 0
        for x in like:
            heads, size = x.shape[2] // self.comm.ranks, x.shape[3]
            strides = width, batch * width, size, 1
            views.append(rows.as_strided((batch, length, heads, size), strides, rows.storage_offset() + first))
            first += heads * size
        return views

    def _to_tokens(self, tensors: Sequence[Tensor], content: str) -> list[Tensor]:
        """Return this rank's tokens of all heads, (B, L, H, D), for all tokens of its heads, (B, N, H / P, D).

        All ranks call it together.  Each tensor has a number of heads and a width of its own; one message to each rank
        holds its part of all of them, and so they have one type.  It undoes `_to_heads` and `_sequences`: `forward`
        calls it for out, and for lse where it is asked for, and `backward` for the gradients.  `content` names the
        tensors in errors.
        """
        ranks, length = self.comm.ranks, self.placement.lengths[self.comm.rank]
        packed = [x.transpose(0, 1).flatten(2) for x in tensors]
        sent = packed[0] if len(packed) == 1 else torch.cat(packed, 2)
        sent = sent.contiguous() if self.order is None else sent.index_select(0, self.order.inverse)
        batch, width = sent.shape[1:]
        rows = sent.new_empty((ranks, length, batch, width))
        self._exchange(sent.split(self.placement.lengths), rows.unbind(), f"swap of {content} to tokens")
        results, first = [], 0
        for x in tensors:
            heads, size = x.shape[2:]
            strides = width, batch * width, length * batch * width, size, 1
            part = rows.as_strided((batch, length, ranks, heads, size), strides, first)
            results.append(part.contiguous().flatten(2, 3))
            first += heads * size
        return results

    def _exchange(self, sent: Sequence[Tensor], received: Sequence[Tensor], content: str) -> None:
        """Send each rank its rows of `sent`, and write the rows that come from each to `received`.

        This rank's own rows are written while the others are on their way.  All ranks call it; ranks without rows get
        no message.
        """
        rank = self.comm.rank
        send, receive = (
            {peer: rows for peer, rows in enumerate(side) if peer != rank and rows.numel()} for side in (sent, received)
        )
        pending = self.comm.exchange(send, receive, self.message, content)
        received[rank].copy_(sent[rank])
        pending.wait()
