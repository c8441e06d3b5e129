"""The blocks and rows that travel between two ranks: a pure function of the plan and the placement.

A KV row is the key and the value of one token in one key head.  Its index on the rank that holds it is
`row * kv_heads + head`, where `row` is the local index of the token.  Both ranks compute the sorted indices of the KV
rows that one needs of the other, so no rank asks for them, and no row is sent twice in an exchange.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import torch

from lightning_longnet.attention.parallel.shares import shares
from lightning_longnet.attention.plan.block import Part
from lightning_longnet.attention.plan.blocks import make_plan, plan
from lightning_longnet.attention.plan.paged_keys import merge_stacks
from lightning_longnet.attention.plan.parts import Parts

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from torch import Tensor

    from lightning_longnet.attention.parallel.placement import Chunk, Placement
    from lightning_longnet.attention.pattern.branch import Branch
    from lightning_longnet.attention.pattern.pattern import Pattern
    from lightning_longnet.attention.plan.lattice import Lattice

CPU = torch.device("cpu")
# A list of KV rows is faster than a mask of all where fewer than one in this many are needed
SPARSE = 16


class Layout(NamedTuple):
    """The inputs that decide what each rank computes and sends; equal on all ranks.

    Attributes:
        pattern: which keys a query sees.
        heads, kv_heads: of the whole layer.
        cuts: where the documents of a row begin, and where the last one ends.
        placement: which rank holds which token.
        weighted_segments: as for `plan`: whether repeated pairs are computed once.
    """

    pattern: Pattern
    heads: int
    kv_heads: int
    cuts: tuple[int, ...]
    placement: Placement
    weighted_segments: int = 0


class PeerBlocks(NamedTuple):
    """The blocks of one rank's queries against the keys of another rank, which holds `tokens` tokens."""

    parts: tuple[Part, ...]
    tokens: int
    kv_heads: int

    def mask(self, branches: Collection[int] | None = None, device: torch.device = CPU) -> Tensor:
        """Return a mask of the needed KV rows, (tokens * kv_heads,), for some branches or for all."""
        needed = torch.zeros((1, self.tokens, self.kv_heads, 1), dtype=torch.bool, device=device)
        true = torch.ones((), dtype=torch.bool, device=device)
        for part in self.parts:
            if branches is None or part.branch in branches:
                part.block.keys.write(needed, true)
        return needed.flatten()

    def kv_rows(self) -> Tensor:
        """Return the indices of the needed KV rows, (R,), ascending, int32."""
        return _kv_rows(self.mask())

    @property
    def is_sparse(self) -> bool:
        """Whether so few KV rows are needed that a list of them is smaller than a mask of all."""
        return SPARSE * sum(part.block.keys.size for part in self.parts) < self.tokens * self.kv_heads

    def kv_rows_without_mask(self, branches: Collection[int] | None = None) -> Tensor:
        """Return the same indices as int64 without a mask of all KV rows; `branches` selects some branches."""
        indices = [torch.empty(0, dtype=torch.long)]
        for part in self.parts:
            if branches is None or part.branch in branches:
                rows, heads = part.block.keys.indices(torch.device("cpu"))
                indices.append((rows * self.kv_heads + heads).flatten())
        unique: Tensor = torch.cat(indices).unique()
        return unique

    def kv_row_count(self) -> int:
        """Return the number of needed KV rows."""
        return len(self.kv_rows_without_mask()) if self.is_sparse else int(self.mask().sum())


class RoundIndices(NamedTuple):
    """The indices of the KV rows of one round, and the parts that are computed with the received ones.

    Attributes:
        send: for each other rank the indices of this rank's KV rows that it needs, (R,), ascending.
        receive: for each other rank the indices, on that rank, of the KV rows that this rank needs, (R,), ascending.
        parts: the parts, with the index of each key among all received KV rows.
    """

    send: dict[int, Tensor]
    receive: dict[int, Tensor]
    parts: Parts

    @property
    def nbytes(self) -> int:
        """The bytes of all indices."""
        of_parts = (part.kv_index for part in self.parts if part.kv_index is not None)
        return sum(x.nbytes for x in (*self.send.values(), *self.receive.values(), *of_parts))


