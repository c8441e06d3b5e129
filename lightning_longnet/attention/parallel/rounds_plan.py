"""The plan of gather and ring: what each rank computes, sends and holds."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch

from lightning_longnet.attention.parallel.exchange import ExchangePlan, RankWork, RoundWork, Volume
from lightning_longnet.attention.parallel.lines import LinesCall
from lightning_longnet.attention.parallel.rank_blocks import rank_blocks
from lightning_longnet.attention.parallel.reordering import RankOrder, row_exchange
from lightning_longnet.attention.parallel.rounds import RemoteRows, RoundsCall
from lightning_longnet.attention.parallel.routes import route

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lightning_longnet.attention.parallel.exchange import RankCall, Sizes
    from lightning_longnet.attention.parallel.rank_blocks import Layout
    from lightning_longnet.attention.parallel.reordering import RowExchange
    from lightning_longnet.attention.parallel.shard import SequenceShard
    from lightning_longnet.attention.pattern.lines import Line
    from lightning_longnet.attention.spec import AttentionSpec


class RoundsPlan(ExchangePlan):
    """A plan in which the keys of each branch are gathered, or passed round a ring.

    `exchange_plan` makes it, of the exchanges that `schedule` chose.  For who calls each method see `ExchangePlan`.
    """

    @property
    def overlaps(self) -> bool:
        """True: the blocks on a rank's own keys are computed while the first round is in flight."""
        return True

    def volume(self, rank: int, sizes: Sizes) -> Volume:
        """Return what a rank sends, forward and backward, and keeps."""
        return rounds_volumes(self.layout, [self.exchanges], rank, sizes)[0]

    def branch_volumes(self, rank: int, sizes: Sizes) -> tuple[Volume, ...]:
        """Return what each branch adds to the branches that are finer, as rows that several need travel once.

        The volumes are those of the branches in the order of `exchanges`.
        """
        # a branch adds what the branches up to it exchange beyond those before it
        count = len(self.exchanges)
        prefixes = [(*self.exchanges[:i], *("none",) * (count - i)) for i in range(count + 1)]
        totals = rounds_volumes(self.layout, prefixes, rank, sizes)
        return tuple(Volume(*(b - a for a, b in zip(*pair, strict=True))) for pair in pairwise(totals))

    def work(self, rank: int, weighted_segments: int = 0) -> RankWork:
        """Return the blocks that a rank computes on its own keys, and what it receives and computes in each round."""
        own_route = route(self.layout._replace(weighted_segments=weighted_segments), rank, self.exchanges)
        rounds = tuple(
            RoundWork(
                {source: blocks.kv_row_count() for source, blocks in round_.receives.items()},
                tuple(part for blocks in round_.receives.values() for part in blocks.parts),
                round_.saves_rows,
            )
            for round_ in own_route.rounds
        )
        received: dict[int, int] = {}
        for round_ in rounds:
            for source, kv_rows in round_.received.items():
                received[source] = received.get(source, 0) + kv_rows
        return RankWork(own_route.own, received, rounds)

    def footprint(self, rank: int) -> RoundsFootprint:
        """Return how many received KV rows a rank holds: those of the gather, and those of the largest ring round.

        Rows of the gather are saved until the backward, those of a ring are held for their round.
        """
        rounds = [(sum(round_.received.values()), round_.saves_rows) for round_ in self.work(rank).rounds]
        saved = sum(rows for rows, is_saved in rounds if is_saved)
        return RoundsFootprint(saved, max((rows for rows, is_saved in rounds if not is_saved), default=0))

    def call(self, call: RankCall) -> RoundsCall | LinesCall:
        """Return a `RoundsCall`, or for a pattern on several lines (see `Line`) a `LinesCall` with one for each.

        Its rows are in the order of the first line.  It sends nothing yet.  `distributed_calls` calls it in each
        forward and backward, once for each group of samples with equal documents.
        """
        first, *others = call.by_line()
        first_call = self._rounds_call(first)
        if not others:
            return first_call
        lines = []
        for other in others:
            key = "line order", *other.key, first.line.pattern, call.device
            make = partial(_line_exchange, first.line, other.line, call.shard, call.device)
            rows = call.shard.cached(key, make)
            lines.append((RankOrder(call.shard.comm, other.message, rows), self._rounds_call(other)))
        return LinesCall(first_call, tuple(lines))

    def _rounds_call(self, call: RankCall) -> RoundsCall:
        """Return the object that computes the branches of one line on this rank's rows.

        `RoundsPlan.call` calls it for each line.  The route is planned at the first call of its kind, and kept in the
        shard.
        """
        shard = call.shard
        layout = self.layout._replace(pattern=call.line.pattern, weighted_segments=call.weighted_segments)
        exchanges = tuple(self.exchanges[i] for i in call.line.branches)
        own_route = shard.cached(("route", *call.key, exchanges), partial(route, layout, shard.rank, exchanges))

        def tokens_of(peer: int) -> Tensor:
            """Return the index in the whole sequence of each token on a rank, in the order of the line."""
            return call.tokens_at(shard.tokens(peer, call.device))

        places = shard.cached(("places", call.device), partial(shard.tokens, device=call.device))
        options = call.pair_options(layout, places)
        remote = RemoteRows(shard.comm, call.message, tokens_of, partial(shard.padding_of, samples=call.samples))
        # to compute the results of branches again in the backward would cost messages
        return RoundsCall(call.kernel, own_route, options, call.branch_outs, saves_outs=True, remote=remote)


