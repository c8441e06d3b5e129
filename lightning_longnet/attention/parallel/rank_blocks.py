"""The blocks between any two ranks: a pure function of the plan and the placement, which all ranks compute alike."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from functools import lru_cache
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

from lightning_longnet.attention.parallel.peer_blocks import PeerBlocks
from lightning_longnet.attention.parallel.placement import Chunk
from lightning_longnet.attention.parallel.shares import BlockShares, rows_alone, segments_in
from lightning_longnet.attention.plan.block import Part
from lightning_longnet.attention.plan.blocks import make_plan

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from lightning_longnet.attention.parallel.placement import Placement
    from lightning_longnet.attention.parallel.shares import ChunkSegments
    from lightning_longnet.attention.pattern.pattern import Pattern
    from lightning_longnet.attention.plan.block import Block
    from lightning_longnet.attention.plan.lattice import Lattice


class Layout(NamedTuple):
    """The inputs that decide what each rank computes and sends; equal on all ranks.

    `distributed_calls` makes one for samples with equal documents, and the planner for a run that it plans.

    Attributes:
        pattern: which keys a query sees.
        heads, kv_heads: of the whole layer.
        cuts: where the documents of a row begin, and where the last one ends.
        placement: which rank holds which token.
        weighted_segments: as for `plan`: up to how many segments a repeated pair is computed once; 0 computes it in
            each branch that shows it.
    """

    pattern: Pattern
    heads: int
    kv_heads: int
    cuts: tuple[int, ...]
    placement: Placement
    weighted_segments: int = 0


@lru_cache(8)
def rank_blocks(layout: Layout) -> RankBlocks:
    """Return the blocks between any two ranks of a layout, one object for the last layouts that were asked for.

    `route`, `rounds_volumes`, `busiest_ranks` and `is_local` ask, and `_shown` of planning/exchange.py.
    """
    return RankBlocks(layout)


class _DocumentBlocks:
    """The blocks of some documents that follow one another, and which of them may have rows in a chunk.

    `RankBlocks` makes one for the documents that two ranks have in common.
    """

    def __init__(self, layout: Layout, cuts: tuple[int, ...]) -> None:
        whole = make_plan(layout.pattern, layout.heads, layout.kv_heads, cuts, layout.weighted_segments)
        self.blocks = [(branch, block) for branch, blocks in enumerate(whole.branches) for block in blocks]
        alike: dict[Block, list[int]] = {}
        for number, (_, block) in enumerate(self.blocks):
            alike.setdefault(rows_alone(block), []).append(number)
        # the numbers of blocks that are cut alike, and their shares
        self._groups = [(numbers, BlockShares([self.blocks[n] for n in numbers])) for numbers in alike.values()]
        # for each group the first row and the end of its queries and of its keys, to find a rank's blocks quickly
        self._extents = [[_extent(side) for side in (rows.queries, rows.keys)] for rows in alike]
        self._segments: dict[tuple[Chunk, int], dict[int, ChunkSegments | None]] = {}

    def shares(self, queries: Chunk, keys: Chunk) -> list[Part]:
        """Return the parts of the blocks with queries in one chunk and keys in another, by the local rows of ranks.

        Both may be one chunk, and `keys` all tokens, as in `RankBlocks.visible_pairs`.
        """
        # few blocks have segments with queries in one chunk and keys in the other: only these are cut into shares
        of_queries, of_keys = self._segments_in(queries, 0), self._segments_in(keys, 1)
        of_blocks = list[tuple[int, tuple[Part, ...]]]()
        for group, in_queries in of_queries.items():
            if group not in of_keys:
                continue
            numbers, shares = self._groups[group]
            if in_queries is None:
                in_queries = of_queries[group] = segments_in(shares.queries, queries)
            in_keys = of_keys[group]
            if in_keys is None:
                in_keys = of_keys[group] = segments_in(shares.keys, keys)
            if in_queries.begin < in_keys.end and in_keys.begin < in_queries.end:
                cut = shares.between(in_queries, in_keys)
                of_blocks += zip(numbers, zip(*cut, strict=True), strict=True) if cut else ()
        return [part for _, parts in sorted(of_blocks, key=itemgetter(0)) for part in parts]

    def _segments_in(self, chunk: Chunk, side: int) -> dict[int, ChunkSegments | None]:
        """Return the groups of blocks that may have queries (side 0) or keys (side 1) in a chunk, ascending.

        The value of a number is None until `shares` asks for the block's segments, which it then writes here: most
        blocks have none in the other chunk.
        """
        found = self._segments.get((chunk, side))
        if found is None:
            extents = enumerate(extent[side] for extent in self._extents)
            groups = [group for group, (begin, end) in extents if begin < chunk.end and end > chunk.begin]
            found = self._segments[chunk, side] = dict.fromkeys(groups)
        return found


class RankBlocks:
    """The parts of a plan's blocks that have their queries on one rank and their keys on another, or on the same one.

    `rank_blocks` makes it for a layout, and `_busiest` of placement_choice.py.  Only the documents that have tokens on
    both ranks are planned.  Both ranks plan the same ones, however many others there are, and so agree on what travels
    between them.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._documents: dict[tuple[int, int], _DocumentBlocks] = {}
        self._blocks: dict[tuple[int, int], PeerBlocks] = {}
        self._distinct: dict[tuple[int, ...], PeerBlocks] = {}
        self._visible_ranges: dict[Chunk, tuple[int, int]] = {}
        self._chunks: dict[int, tuple[Chunk, ...]] = {}

    def blocks(self, rank: int, source: int, branches: Collection[int] | None = None) -> PeerBlocks:
        """Return the blocks of a rank's queries against the keys of the rank `source`, of some branches or of all.

        `route` calls it on both ranks, which so agree on the KV rows that travel from `source` to `rank`;
        `rounds_volumes` counts these rows.  `source` may be `rank` itself.
        """
        tokens = self.layout.placement.lengths[source]
        found = self._blocks.get((rank, source))
        if found is None:
            pairs, parts = self._chunk_pairs(rank, source), list[Part]()
            for documents in self._common_documents(rank, source) if pairs else ():
                for queries, keys in pairs:
                    parts += documents.shares(queries, keys)
            # by branch, and in each branch the blocks of negative weight last
            parts.sort(key=lambda part: (part.branch, -part.block.weight))
            found = self._blocks[rank, source] = self._peer_blocks(parts, tokens)
        if branches is None:
            return found
        return self._peer_blocks([part for part in found.parts if part.branch in branches], tokens)

    def _peer_blocks(self, parts: list[Part], tokens: int) -> PeerBlocks:
        """Return the object for these parts, by their identity: to compare their blocks would take as long as a plan.

        Of the pairs of ranks many have the same parts, and what these need is counted once.
        """
        key = tokens, *map(id, parts)  # the parts live as long as the object
        found = self._distinct.get(key)
        if found is None:
            found = self._distinct[key] = PeerBlocks(tuple(parts), tokens, self.layout.kv_heads)
        return found

    def _chunk_pairs(self, rank: int, source: int) -> list[tuple[Chunk, Chunk]]:
        """Return a rank's chunks of queries, each with those chunks of keys of `source` that it may see."""
        is_causal, pairs = self.layout.pattern.is_causal, list[tuple[Chunk, Chunk]]()
        sources = self._chunks_of(source)
        for queries in self._chunks_of(rank):
            begin, end = self._visible_range(queries)
            if is_causal:
                end = min(end, queries.end)
            pairs += [(queries, keys) for keys in sources if keys.begin < end and keys.end > begin]
        return pairs

    def _common_documents(self, rank: int, source: int) -> list[_DocumentBlocks]:
        """Return the blocks of the documents with tokens on both ranks, which may be one rank.

        There is one `_DocumentBlocks` for each run of documents that follow one another, planned once and kept.
        """
        common = sorted(self._documents_on(rank) & self._documents_on(source))
        documents = []
        for first, last in _consecutive(common):
            if (first, last) not in self._documents:
                self._documents[first, last] = _DocumentBlocks(self.layout, self.layout.cuts[first : last + 2])
            documents.append(self._documents[first, last])
        return documents

    def _documents_on(self, rank: int) -> set[int]:
        """Return the numbers of the documents with tokens on a rank: document i begins at `cuts[i]`."""
        cuts, numbers = self.layout.cuts, set[int]()
        for chunk in self._chunks_of(rank):
            numbers.update(range(bisect_right(cuts, chunk.begin) - 1, bisect_left(cuts, chunk.end)))
        return numbers

    def is_local(self) -> bool:
        """Return whether the keys of each query are on the rank of the query, for all ranks.

        Only then does the exchange "local" serve.  The function `is_local` asks.
        """
        ranks = range(self.layout.placement.ranks)
        return not any(self.blocks(rank, source).parts for rank in ranks for source in self.possible_peers(rank))

    def possible_peers(self, rank: int) -> list[int]:
        """Return the other ranks, ascending, that a document, a segment or a window of this rank's tokens may span to.

        Of thousands of ranks these are a few, so only their blocks are planned.  `route` and `rounds_volumes` ask, and
        `is_local`.  A rank without tokens has none.
        """
        ranks: set[int] = set()
        for chunk in self._chunks_of(rank):
            ranks |= self.layout.placement.holders(*self._visible_range(chunk))
        return sorted(ranks - {rank})

    def visible_pairs(self, rank: int) -> int:
        """Return the number of (query, key) pairs of a rank's queries with the keys of all ranks, over all heads.

        A repeated pair counts as often as branches show it, or once if the pattern's multiplicity is "set".
        `_busiest` of placement_choice.py takes the maximum over the ranks.
        """
        length, pairs = self.layout.placement.length, 0
        for documents in self._common_documents(rank, rank):
            for queries in self._chunks_of(rank):
                # keys are counted from the first query: ranks at equal places have the same parts, counted once
                everywhere = Chunk(0, length, -queries.begin)
                pairs += self._peer_blocks(documents.shares(queries, everywhere), length).pairs
        return pairs

    def estimated_traffic(self, rank: int) -> tuple[float, float]:
        """Return an estimate of (received, sent) token rows of a rank, from how far its documents, segments and windows
        reach.

        `busiest_ranks` chooses by it which of many ranks to plan, and `_shown` of the planner which of them to show.
        """
        before = after = 0.0
        for chunk in self._chunks_of(rank):
            for branch, (begin, end) in zip(self.layout.pattern.branches, self._branch_ranges(chunk), strict=True):
                before += (chunk.begin - begin) / branch.dilation_rate
                after += (end - chunk.end) / branch.dilation_rate
        # under a causal mask the keys of earlier tokens are received, and keys are sent to later tokens only
        return (before, after) if self.layout.pattern.is_causal else (before + after, before + after)

    def _visible_range(self, chunk: Chunk) -> tuple[int, int]:
        """Return the range (begin, end) around the `_branch_ranges` of a chunk; it is kept."""
        if chunk not in self._visible_ranges:
            begins, ends = zip(*self._branch_ranges(chunk), strict=True)
            self._visible_ranges[chunk] = min(begins), max(ends)
        return self._visible_ranges[chunk]

    def _branch_ranges(self, chunk: Chunk) -> list[tuple[int, int]]:
        """Return for each branch the range (begin, end) of all tokens that may be in a pair with a token of a chunk.

        The chunk is part of it.  The range is that of its documents, segments and windows.  It may be too wide, as
        neither the causal mask nor dilation or sparsity is applied.  `_visible_range` joins the ranges of all branches,
        and `estimated_traffic` counts the tokens around the chunk.
        """
        cuts, ranges = self.layout.cuts, []
        first_document, last_document = bisect_right(cuts, chunk.begin) - 1, bisect_left(cuts, chunk.end) - 1
        for branch in self.layout.pattern.branches:
            begin, end = cuts[first_document], cuts[last_document + 1]
            width, window = branch.segment_length, branch.window
            if width is not None:
                begin += (chunk.begin - begin) // width * width
                last_begin = cuts[last_document]
                end = min(end, last_begin + ((chunk.end - 1 - last_begin) // width + 1) * width)
            if window is not None:
                begin = max(begin, chunk.begin - window + 1)
                end = min(end, chunk.end + window - 1)
            ranges.append((begin, end))
        return ranges

    def _chunks_of(self, rank: int) -> tuple[Chunk, ...]:
        """Return the chunks of a rank, which are asked for again and again."""
        found = self._chunks.get(rank)
        if found is None:
            found = self._chunks[rank] = self.layout.placement.chunks(rank)
        return found


def is_local(layout: Layout) -> bool:
    """Return whether the keys of each query are on the rank of the query, for all ranks of the layout.

    `schedule` asks, as nothing has to travel then, and `layer_kinds` of the planner.
    """
    return rank_blocks(layout).is_local()


def _consecutive(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Return ascending numbers as (first, last) of each run without gaps."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = runs[-1][0], number
        else:
            runs.append((number, number))
    return runs


def _extent(side: Lattice) -> tuple[int, int]:
    """Return the first row of a lattice, and the row after its last."""
    last = side.starts[-1] + (side.heads - 1) * side.row_shift + (side.rows - 1) * side.step
    return side.starts[0], last + 1