@dataclass(frozen=True, eq=False)
class Round:
    """One exchange: what this rank sends, what it receives, and the blocks that it computes with that.

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

    def indices(self, device: torch.device = CPU, kept_bytes: float = 0) -> RoundIndices:
        """Return the indices of the round on a device.

        They are made once and kept for a gather, which keeps the rows as well, and where they take at most
        `kept_bytes`: those of all rounds of a dense ring would be as many as the tokens of a whole sequence.
        """
        if device not in self._kept:
            made = self._indices(device)
            if not self.saves_rows and made.nbytes > kept_bytes:
                return made
            self._kept[device] = made
        return self._kept[device]

    @cached_property
    def _kept(self) -> dict[torch.device, RoundIndices]:
        return {}

    @cached_property
    def _parts(self) -> dict[int, Parts]:
        """The parts with the keys of each rank."""
        return {rank: merge_parts(blocks.parts) for rank, blocks in self.receives.items()}

    @cached_property
    def _counts(self) -> tuple[dict[int, int], dict[int, int]]:
        """The numbers of KV rows that are sent to and received from each rank."""
        sent, received = (
            {rank: blocks.kv_row_count() for rank, blocks in side.items()} for side in (self.sends, self.receives)
        )
        return sent, received

    def _indices(self, device: torch.device) -> RoundIndices:
        """Compute the indices; on a GPU from nothing that lies on the host, and without waiting for the device."""
        sent, received = ({}, {}) if device.type == "cpu" else self._counts
        receive, parts, first = {}, [], 0
        for rank, blocks in self.receives.items():
            mask = blocks.mask(device=device)
            receive[rank] = _kv_rows(mask, received.get(rank))
            # the index of each needed KV row among all that this round receives, (1, tokens, kv_heads, 1)
            places = (mask.cumsum(0, dtype=torch.int32) + (first - 1)).view(1, blocks.tokens, blocks.kv_heads, 1)
            for part in self._parts[rank]:
                parts.append(part._replace(kv_index=part.block.keys.read(places)[0, ..., 0].clone()))
            first += len(receive[rank])
        parts.sort(key=lambda part: part.branch)  # dropout computes its words once for each run of one branch
        send = {rank: _kv_rows(blocks.mask(device=device), sent.get(rank)) for rank, blocks in self.sends.items()}
        return RoundIndices(send, receive, Parts(parts))


@dataclass(frozen=True, eq=False)
class Route:
    """A rank's work in one call of attention: the blocks on its own keys, and the rounds in their order.

    `writes_queries` and `writes_keys` say that the first branch of `own` shows every row once, as a query and as a key:
    its results are written, not added, and the accumulators need no initial value.
    """

    own: Parts
    rounds: tuple[Round, ...]
    kv_heads: int
    writes_queries: bool = False
    writes_keys: bool = False


def route(layout: Layout, rank: int, exchanges: tuple[str, ...]) -> Route:
    """Return a rank's route.  "gather" has one round with all ranks, "ring" one for each step."""
    gathers, rings = (tuple(i for i, kind in enumerate(exchanges) if kind == name) for name in ("gather", "ring"))
    assert len(gathers) + len(rings) == len(exchanges) == len(layout.pattern.branches)
    between, ranks = rank_blocks(layout), layout.placement.ranks
    peers = between.neighbours(rank)
    rounds = [_round(between, rank, peers, peers, gathers)] if gathers else []
    # only the steps in which this rank receives from or sends to a rank that a segment, document or window spans to
    for step in sorted({(rank - r) % ranks for r in peers} | {(r - rank) % ranks for r in peers}) if rings else ():
        before, after = (rank - step) % ranks, (rank + step) % ranks
        rounds.append(_round(between, rank, [before], [after], rings, step))
    own = merge_parts(between.blocks(rank, rank).parts)
    return Route(own, tuple(r for r in rounds if r.sends or r.receives), layout.kv_heads)


def _round(
    between: RankBlocks, rank: int, sources: list[int], targets: list[int], branches: tuple[int, ...], step: int = 0
) -> Round:
    """Return the round in which a rank receives from `sources` and sends to `targets`, without idle ranks."""
    receives = {r: blocks for r in sources if (blocks := between.blocks(rank, r, branches)).parts}
    sends = {r: blocks for r in targets if (blocks := between.blocks(r, rank, branches)).parts}
    return Round(sends, receives, saves_rows=step == 0, ring_step=step)


