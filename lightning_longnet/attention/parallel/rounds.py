"""Gather and ring: keys travel in rounds, all at once or from one rank after the other.

    gather   one round brings the rows that a rank needs of all others; they are kept for the backward, which sends dK
             and dV of the same rows back
    ring     a round for each other rank, fetched one ahead: the keys and values of two ranks are in memory, never more;
             beside them the copy that is sent, and in the backward the gradients of two.  The backward fetches keys and
             values again and sends dK and dV back round by round

The blocks on a rank's own keys are computed while the first round is on its way.  Whole sequences on one process are
the case without rounds.
"""

from __future__ import annotations

from functools import partial
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch

from lightning_longnet.attention.kernels.blocks import (
    PairOptions,
    backward_blocks,
    backward_lse,
    empty_partial,
    finished,
    forward_blocks,
    initial_partial,
    total_of,
)
from lightning_longnet.attention.kernels.keys import OwnKeys, ReceivedKeys
from lightning_longnet.attention.parallel.exchange import ExchangePlan, RankWork, RoundWork, Volume
from lightning_longnet.attention.parallel.routes import Route, rank_blocks, route

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from lightning_longnet.attention.kernels import BlockKernel
    from lightning_longnet.attention.parallel.comm import Comm, MessageContext, Pending
    from lightning_longnet.attention.parallel.exchange import RankCall, Sizes
    from lightning_longnet.attention.parallel.routes import Layout, PeerBlocks, Round, RoundIndices
    from lightning_longnet.attention.plan.blocks import Part
    from lightning_longnet.attention.spec import AttentionSpec


class RoundsPlan(ExchangePlan):
    """Each branch is gathered, or passed round a ring."""

    @property
    def overlaps(self) -> bool:
        return True

    def volume(self, rank: int, sizes: Sizes) -> Volume:
        return rounds_volumes(self.layout, [self.exchanges], rank, sizes)[0]

    def branch_volumes(self, rank: int, sizes: Sizes) -> tuple[Volume, ...]:
        many = len(self.exchanges)
        ways = [(*self.exchanges[:i], *("none",) * (many - i)) for i in range(many + 1)]
        totals = rounds_volumes(self.layout, ways, rank, sizes)
        return tuple(Volume(*(b - a for a, b in zip(*pair, strict=True))) for pair in pairwise(totals))

    def work(self, rank: int, weighted_segments: int = 0) -> RankWork:
        found = route(self.layout._replace(weighted_segments=weighted_segments), rank, self.exchanges)
        rounds = (
            RoundWork(
                {source: blocks.cell_count() for source, blocks in each.receives.items()},
                tuple(part for blocks in each.receives.values() for part in blocks.parts),
                each.keeps,
            )
            for each in found.rounds
        )
        return RankWork(found.own, tuple(rounds))

    def footprint(self, rank: int) -> RoundsFootprint:
        rounds = [(sum(each.received.values()), each.keeps) for each in self.work(rank).rounds]
        kept = sum(cells for cells, keeps in rounds if keeps)
        return RoundsFootprint(kept, max((cells for cells, keeps in rounds if not keeps), default=0))

    def call(self, call: RankCall) -> RoundsCall:
        shard, spec = call.shard, call.spec
        layout = self.layout._replace(weighted_segments=call.weighted_segments)
        own_route = shard.cached(
            ("route", *call.key, self.exchanges), partial(route, layout, shard.rank, self.exchanges)
        )

        def tokens_of(peer: int) -> Tensor:
            return call.tokens_at(shard.tokens(peer))

        tokens = tokens_of(shard.rank).to(call.device)
        options = PairOptions(
            spec.scale_of(call.head_dim),
            shard.padding_of(tokens, call.rows),
            call.dropout,
            samples=torch.arange(call.rows.start, call.rows.stop, device=call.device),
            tokens=tokens,
            counts_once=spec.counts_once,
            sinks=call.sinks,
        )
        remote = RemoteRows(shard.comm, call.message, tokens_of, partial(shard.padding_of, rows=call.rows))
        return RoundsCall(call.kernel, own_route, options, spec, remote)


