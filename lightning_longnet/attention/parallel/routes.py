"""The route of a rank: the blocks on its own keys, and the rounds in which it sends and receives KV rows."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lightning_longnet.attention.parallel.peer_blocks import CPU, kv_rows_of
from lightning_longnet.attention.parallel.rank_blocks import rank_blocks
from lightning_longnet.attention.parallel.received_rows import received_parts
from lightning_longnet.attention.plan.block import Part
from lightning_longnet.attention.plan.blocks import plan
from lightning_longnet.attention.plan.merging import merge_neighbors
from lightning_longnet.attention.plan.paged_keys import merge_stacks
from lightning_longnet.attention.plan.parts import Parts

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from lightning_longnet.attention.parallel.peer_blocks import PeerBlocks
    from lightning_longnet.attention.parallel.rank_blocks import Layout, RankBlocks


@dataclass(frozen=True, eq=False)
class Route:
    """A rank's work in one call of attention: the blocks on its own keys, and the rounds in their order.

    A `RoundsCall` computes it.  `route` makes it for gather and ring, `AllToAllPlan` one without rounds for the heads
    of a rank, and `_line_call` of calls.py one without rounds for whole sequences.  In the routes without rounds,
    `writes_queries` is True if each query row is in exactly one block of the first branch, and `writes_keys` if each
    key row is.  The results of these blocks are then written, not added, and the accumulators need no initial value.
    """

    own: Parts
    rounds: tuple[Round, ...]
    kv_heads: int
    writes_queries: bool = False
    writes_keys: bool = False


@dataclass(frozen=True, eq=False)
class Round:
    """One exchange: what this rank sends, what it receives, and the blocks that it computes with that.

    A rank is in `sends` only if rows travel to it, and in `receives` only if rows come from it.

    Attributes:
        sends: for each rank the blocks that it computes with this rank's keys.
        receives: for each rank the blocks that this rank computes with its keys.
        saves_rows: whether received rows are saved for the backward, which otherwise fetches them again.
        ring_step: in step t of a ring a rank receives from the rank t places before it and sends to the one t places
            after it; 0 for a gather.
    """

    sends: dict[int, PeerBlocks]
    receives: dict[int, PeerBlocks]
    saves_rows: bool
    ring_step: int

    def indices(self, device: torch.device = CPU, kept_bytes: float = 0, with_views: bool = False) -> RoundIndices:
        """Return the indices of the round on a device; `with_views` the parts read received keys as views if they can.

        They are cached if the round saves the rows that it receives (a gather), or if they take at most `kept_bytes`.
        Others are computed in each call: those of all rounds of a dense ring are as many as the tokens of the sequence.
        `RoundsCall` asks for them when it starts the round, in the forward and in the backward.
        """
        views = self._views if with_views else None
        key = device, views is not None
        if key not in self._cache:
            indices = self._compute_indices(device, views)
            if not self.saves_rows and indices.nbytes > kept_bytes:
                return indices
            self._cache[key] = indices
        return self._cache[key]

    @cached_property
    def _cache(self) -> dict[tuple[torch.device, bool], RoundIndices]:
        """The indices on each device that are kept, with and without views."""
        return {}

    @cached_property
    def _views(self) -> Parts | None:
        """The parts, which read received keys as views; None where some have to be copied."""
        parts, offset = list[Part](), 0
        for rank, blocks in self.receives.items():
            count = self._counts[1][rank]
            of_rank = received_parts(blocks, self._parts[rank], count, offset)
            if of_rank is None:
                return None
            parts += of_rank
            offset += count
        return Parts(sorted(parts, key=lambda part: part.branch))

    @cached_property
    def _parts(self) -> dict[int, Parts]:
        """The parts with the keys of each rank, merged to fewer; ranks with equal blocks have the same parts."""
        merged = {blocks: merge_neighboring_parts(blocks.parts) for blocks in set(self.receives.values())}
        return {rank: merged[blocks] for rank, blocks in self.receives.items()}

    @cached_property
    def _counts(self) -> tuple[dict[int, int], dict[int, int]]:
        """The numbers of KV rows by rank, (sent, received), with which indices are computed on a GPU."""
        sent, received = (
            {rank: blocks.kv_row_count() for rank, blocks in side.items()} for side in (self.sends, self.receives)
        )
        return sent, received

    @cached_property
    def _equal_sends(self) -> tuple[tuple[int, ...], ...]:
        """The ranks that this rank sends to; those that need the same KV rows are in one group."""
        groups = defaultdict[Any, list[int]](list)
        for rank, blocks in self.sends.items():
            groups[frozenset(part.block.keys for part in blocks.parts) if len(self.sends) > 1 else ()].append(rank)
        return tuple(map(tuple, groups.values()))

    def _compute_indices(self, device: torch.device, views: Parts | None) -> RoundIndices:
        """Compute the indices on the device; the numbers of rows are known, so nothing waits for a GPU."""
        sent, received = ({}, {}) if device.type == "cpu" else self._counts
        receive, parts, offset = {}, [], 0
        for rank, blocks in self.receives.items():
            mask = blocks.mask(device=device)
            receive[rank] = kv_rows_of(mask, received.get(rank))
            if views is not None:
                continue
            # the index of each needed KV row among all that this round receives, (1, tokens, kv_heads, 1)
            kv_index = (mask.cumsum(0, dtype=torch.int32) + (offset - 1)).view(1, blocks.tokens, blocks.kv_heads, 1)
            for part in self._parts[rank]:
                parts.append(part._replace(kv_index=part.block.keys.read(kv_index)[0, ..., 0].clone()))
            offset += len(receive[rank])
        parts.sort(key=lambda part: part.branch)  # dropout computes its words once for each run of one branch
        peers = [rank for group in self._equal_sends for rank in group]
        rows = [kv_rows_of(self.sends[rank].mask(device=device), sent.get(rank)) for rank in peers]
        all_rows = torch.cat(rows) if rows else torch.empty(0, dtype=torch.int32, device=device)
        send = dict(zip(peers, all_rows.split([len(x) for x in rows]), strict=True))
        return RoundIndices(all_rows, send, receive, Parts(parts) if views is None else views, self._equal_sends)


class RoundIndices(NamedTuple):
    """The indices of the KV rows of one round, and the parts that are computed with the received ones.

    Attributes:
        sent: the indices of this rank's KV rows that the other ranks need, those of one rank after the other.
        send: for each other rank the view of `sent` with the rows that it needs, (R,), ascending.
        receive: for each other rank the indices, on that rank, of the KV rows that this rank needs, (R,), ascending.
        parts: the parts, with the index of each key among all received KV rows, or with lattices of these rows.
        equal_sends: the ranks of `send` in their order; those that need the same rows are in one group.
    """

    sent: Tensor
    send: dict[int, Tensor]
    receive: dict[int, Tensor]
    parts: Parts
    equal_sends: tuple[tuple[int, ...], ...]

    @property
    def has_views(self) -> bool:
        """Whether the parts read received keys as views."""
        return bool(self.parts) and self.parts[0].kv_index is None

    @property
    def nbytes(self) -> int:
        """The bytes of all indices, which decide whether a ring keeps them."""
        of_parts = (part.kv_index for part in self.parts if part.kv_index is not None)
        return sum(x.nbytes for x in (self.sent, *self.receive.values(), *of_parts))


def route(layout: Layout, rank: int, exchanges: tuple[str, ...]) -> Route:
    """Return a rank's route: what it computes, sends and receives in a call of attention by gather and ring.

    All branches that are gathered share one round with all ranks; those of a ring share a round for each step.  The
    function sends nothing.  `RoundsPlan` calls it for its calls, whose shard keeps the route, and in `RoundsPlan.work`.

    Args:
        layout: the pattern, the heads, the documents and the placement.
        rank: the rank.
        exchanges: "gather" or "ring" for each branch.
    """
    gathers, rings = (tuple(i for i, kind in enumerate(exchanges) if kind == name) for name in ("gather", "ring"))
    assert len(gathers) + len(rings) == len(exchanges) == len(layout.pattern.branches)
    between, ranks = rank_blocks(layout), layout.placement.ranks
    peers = between.possible_peers(rank)
    rounds = [_round(between, rank, peers, peers, gathers)] if gathers else []
    # only the steps in which this rank receives from or sends to a rank that a segment, document or window spans to
    for step in sorted({(rank - r) % ranks for r in peers} | {(r - rank) % ranks for r in peers}) if rings else ():
        before, after = (rank - step) % ranks, (rank + step) % ranks
        rounds.append(_round(between, rank, [before], [after], rings, step))
    own = merge_neighboring_parts(between.blocks(rank, rank).parts)
    return Route(own, tuple(r for r in rounds if r.sends or r.receives), layout.kv_heads)


def _round(
    between: RankBlocks, rank: int, sources: list[int], targets: list[int], branches: tuple[int, ...], step: int = 0
) -> Round:
    """Return the round in which a rank receives from `sources` and sends to `targets`, for some branches.

    Ranks between which no row travels are left out.  `step` is that of a ring, and 0 for a gather.
    """
    receives = {r: blocks for r in sources if (blocks := between.blocks(rank, r, branches)).parts}
    sends = {r: blocks for r in targets if (blocks := between.blocks(r, rank, branches)).parts}
    return Round(sends, receives, saves_rows=step == 0, ring_step=step)


def heads_route(layout: Layout, kv_heads: range) -> Route:
    """Return the route over the whole sequence of some key heads and of the query heads that they serve.

    It has no rounds.  `AllToAllPlan._heads_call` runs its blocks on the rank that has all tokens of these heads, and
    `AllToAllPlan.work` returns them for any rank.  In the blocks heads are counted from the first of `kv_heads`, and
    from the first query head that it serves.
    """
    whole = plan(layout.pattern, layout.heads, layout.kv_heads, layout.cuts, layout.weighted_segments)
    group, parts = layout.heads // layout.kv_heads, []
    for branch, blocks in enumerate(whole.branches):
        for block in blocks:
            queries, keys = block.queries, block.keys
            members = [a for a in range(keys.heads) if keys.head + a * keys.head_step in kv_heads]
            if members:
                per_key, first, last = queries.heads // keys.heads, members[0], members[-1] + 1
                queries, keys = queries.of_heads(first * per_key, last * per_key), keys.of_heads(first, last)
                queries = replace(queries, head=queries.head - kv_heads.start * group)
                keys = replace(keys, head=keys.head - kv_heads.start)
                parts.append(Part(branch, replace(block, queries=queries, keys=keys)))
    # the blocks of all heads have each row once, and so have those of some heads
    return Route(merge_parts(parts), (), len(kv_heads), whole.is_partitioned, whole.is_partitioned)


def merge_parts(parts: Iterable[Part]) -> Parts:
    """Return parts in their order; those of a block-sparse branch are merged into fewer calls (`merge_stacks`).

    Parts of a branch must follow one another.
    """
    return Parts(
        Part(branch, block)
        for branch, group in groupby(parts, key=lambda part: part.branch)
        for block in merge_stacks(part.block for part in group)
    )


def merge_neighboring_parts(parts: Iterable[Part]) -> Parts:
    """Return the parts of `merge_parts`, merged further by `merge_neighbors`.

    Blocks of neighbouring rows become larger blocks, and equal blocks at evenly spaced rows become segments of one.
    Parts of a branch must follow one another; no part has a `kv_index` yet.  `route` calls it for a rank's own keys,
    and `Round` for those of each rank that it receives from.
    """
    return Parts(
        Part(branch, block)
        for branch, group in groupby(merge_parts(parts), key=lambda part: part.branch)
        for block in merge_neighbors(part.block for part in group)
    )