@lru_cache(8)
def rank_blocks(layout: Layout) -> RankBlocks:
    """Return the blocks between any two ranks of a layout."""
    return RankBlocks(layout)


class _DocumentBlocks:
    """The blocks of some documents that follow one another, and which of them may have rows on a rank."""

    def __init__(self, layout: Layout, cuts: tuple[int, ...]) -> None:
        whole = make_plan(layout.pattern, layout.heads, layout.kv_heads, cuts, layout.weighted_segments)
        self._placement = layout.placement
        self.blocks = [(branch, block) for branch, blocks in enumerate(whole.branches) for block in blocks]
        # for each block the first row and the end of its queries and of its keys, to find a rank's blocks quickly
        sides = [[_extent(side) for side in (block.queries, block.keys)] for _, block in self.blocks]
        self._extents = torch.tensor(sides, dtype=torch.long).view(len(sides), 2, 2)
        self._touching: dict[tuple[int, int], set[int]] = {}

    def of(self, rank: int, side: int) -> set[int]:
        """Return the numbers of the blocks that may have queries (side 0) or keys (side 1) on a rank."""
        if (rank, side) not in self._touching:
            begins, ends = self._extents[:, side].unbind(1)
            numbers: set[int] = set()
            for chunk in self._placement.chunks(rank):
                numbers.update(((begins < chunk.end) & (ends > chunk.begin)).nonzero().flatten().tolist())
            self._touching[rank, side] = numbers
        return self._touching[rank, side]