class RoundsFootprint(NamedTuple):
    """The cells that are kept until the backward, and those of the largest round that is not."""

    kept_cells: int
    round_cells: int

    def kept(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> list[Tensor]:
        wide = torch.promote_types(q.dtype, torch.float32)
        kept = []
        if self.kept_cells:
            kept.append(k.new_empty((self.kept_cells, k.shape[0], k.shape[3] + v.shape[3])))
        if spec.mix == "detached":
            kept += [q.new_empty((*q.shape[:3], v.shape[3]), dtype=wide) for _ in range(spec.partials)]
        return kept

    def cells(self, layers: int) -> int:
        return layers * self.kept_cells + self.round_cells

    def in_flight_bytes(self, q: Tensor, k: Tensor, v: Tensor, *, is_backward: bool) -> int:
        wide = torch.promote_types(q.dtype, torch.float32).itemsize
        cell = q.shape[0] * (k.shape[3] + v.shape[3])
        narrow = (2 * self.round_cells + (0 if is_backward else self.kept_cells)) * q.element_size()
        return cell * (narrow + (2 * (self.kept_cells + self.round_cells) * wide if is_backward else 0))


class RemoteRows(NamedTuple):
    """The messages of a call, and what is known of the rows on other ranks.

    `tokens(rank)` returns the index in the whole sequence of a rank's tokens, and `padding_of(tokens)` (B, tokens),
    True where padding hides one, or None.
    """

    comm: Comm
    message: MessageContext
    tokens: Callable[[int], Tensor]
    padding_of: Callable[[Tensor], Tensor | None]


class RoundsCall(NamedTuple):
    """One forward or backward on this rank; without `remote` all keys are on this process."""

    kernel: BlockKernel
    route: Route
    options: PairOptions
    spec: AttentionSpec
    remote: RemoteRows | None = None

    @property
    def _kept_partials(self) -> int:
        """One process computes each branch's partial again in the backward; over ranks that would cost messages."""
        return self.spec.partials if self.remote is not None and self.spec.partials > 1 else 0

    @property
    def kept_count(self) -> int:
        return sum(each.keeps for each in self.route.rounds) + self._kept_partials

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        stores = self.route.writes_queries and self.options.key_padding_mask is None  # calls without keys are left out
        totals = [(empty_partial if stores else initial_partial)(q, v) for _ in range(self._kept_partials or 1)]
        fetched = self._fetch(0, k, v)
        forward_blocks(self.kernel, self.route.own, q, self._own_keys(k, v), self.options, totals, stores)
        kept = []
        for i, each in enumerate(self.route.rounds):
            assert fetched is not None
            indices, cells, pending = fetched
            pending.wait()
            fetched = self._fetch(i + 1, k, v)
            keys = self._received_keys(indices, cells, k.shape[3])
            forward_blocks(self.kernel, indices.parts, q, keys, self.options, totals)
            if each.keeps:
                kept.append(cells)
            del indices, cells, keys
        outs = [each.out for each in totals] if self._kept_partials else []
        return *finished(total_of(totals), q, self.options.sinks), [*kept, *outs]

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, kept: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        rounds, wide = self.route.rounds, torch.promote_types(q.dtype, torch.float32)
        stores, stores_keys = (
            writes and self.options.key_padding_mask is None
            for writes in (self.route.writes_queries, self.route.writes_keys)
        )
        dq, dk, dv = (
            (torch.empty_like if written else torch.zeros_like)(x, dtype=wide, memory_format=torch.contiguous_format)
            for x, written in ((q, stores), (k, stores_keys), (v, stores_keys))
        )
        keeping = sum(each.keeps for each in rounds)  # the rows that the forward kept come before its partials
        outs, lse = list(kept[keeping:]) or [out], backward_lse(lse)
        returns: list[Callable[[], None]] = []

        def backward_round(i: int, indices: RoundIndices, cells: Tensor) -> None:
            dcells = torch.zeros_like(cells, dtype=wide)
            keys = self._received_keys(indices, cells, k.shape[3], dcells)
            backward_blocks(self.kernel, indices.parts, grad, q, keys, outs, lse, self.options, dq)
            if returns:
                returns.pop()()  # at most one return is on its way
            returns.append(self._return(rounds[i], indices, dcells, dk, dv))

        for i in range(keeping):
            backward_round(i, rounds[i].indices(), kept[i])
        fetched = self._fetch(keeping, k, v)
        keys = self._own_keys(k, v, (dk, dv))
        for branch_outs, parts in self._own_parts(q, keys, v, outs):
            writes = stores, stores_keys
            backward_blocks(self.kernel, parts, grad, q, keys, branch_outs, lse, self.options, dq, *writes)
        for i in range(keeping, len(rounds)):
            assert fetched is not None
            indices, cells, pending = fetched
            pending.wait()
            # Two ranks have two messages each way here, the keys of one step and the gradients of another.  Both must
            # send them in one order, though either may leave out steps: the keys of t + 1, then the gradients of t
            is_next = i + 1 < len(rounds) and rounds[i + 1].ring_step == rounds[i].ring_step + 1
            if is_next:
                fetched = self._fetch(i + 1, k, v)
            backward_round(i, indices, cells)
            if not is_next:
                fetched = self._fetch(i + 1, k, v)
            del indices, cells
        for finish in returns:
            finish()
        gradients = [dq, dk, dv]
        del dq, dk, dv, keys  # so that each accumulator is freed as soon as it is rounded
        dq, dk, dv = (gradients.pop(0).to(q.dtype) for _ in range(3))
        return dq, dk, dv

    def _own_keys(self, k: Tensor, v: Tensor, gradients: tuple[Tensor, Tensor] | None = None) -> OwnKeys:
        return OwnKeys(k, v, self.options.key_padding_mask, self.options.key_words(), gradients)

    def _own_parts(
        self, q: Tensor, keys: OwnKeys, v: Tensor, outs: list[Tensor]
    ) -> Iterator[tuple[list[Tensor], tuple[Part, ...]]]:
        """Yield the own parts with the outs that their gradients need, which "detached" computes again here."""
        if self.spec.partials == 1 or self._kept_partials:
            yield outs, self.route.own
            return
        for _, group in groupby(self.route.own, key=lambda part: part.branch):
            parts = tuple(group)
            branch = initial_partial(q, v)
            forward_blocks(self.kernel, parts, q, keys, self.options, [branch])
            yield [branch.out], parts

    def _fetch(self, i: int, k: Tensor, v: Tensor) -> tuple[RoundIndices, Tensor, Pending] | None:
        """Start round `i`, if there is one: its rows (cells, B, D + Dv) are there once its messages were waited for."""
        if i >= len(self.route.rounds):
            return None
        assert self.remote is not None
        each = self.route.rounds[i]
        indices = each.indices()
        batch, _, _, width = k.shape
        flat_k, flat_v = (x.flatten(1, 2) for x in (k, v))
        send = {}
        for peer, cells in indices.send.items():
            rows = cells.to(k.device, torch.long)
            send[peer] = torch.cat((flat_k[:, rows], flat_v[:, rows]), -1).transpose(0, 1).contiguous()
        counts = [len(cells) for cells in indices.receive.values()]
        received = k.new_empty((sum(counts), batch, width + v.shape[3]))
        pieces = dict(zip(indices.receive, received.split(counts), strict=True))
        pending = self.remote.comm.exchange(send, pieces, self.remote.message, f"keys and values{_step(each)}")
        return indices, received, pending

    def _return(self, each: Round, indices: RoundIndices, dcells: Tensor, dk: Tensor, dv: Tensor) -> Callable[[], None]:
        """Send a round's gradients to the ranks that own its keys; the result waits for this rank's and adds them."""
        assert self.remote is not None
        send = dict(zip(indices.receive, dcells.split([len(c) for c in indices.receive.values()]), strict=True))
        back = {peer: dcells.new_empty((len(cells), *dcells.shape[1:])) for peer, cells in indices.send.items()}
        pending = self.remote.comm.exchange(send, back, self.remote.message, f"gradients{_step(each)}")

        def finish() -> None:
            pending.wait()
            for peer, gradients in back.items():
                rows = indices.send[peer].to(dk.device, torch.long)
                parts = gradients.transpose(0, 1).split((dk.shape[3], dv.shape[3]), -1)
                for total, part in zip((dk, dv), parts, strict=True):
                    total.flatten(1, 2).index_add_(1, rows, part)

        return finish

    def _received_keys(
        self, indices: RoundIndices, cells: Tensor, width: int, gradients: Tensor | None = None
    ) -> ReceivedKeys:
        assert self.remote is not None
        padding = words = None
        dropout = self.options.dropout
        if self.options.key_padding_mask is not None or dropout is not None:
            heads = self.route.kv_heads
            rows = [self.remote.tokens(peer)[peer_cells // heads] for peer, peer_cells in indices.receive.items()]
            tokens = (torch.cat(rows) if rows else torch.empty(0, dtype=torch.long)).to(cells.device)
            padding = self.remote.padding_of(tokens)
            words = None if dropout is None else dropout.key_words(tokens)
        return ReceivedKeys(cells, width, padding, words, gradients)


def _step(each: Round) -> str:
    """Name a ring step as both sides do; a round's number differs, since ranks leave out rounds that bring nothing."""
    return f" of turn {each.ring_step}" if each.ring_step else ""


def rounds_volumes(layout: Layout, ways: Sequence[tuple[str, ...]], rank: int, sizes: Sizes) -> list[Volume]:
    """Return a rank's volume under each of several choices of exchanges, counting each branch's rows once for all."""
    groups = [
        tuple(tuple(i for i, kind in enumerate(way) if kind == name) for name in ("gather", "ring")) for way in ways
    ]
    branches = sorted({members for group in groups for members in group}, key=len)
    pair = sizes.batch * (sizes.head_dim + sizes.value_dim)
    totals = [[0, 0, 0, 0] for _ in ways]
    between = rank_blocks(layout)
    for peer in between.neighbours(rank):
        received, sent = (_cell_counts(between.blocks(*ends), branches) for ends in ((rank, peer), (peer, rank)))
        for total, group in zip(totals, groups, strict=True):
            for members, fetches in zip(group, (1, 2), strict=True):
                gradients = received[members] * sizes.wide_itemsize
                total[0] += pair * (fetches * sent[members] * sizes.itemsize + gradients)
                total[3] += pair * sent[members] * sizes.itemsize
                total[1] += fetches * (sent[members] > 0) + (received[members] > 0)
            total[2] += pair * received[group[0]] * sizes.itemsize
    return [Volume(*total) for total in totals]


def _cell_counts(blocks: PeerBlocks, groups: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], int]:
    """Return how many cells each group of branches needs together; the groups come in the order of their size."""
    if not blocks.parts:
        return dict.fromkeys(groups, 0)
    if blocks.is_sparse:
        return {group: len(blocks.listed(group)) for group in groups}
    none = torch.zeros((), dtype=torch.bool)
    single = {branch: blocks.mask((branch,)) for branch in {part.branch for part in blocks.parts}}
    masks: dict[tuple[int, ...], torch.Tensor] = {(): none}
    for group in filter(None, groups):
        smaller, other = (group[:-1], group[-1]) if group[:-1] in masks else (group[1:], group[0])
        if smaller in masks:
            masks[group] = masks[smaller] | single.get(other, none)
        else:
            masks[group] = blocks.mask(group)
    return {group: int(masks[group].sum()) for group in groups}