def _line_exchange(source: Line, target: Line, shard: SequenceShard, device: torch.device) -> RowExchange:
    """Return the rows that this rank sends and receives to bring rows in the order of `source` into that of `target`.

    It sends nothing.  `RoundsPlan.call` calls it for each line but the first, and keeps the result in the shard.
    """
    order, _ = target.order_from(source)
    return row_exchange(order, shard).on(device)


class RoundsFootprint(NamedTuple):
    """The KV rows that are saved until the backward, and those of the largest round whose rows are not saved.

    `longnet plan` counts memory with it; it is a `Footprint`, which says who calls each method.
    """

    saved_rows: int
    round_rows: int

    @property
    def saves_inputs(self) -> bool:
        """False, as of `RoundsCall`."""
        return False

    def saved(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> list[Tensor]:
        """Return uninitialized tensors like those that the forward saves: received rows, and the outs of branches.

        The rows are (rows, B, D + Dv) in the type of k, and left out if there are none.  The outs (B, L, H, Dv), in
        float32 or wider, are there only for "detached".
        """
        wide = torch.promote_types(q.dtype, torch.float32)
        saved = []
        if self.saved_rows:
            saved.append(k.new_empty((self.saved_rows, k.shape[0], k.shape[3] + v.shape[3])))
        if spec.partials > 1:
            saved += [q.new_empty((*q.shape[:3], v.shape[3]), dtype=wide) for _ in range(spec.partials)]
        return saved

    def kv_rows(self, layers: int) -> int:
        """Return the rows of the gathers of all layers, plus those of one round of a ring."""
        return layers * self.saved_rows + self.round_rows

    def in_flight_bytes(self, q: Tensor, k: Tensor, v: Tensor, *, is_backward: bool) -> int:
        """Return the bytes of messages while a call runs: of two rounds of a ring, and in the forward of a gather.

        In the backward there are also the gradients of the rows of a gather and a round, each sent and received.
        """
        wide = torch.promote_types(q.dtype, torch.float32).itemsize
        row_elements = q.shape[0] * (k.shape[3] + v.shape[3])
        narrow = (2 * self.round_rows + (0 if is_backward else self.saved_rows)) * q.element_size()
        return row_elements * (narrow + (2 * (self.saved_rows + self.round_rows) * wide if is_backward else 0))


def rounds_volumes(layout: Layout, ways: Sequence[tuple[str, ...]], rank: int, sizes: Sizes) -> list[Volume]:
    """Return what a rank sends and keeps under each of several choices of exchanges, in their order.

    `schedule` compares choices by it, and `RoundsPlan` gives the volumes of its own.  The blocks between two ranks are
    the same for all choices, and are planned once.

    Args:
        layout: the pattern, the heads, the documents and the placement.
        ways: the choices: for each branch "gather", "ring" or "none".
        rank: the rank.
        sizes: the sizes of the tensors.
    """
    # for each choice the branches that are gathered, and those that go round a ring
    gather_and_ring = [
        tuple(tuple(i for i, kind in enumerate(way) if kind == name) for name in ("gather", "ring")) for way in ways
    ]
    branch_groups = sorted({group for both in gather_and_ring for group in both}, key=len)
    row_elements = sizes.batch * (sizes.head_dim + sizes.value_dim)  # of one KV row
    totals = [Volume(0, 0, 0, 0) for _ in ways]
    between = rank_blocks(layout)
    for peer in between.possible_peers(rank):
        received, sent = (between.blocks(*ends).kv_row_counts(branch_groups) for ends in ((rank, peer), (peer, rank)))
        for n, both in enumerate(gather_and_ring):
            sent_bytes, messages, kept_bytes, forward_bytes = totals[n]
            # rows that are gathered are sent once; those of a ring again in the backward.  Both return gradients
            for group, fetches in zip(both, (1, 2), strict=True):
                gradients = received[group] * sizes.wide_itemsize
                sent_bytes += row_elements * (fetches * sent[group] * sizes.itemsize + gradients)
                messages += fetches * (sent[group] > 0) + (received[group] > 0)
                forward_bytes += row_elements * sent[group] * sizes.itemsize
            kept_bytes += row_elements * received[both[0]] * sizes.itemsize
            totals[n] = Volume(sent_bytes, messages, kept_bytes, forward_bytes)
    return totals
