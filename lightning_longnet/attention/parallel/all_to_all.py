"""The exchange "swap": an all_to_all over heads, as in DeepSpeed-Ulysses.

Each rank trades its tokens of all heads for all tokens of its heads, by point-to-point messages, and then needs no
other key.
"""

from __future__ import annotations

from functools import partial
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch

from lightning_longnet.attention.parallel.exchange import ExchangePlan, RankWork, Volume
from lightning_longnet.attention.parallel.lines import LinesCall
from lightning_longnet.attention.parallel.reordering import LocalOrder
from lightning_longnet.attention.parallel.rounds import RoundsCall
from lightning_longnet.attention.parallel.routes import Route, head_parts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from lightning_longnet.attention.parallel.comm import Comm, MessageContext
    from lightning_longnet.attention.parallel.exchange import RankCall, Sizes
    from lightning_longnet.attention.parallel.placement import Placement
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
        to_heads, to_rows = lengths[rank] * (ranks - 1), placement.length - lengths[rank]
        inputs = self.layout.heads * sizes.head_dim + self.layout.kv_heads * (sizes.head_dim + sizes.value_dim)
        out = self.layout.heads * sizes.value_dim  # or its gradient
        per_token = sizes.batch * sizes.itemsize * (inputs + out) // ranks
        forward = sizes.batch * sizes.itemsize * (inputs * to_heads + out * to_rows) // ranks
        peers = sum(1 for r in range(ranks) if r != rank and lengths[r])
        messages = peers + (ranks - 1 if lengths[rank] else 0)
        return Volume((to_heads + to_rows) * per_token, 2 * messages, placement.length * per_token, forward)

    def branch_volumes(self, rank: int, sizes: Sizes) -> tuple[Volume, ...]:
        """Return an empty tuple: a message holds the heads of all branches."""
        return ()

    def work(self, rank: int, weighted_segments: int = 0) -> RankWork:
        """Return the blocks of this rank's heads over the whole sequence; there are no rounds."""
        layout = self.layout._replace(weighted_segments=weighted_segments)
        return RankWork(head_parts(layout, self._kv_heads_of(rank)))

    def footprint(self, rank: int) -> AllToAllFootprint:
        """Return the memory of whole sequences of a rank's heads; it is the same for all ranks."""
        return AllToAllFootprint(self.layout.placement.ranks, self.layout.placement.length)

    def call(self, call: RankCall) -> AllToAllCall:
        """Return the object that computes a forward or backward on this rank, with the branches of all lines.

        `distributed_calls` calls it for each forward and backward.
        """
        first, *others = call.by_line()
        own = self._heads_call(first)
        inner: RoundsCall | LinesCall = own
        if others:
            # a rank has whole sequences of its heads, so no row has to travel to another line
            orders = [LocalOrder.between(first.line, other.line, call.device) for other in others]
            inner = LinesCall(own, tuple(zip(orders, map(self._heads_call, others), strict=True)))
        return AllToAllCall(call.shard.comm, call.message, call.shard.placement, inner, call.options.spec.returns_lse)

    def _heads_call(self, call: RankCall) -> RoundsCall:
        """Return the call on whole sequences of this rank's heads, for the branches of one line; `call` asks for each.

        The blocks are planned at the first call of their kind, and kept in the shard.
        """
        shard, kv_heads = call.shard, self._kv_heads_of(call.shard.rank)
        layout = self.layout._replace(pattern=call.line.pattern, weighted_segments=call.weighted_segments)
        parts = shard.cached(("heads", *call.key), partial(head_parts, layout, kv_heads))
        group = layout.heads // layout.kv_heads
        heads = slice(kv_heads.start * group, kv_heads.stop * group)
        route = Route(parts, (), len(kv_heads))
        options = call.pair_options(layout, torch.arange(shard.length, device=call.device), heads)
        return RoundsCall(call.kernel, route, options, call.branch_outs, saves_outs=True)

    def _kv_heads_of(self, rank: int) -> range:
        """Return the key/value heads of a rank, as many as of each other rank, in the order of ranks."""
        heads = self.layout.kv_heads // self.layout.placement.ranks
        return range(rank * heads, (rank + 1) * heads)


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
        """Return uninitialized tensors like those that the forward saves: q, k, v, lse and outs of a rank's heads.

        They are (B, N, H / P, D), and lse has as many elements as that of the forward.  For "detached" there is an out
        of each branch, in float32 or wider; else one, in the type of q for the mix "exact".
        """
        wide = torch.promote_types(q.dtype, torch.float32)
        saved = [x.new_empty((x.shape[0], self.length, x.shape[2] // self.ranks, x.shape[3])) for x in (q, k, v)]
        rows = q.shape[0], self.length, q.shape[2] // self.ranks
        saved.append(q.new_empty(rows, dtype=wide))
        dtype = q.dtype if spec.mix == "exact" else wide
        return saved + [q.new_empty((*rows, v.shape[3]), dtype=dtype) for _ in range(spec.partials)]

    def kv_rows(self, layers: int) -> int:
        """Return 0: an all_to_all holds as many KV rows as the rank gives away."""
        return 0  # an all_to_all holds as many rows as the rank gives away

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

    `inner` is the call on this rank's heads over the whole sequence.  All ranks run `forward` and `backward` together.
    """

    comm: Comm
    message: MessageContext
    placement: Placement
    inner: RoundsCall | LinesCall
    returns_lse: bool

    @property
    def saves_inputs(self) -> bool:
        """True: the forward saves q, k, v and lse of this rank's heads, which the backward need not exchange again."""
        return True

    @property
    def saved_count(self) -> int:
        """The number of tensors that the forward saves: q, k, v, lse, and the outs of the branches or that of all."""
        return 4 + (self.inner.saved_count or 1)  # q, k, v, lse, and the outs of the branches or that of all

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return out, lse and the tensors that the backward needs.

        lse is uninitialized unless `returns_lse`: to exchange it would cost one more all_to_all.  The operator
        `lightning_longnet::attend` calls it once for each group of samples with equal documents.
        """
        local_q = q
        q, k, v = self._to_heads((q, k, v), "queries, keys and values")
        out, lse, saved = self.inner.forward(q, k, v)
        (local_out,) = self._to_rows((out,), "out")
        local_lse = lse.new_empty((len(local_q), local_q.shape[2], local_q.shape[1]))
        if self.returns_lse:
            (lse_rows,) = self._to_rows((lse.transpose(1, 2).unsqueeze(-1),), "lse")
            local_lse.copy_(lse_rows.squeeze(-1).transpose(1, 2))
        return local_out, local_lse, [q, k, v, lse, *(saved or [out])]

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, saved: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk and dv of this rank's tokens, from what the forward saved; of q, k and v none is read.

        The operator `lightning_longnet::attend_backward` calls it, once for each call of `forward`.
        """
        q, k, v, lse, *outs = saved
        (grad,) = self._to_heads((grad,), "the gradient of out")
        # the inner call saves the outs of branches for "detached"; otherwise the out of all branches is saved
        gradients = self._to_rows(self.inner.backward(grad, q, k, v, outs[0], lse, outs), "gradients")
        return gradients[0], gradients[1], gradients[2]

    def _to_heads(self, tensors: Sequence[Tensor], content: str) -> list[Tensor]:
        """Return (B, N, H / P, D) of each (B, L, H, D): all tokens of this rank's heads for its tokens of all heads."""
        comm, placement = self.comm, self.placement
        shapes = [(len(x), x.shape[2] // comm.ranks, x.shape[3]) for x in tensors]
        wholes = [x.new_empty((placement.length, *shape)) for x, shape in zip(tensors, shapes, strict=True)]

        def pieces_of(peer: int) -> list[Tensor]:
            """Return what another rank gets of each tensor, (L, B, H / P, D): this rank's tokens of its heads."""
            return [x.unflatten(2, (comm.ranks, -1))[:, :, peer].transpose(0, 1) for x in tensors]

        def put(peer: int, pieces: Sequence[Tensor]) -> None:
            """Write the tokens of a rank, (its L, B, H / P, D) of each tensor, to their places in the sequence."""
            for whole, piece in zip(wholes, pieces, strict=True):
                for begin, end, local in placement.chunks(peer):
                    whole[begin:end] = piece[local : local + end - begin]

        self._all_to_all(tensors[0], shapes, placement.lengths, pieces_of, put, f"swap of {content} to heads")
        return [whole.transpose(0, 1) for whole in wholes]

    def _to_rows(self, tensors: Sequence[Tensor], content: str) -> list[Tensor]:
        """Return (B, L, H, D) of each (B, N, H / P, D): this rank's tokens of all heads, the inverse of `_to_heads`."""
        comm, placement = self.comm, self.placement
        shapes = [(len(x), x.shape[2], x.shape[3]) for x in tensors]
        length = placement.lengths[comm.rank]
        # (B, L, P, H / P, D): the heads of each rank
        parts = [x.new_empty((batch, length, comm.ranks, *r)) for x, (batch, *r) in zip(tensors, shapes, strict=True)]

        def pieces_of(peer: int) -> list[Tensor]:
            """Return what another rank gets of each tensor, (its L, B, H / P, D): its tokens of this rank's heads."""
            chunks = placement.chunks(peer)
            if len(chunks) == 1:
                return [x[:, chunks[0].begin : chunks[0].end].transpose(0, 1) for x in tensors]
            # with an empty piece first, for a rank without a chunk
            return [torch.cat([x[:, :0], *(x[:, s.begin : s.end] for s in chunks)], 1).transpose(0, 1) for x in tensors]

        def put(peer: int, pieces: Sequence[Tensor]) -> None:
            """Write a rank's heads of this rank's tokens, (L, B, H / P, D) of each tensor."""
            for part, piece in zip(parts, pieces, strict=True):
                part[:, :, peer] = piece.transpose(0, 1)

        self._all_to_all(tensors[0], shapes, [length] * comm.ranks, pieces_of, put, f"swap of {content} to rows")
        return [part.flatten(2, 3) for part in parts]

    def _all_to_all(
        self,
        like: Tensor,
        shapes: Sequence[tuple[int, ...]],
        rows: Sequence[int],
        pieces_of: Callable[[int], list[Tensor]],
        put: Callable[[int, Sequence[Tensor]], None],
        content: str,
    ) -> None:
        """Send each rank its pieces in one message, and store the pieces that come from each; all ranks call it.

        This rank's own pieces are stored while the others are on their way.  Ranks without rows get no message.

        Args:
            like: a tensor of the type and device of the pieces.
            shapes: the shape of each piece after its rows.
            rows: the rows that come from each rank.
            pieces_of: returns the pieces for a rank, each (rows, *shape).
            put: stores the pieces that came from a rank.
            content: what is sent, for errors and message tags.
        """
        comm = self.comm
        widths = [prod(shape) for shape in shapes]

        def split(packed: Tensor) -> list[Tensor]:
            """Return the pieces that a message holds side by side, (rows, sum of widths), as views (rows, *shape)."""
            return [part.unflatten(1, shape) for part, shape in zip(packed.split(widths, 1), shapes, strict=True)]

        send, receive = {}, {}
        for peer in range(comm.ranks):
            if peer == comm.rank:
                continue
            pieces = pieces_of(peer)
            if len(pieces[0]) and sum(widths):
                send[peer] = like.new_empty((len(pieces[0]), sum(widths)))
                for target, piece in zip(split(send[peer]), pieces, strict=True):
                    target.copy_(piece)
            if rows[peer] and sum(widths):
                receive[peer] = like.new_empty((rows[peer], sum(widths)))
        pending = comm.exchange(send, receive, self.message, content)
        put(comm.rank, pieces_of(comm.rank))
        pending.wait()
        for peer, packed in receive.items():
            put(peer, split(packed))
