"""The plan of gather and ring: what each rank computes, sends and holds."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch

from lightning_longnet.attention.parallel.exchange import ExchangePlan, RankWork, RoundWork, Volume
from lightning_longnet.attention.parallel.lines import LinesCall
from lightning_longnet.attention.parallel.reordering import RankOrder, row_trade
from lightning_longnet.attention.parallel.rounds import RemoteRows, RoundsCall
from lightning_longnet.attention.parallel.routes import rank_blocks, route

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lightning_longnet.attention.parallel.exchange import RankCall, Sizes
    from lightning_longnet.attention.parallel.reordering import RowTrade
    from lightning_longnet.attention.parallel.routes import Layout, PeerBlocks
    from lightning_longnet.attention.parallel.shard import SequenceShard
    from lightning_longnet.attention.pattern.lines import Line
    from lightning_longnet.attention.spec import AttentionSpec


class RoundsPlan(ExchangePlan):
    """A plan in which the keys of each branch are gathered, or passed round a ring."""

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

    def call(self, call: RankCall) -> RoundsCall | LinesCall:
        first, *others = call.by_line()
        own = self._line_call(first)
        if not others:
            return own
        lines = []
        for each in others:
            key = "order", *each.key, first.line.pattern
            trade = call.shard.cached(key, partial(_line_trade, first.line, each.line, call.shard))
            lines.append((RankOrder(call.shard.comm, each.message, trade), self._line_call(each)))
        return LinesCall(own, tuple(lines))

    def _line_call(self, call: RankCall) -> RoundsCall:
        """Return the call of the branches of one line."""
        shard = call.shard
        layout = self.layout._replace(pattern=call.line.pattern, weighted_segments=call.weighted_segments)
        exchanges = tuple(self.exchanges[i] for i in call.line.branches)
        own_route = shard.cached(("route", *call.key, exchanges), partial(route, layout, shard.rank, exchanges))

        def tokens_of(peer: int) -> Tensor:
            return call.tokens_at(shard.tokens(peer))

        options = call.pair_options(layout, shard.tokens())
        remote = RemoteRows(shard.comm, call.message, tokens_of, partial(shard.padding_of, rows=call.rows))
        # to compute the results of branches again in the backward would cost messages
        return RoundsCall(call.kernel, own_route, options, call.own_outs, keeps_outs=True, remote=remote)


def _line_trade(source: Line, target: Line, shard: SequenceShard) -> RowTrade:
    order, _ = target.order_from(source)
    return row_trade(order, shard)


class RoundsFootprint(NamedTuple):
    """The cells that are kept until the backward, and those of the largest round that is not."""

    kept_cells: int
    round_cells: int

    @property
    def keeps_inputs(self) -> bool:
        return False

    def kept(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> list[Tensor]:
        wide = torch.promote_types(q.dtype, torch.float32)
        kept = []
        if self.kept_cells:
            kept.append(k.new_empty((self.kept_cells, k.shape[0], k.shape[3] + v.shape[3])))
        if spec.partials > 1:
            kept += [q.new_empty((*q.shape[:3], v.shape[3]), dtype=wide) for _ in range(spec.partials)]
        return kept

    def cells(self, layers: int) -> int:
        return layers * self.kept_cells + self.round_cells

    def in_flight_bytes(self, q: Tensor, k: Tensor, v: Tensor, *, is_backward: bool) -> int:
        wide = torch.promote_types(q.dtype, torch.float32).itemsize
        cell = q.shape[0] * (k.shape[3] + v.shape[3])
        narrow = (2 * self.round_cells + (0 if is_backward else self.kept_cells)) * q.element_size()
        return cell * (narrow + (2 * (self.kept_cells + self.round_cells) * wide if is_backward else 0))


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