class RankBlocks:
    """The parts of a plan's blocks that have their queries on one rank and their keys on another.

    The documents that have tokens on both are planned alone.  Both ranks plan the same ones, however many others there
    are, and so agree on what travels between them.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._documents: dict[tuple[int, int], _DocumentBlocks] = {}
        self._parts: dict[tuple[int, int], tuple[Part, ...]] = {}

    def blocks(self, rank: int, source: int, branches: Collection[int] | None = None) -> PeerBlocks:
        """Return the blocks of a rank's queries against the keys of `source`."""
        if (rank, source) not in self._parts:
            chunks, parts = self.layout.placement.chunks, list[Part]()
            for documents in self._common_documents(rank, source):
                # blocks with queries here and keys there are few of all: the rest is not tried
                parts += (
                    Part(branch, share)
                    for branch, block in (
                        documents.blocks[n] for n in sorted(documents.of(rank, 0) & documents.of(source, 1))
                    )
                    for queries in chunks(rank)
                    for keys in chunks(source)
                    for share in shares(block, queries, keys)
                )
            # by branch, and without blocks of negative weight before others of their branch
            parts.sort(key=lambda part: (part.branch, -part.block.weight))
            self._parts[rank, source] = tuple(parts)
        parts_of_branches = self._parts[rank, source]
        if branches is not None:
            parts_of_branches = tuple(part for part in parts_of_branches if part.branch in branches)
        return PeerBlocks(parts_of_branches, self.layout.placement.lengths[source], self.layout.kv_heads)

    def _common_documents(self, rank: int, source: int) -> list[_DocumentBlocks]:
        """Return the documents with tokens on both ranks, those that follow one another as one."""
        common = sorted(self._documents_on(rank) & self._documents_on(source))
        found = []
        for first, last in _consecutive(common):
            if (first, last) not in self._documents:
                self._documents[first, last] = _DocumentBlocks(self.layout, self.layout.cuts[first : last + 2])
            found.append(self._documents[first, last])
        return found

    def _documents_on(self, rank: int) -> set[int]:
        """Return the numbers of the documents with tokens on a rank."""
        cuts, numbers = self.layout.cuts, set[int]()
        for chunk in self.layout.placement.chunks(rank):
            numbers.update(range(bisect_right(cuts, chunk.begin) - 1, bisect_left(cuts, chunk.end)))
        return numbers

    def is_local(self) -> bool:
        """Return whether the keys of each query are on the rank of the query."""
        ranks = range(self.layout.placement.ranks)
        return not any(self.blocks(rank, source).parts for rank in ranks for source in self.neighbours(rank))

    def neighbours(self, rank: int) -> list[int]:
        """Return the ranks that a document, a segment or a window may span to: a few of thousands."""
        ranks: set[int] = set()
        for chunk in self.layout.placement.chunks(rank):
            reaches = [self._reach(chunk, branch) for branch in self.layout.pattern.branches]
            ranks |= self.layout.placement.holders(min(a for a, _ in reaches), max(b for _, b in reaches))
        return sorted(ranks - {rank})

    def traffic(self, rank: int) -> tuple[float, float]:
        """Return an estimate of (received, sent) token rows of a rank, from how far its segments and documents span."""
        before = after = 0.0
        for chunk in self.layout.placement.chunks(rank):
            for branch in self.layout.pattern.branches:
                begin, end = self._reach(chunk, branch)
                before += (chunk.begin - begin) / branch.dilation_rate
                after += (end - chunk.end) / branch.dilation_rate
        # under a causal mask the keys of earlier tokens are received, and keys are sent to later tokens only
        return (before, after) if self.layout.pattern.is_causal else (before + after, before + after)

    def _reach(self, chunk: Chunk, branch: Branch) -> tuple[int, int]:
        """Return the tokens, from begin to end, that a branch may show to these tokens or these tokens to it."""
        cuts = self.layout.cuts
        first, last = (bisect_right(cuts, token) - 1 for token in (chunk.begin, chunk.end - 1))
        begin, end = cuts[first], cuts[last + 1]
        if branch.segment_length is not None:
            width = branch.segment_length
            begin += (chunk.begin - begin) // width * width
            end = min(end, cuts[last] + ((chunk.end - 1 - cuts[last]) // width + 1) * width)
        if branch.window is not None:
            begin = max(begin, chunk.begin - branch.window + 1)
            end = min(end, chunk.end + branch.window - 1)
        return begin, end


def is_local(layout: Layout) -> bool:
    """Return whether the keys of each query are on the rank of the query."""
    return rank_blocks(layout).is_local()


def head_parts(layout: Layout, kv_heads: range) -> Parts:
    """Return the blocks over the whole sequence of some key heads and of the query heads that they serve."""
    whole = plan(layout.pattern, layout.heads, layout.kv_heads, layout.cuts, layout.weighted_segments)
    group, parts = layout.heads // layout.kv_heads, []
    for branch, blocks in enumerate(whole.branches):
        for block in blocks:
            queries, keys = block.queries, block.keys
            members = [a for a in range(keys.heads) if keys.head + a * keys.head_step in kv_heads]
            if members:
                per_key, first, last = queries.heads // keys.heads, members[0], members[-1] + 1
                queries, keys = queries.diagonal(first * per_key, last * per_key), keys.diagonal(first, last)
                queries = replace(queries, head=queries.head - kv_heads.start * group)
                keys = replace(keys, head=keys.head - kv_heads.start)
                parts.append(Part(branch, replace(block, queries=queries, keys=keys)))
    return merge_parts(parts)


def merge_parts(parts: Iterable[Part]) -> Parts:
    """Return parts in the order in which they run; those of a sparsity are merged into fewer calls (`merge_stacks`)."""
    return Parts(
        Part(branch, block)
        for branch, group in groupby(parts, key=lambda part: part.branch)
        for block in merge_stacks(part.block for part in group)
    )


def _consecutive(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Return ascending numbers as (first, last) of each run without gaps."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = runs[-1][0], number
        else:
            runs.append((number, number))
    return runs


def _kv_rows(mask: Tensor, count: int | None = None) -> Tensor:
    """Return the indices of the KV rows in a mask, ascending.

    They are int32, half the size of int64: they lie in memory beside the rows of a round.  With their `count` it waits
    for no device, as nonzero() would.
    """
    if count is None:
        return mask.nonzero().flatten().int()
    rows = torch.arange(len(mask), dtype=torch.int32, device=mask.device)
    places = torch.where(mask, mask.cumsum(0) - 1, count)  # those that are not needed all go behind the last one
    return rows.new_empty(count + 1).scatter_(0, places, rows)[:count]


def _extent(side: Lattice) -> tuple[int, int]:
    """Return the first row of a lattice, and the row after its last."""
    last = side.starts[-1] + (side.heads - 1) * side.row_shift + (side.rows - 1) * side.step
    return side.starts[0], last + 1
