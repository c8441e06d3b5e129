"""The blocks between two ranks, and the KV rows that these blocks read: a pure function of the plan and the placement.

A KV row is the key and the value of one token in one key head.  Its index on the rank that holds it is
`row * kv_heads + head`, where `row` is the local index of the token.  Both ranks compute the sorted indices of the KV
rows that one needs of the other, so no rank asks for them, and no row is sent twice in an exchange.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch

from lightning_longnet.attention.parallel.placement import Chunk
from lightning_longnet.attention.parallel.shares import ChunkSegments, segments_in, shares
from lightning_longnet.attention.plan.block import Part
from lightning_longnet.attention.plan.blocks import make_plan

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from torch import Tensor

    from lightning_longnet.attention.parallel.placement import Placement
    from lightning_longnet.attention.pattern.branch import Branch
    from lightning_longnet.attention.pattern.pattern import Pattern
    from lightning_longnet.attention.plan.lattice import Lattice

CPU = torch.device("cpu")
# A list of KV rows is faster than a mask of all where fewer than one in this many are needed
SPARSE = 16
# Up to so many runs of rows a block, rows are marked run by run: a tensor operation takes as long as ten runs
FEW_RUNS = 10


class Layout(NamedTuple):
    """The inputs that decide what each rank computes and sends; equal on all ranks.

    `distributed_calls` makes one for samples with equal documents, and the planner for a run that it plans.

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


@lru_cache(8)
def rank_blocks(layout: Layout) -> RankBlocks:
    """Return the blocks between any two ranks of a layout, one object for the last layouts that were asked for.

    `route`, `rounds_volumes`, `busiest_ranks` and `is_local` ask, and `_shown` of planning/exchange.py.
    """
    return RankBlocks(layout)


class PeerBlocks(NamedTuple):
    """The blocks of one rank's queries against the keys of another rank, which holds `tokens` tokens.

    `RankBlocks.blocks` returns it.  Its methods say which KV rows the first rank needs of the other.
    """

    parts: tuple[Part, ...]
    tokens: int
    kv_heads: int

    def mask(self, branches: Collection[int] | None = None, device: torch.device = CPU) -> Tensor:
        """Return a mask of the needed KV rows, (tokens * kv_heads,), for some branches or for all.

        `Round` finds the rows to send and to receive by it, and `_kv_row_counts` of rounds_plan.py counts them.
        """
        keys = [part.block.keys for part in self.parts if branches is None or part.branch in branches]
        if device == CPU and keys and sum(len(side.starts) * side.heads for side in keys) <= FEW_RUNS * len(keys):
            flags = bytearray(self.tokens * self.kv_heads)
            for side in keys:
                side.mark(flags, self.kv_heads)
            return torch.frombuffer(flags, dtype=torch.bool)
        needed = torch.zeros((1, self.tokens, self.kv_heads, 1), dtype=torch.bool, device=device)
        true = torch.ones((), dtype=torch.bool, device=device)
        for side in keys:
            side.write(needed, true)
        return needed.flatten()

    def kv_rows(self) -> Tensor:
        """Return the indices of the needed KV rows, (R,), ascending, int32.

        Tests call it; `Round` reads the mask itself.
        """
        return kv_rows_of(self.mask())

    @property
    def is_sparse(self) -> bool:
        """Whether so few KV rows are needed that a list of them is faster than a mask of all.

        `kv_row_count` and `_kv_row_counts` of rounds_plan.py ask.
        """
        return SPARSE * sum(part.block.keys.size for part in self.parts) < self.tokens * self.kv_heads

    def kv_rows_without_mask(self, branches: Collection[int] | None = None) -> Tensor:
        """Return the indices of `kv_rows` as int64, without a mask of all KV rows; `branches` selects some branches.

        `kv_row_count` and `_kv_row_counts` of rounds_plan.py count rows with it where `is_sparse`.
        """
        indices = [torch.empty(0, dtype=torch.long)]
        for part in self.parts:
            if branches is None or part.branch in branches:
                rows, heads = part.block.keys.indices(torch.device("cpu"))
                indices.append((rows * self.kv_heads + heads).flatten())
        unique: Tensor = torch.cat(indices).unique()
        return unique

    def kv_row_count(self) -> int:
        """Return the number of needed KV rows, over all branches.

        `Round` asks where it computes indices on a GPU, and `RoundsPlan.work` for the tables of plans.  Each row is
        sent once in a round, though several blocks may need it.
        """
        return len(self.kv_rows_without_mask()) if self.is_sparse else int(self.mask().sum())


class _DocumentBlocks:
    """The blocks of some documents that follow one another, and which of them may have rows in a chunk.

    `RankBlocks` makes one for the documents that two ranks have in common.
    """

    def __init__(self, layout: Layout, cuts: tuple[int, ...]) -> None:
        whole = make_plan(layout.pattern, layout.heads, layout.kv_heads, cuts, layout.weighted_segments)
        self.blocks = [(branch, block) for branch, blocks in enumerate(whole.branches) for block in blocks]
        # for each block the first row and the end of its queries and of its keys, to find a rank's blocks quickly
        sides = [[_extent(side) for side in (block.queries, block.keys)] for _, block in self.blocks]
        self._extents = torch.tensor(sides, dtype=torch.long).view(len(sides), 2, 2)
        self._segments: dict[tuple[Chunk, int], dict[int, ChunkSegments | None]] = {}

    def shares(self, queries: Chunk, keys: Chunk) -> Iterator[Part]:
        """Yield the parts of the blocks with queries in one chunk and keys in another, by the local rows of ranks.

        Both may be one chunk, and `keys` all tokens, as in `RankBlocks.visible_pairs`.
        """
        # few blocks have segments with queries in one chunk and keys in the other: only these are cut into shares
        of_queries, of_keys = self._segments_in(queries, 0), self._segments_in(keys, 1)
        for number, in_queries in of_queries.items():
            if number not in of_keys:
                continue
            branch, block = self.blocks[number]
            if in_queries is None:
                in_queries = of_queries[number] = segments_in(block.queries, queries)
            in_keys = of_keys[number]
            if in_keys is None:
                in_keys = of_keys[number] = segments_in(block.keys, keys)
            if in_queries.begin < in_keys.end and in_keys.begin < in_queries.end:
                for share in shares(block, in_queries, in_keys):
                    yield Part(branch, share)

    def _segments_in(self, chunk: Chunk, side: int) -> dict[int, ChunkSegments | None]:
        """Return the numbers of the blocks that may have queries (side 0) or keys (side 1) in a chunk, ascending.

        The value of a number is None until `shares` asks for the block's segments, which it then writes here: most
        blocks have none in the other chunk.
        """
        if (chunk, side) not in self._segments:
            begins, ends = self._extents[:, side].unbind(1)
            numbers = ((begins < chunk.end) & (ends > chunk.begin)).nonzero().flatten().tolist()
            self._segments[chunk, side] = dict.fromkeys(numbers)
        return self._segments[chunk, side]


class RankBlocks:
    """The parts of a plan's blocks that have their queries on one rank and their keys on another, or on the same one.

    `rank_blocks` makes it for a layout, and `_busiest` of placement_choice.py.  Only the documents that have tokens on
    both ranks are planned.  Both ranks plan the same ones, however many others there are, and so agree on what travels
    between them.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._documents: dict[tuple[int, int], _DocumentBlocks] = {}
        self._parts: dict[tuple[int, int], tuple[Part, ...]] = {}
        self._ranges: dict[Chunk, tuple[int, int]] = {}

    def blocks(self, rank: int, source: int, branches: Collection[int] | None = None) -> PeerBlocks:
        """Return the blocks of a rank's queries against the keys of the rank `source`, of some branches or of all.

        `route` calls it on both ranks, which so agree on the KV rows that travel from `source` to `rank`;
        `rounds_volumes` counts these rows.  `source` may be `rank` itself.
        """
        if (rank, source) not in self._parts:
            pairs, parts = self._chunk_pairs(rank, source), list[Part]()
            for documents in self._common_documents(rank, source) if pairs else ():
                for queries, keys in pairs:
                    parts += documents.shares(queries, keys)
            # by branch, and in each branch the blocks of negative weight last
            parts.sort(key=lambda part: (part.branch, -part.block.weight))
            self._parts[rank, source] = tuple(parts)
        parts_of_branches = self._parts[rank, source]
        if branches is not None:
            parts_of_branches = tuple(part for part in parts_of_branches if part.branch in branches)
        return PeerBlocks(parts_of_branches, self.layout.placement.lengths[source], self.layout.kv_heads)

    def _chunk_pairs(self, rank: int, source: int) -> list[tuple[Chunk, Chunk]]:
        """Return a rank's chunks of queries, each with those chunks of keys of `source` that it may see."""
        is_causal, pairs = self.layout.pattern.is_causal, list[tuple[Chunk, Chunk]]()
        sources = self.layout.placement.chunks(source)
        for queries in self.layout.placement.chunks(rank):
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
        for chunk in self.layout.placement.chunks(rank):
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
        for chunk in self.layout.placement.chunks(rank):
            ranks |= self.layout.placement.holders(*self._visible_range(chunk))
        return sorted(ranks - {rank})

    def visible_pairs(self, rank: int) -> int:
        """Return the number of (query, key) pairs of a rank's queries with the keys of all ranks, over all heads.

        A repeated pair counts as often as branches show it, or once if the pattern's multiplicity is "set".
        `_busiest` of placement_choice.py takes the maximum over the ranks.
        """
        placement = self.layout.placement
        everywhere = Chunk(0, placement.length, 0)
        parts = (
            part
            for documents in self._common_documents(rank, rank)
            for queries in placement.chunks(rank)
            for part in documents.shares(queries, everywhere)
        )
        return sum(part.block.pairs * part.block.weight for part in parts)

    def estimated_traffic(self, rank: int) -> tuple[float, float]:
        """Return an estimate of (received, sent) token rows of a rank, from how far its segments and documents span.

        `busiest_ranks` chooses by it which of many ranks to plan, and `_shown` of the planner which of them to show.
        """
        before = after = 0.0
        for chunk in self.layout.placement.chunks(rank):
            for branch in self.layout.pattern.branches:
                begin, end = self._branch_range(chunk, branch)
                before += (chunk.begin - begin) / branch.dilation_rate
                after += (end - chunk.end) / branch.dilation_rate
        # under a causal mask the keys of earlier tokens are received, and keys are sent to later tokens only
        return (before, after) if self.layout.pattern.is_causal else (before + after, before + after)

    def _visible_range(self, chunk: Chunk) -> tuple[int, int]:
        """Return (begin, end) of the tokens that those of a chunk may see in some branch, or that may see them."""
        if chunk not in self._ranges:
            begins, ends = zip(
                *(self._branch_range(chunk, branch) for branch in self.layout.pattern.branches), strict=True
            )
            self._ranges[chunk] = min(begins), max(ends)
        return self._ranges[chunk]

    def _branch_range(self, chunk: Chunk, branch: Branch) -> tuple[int, int]:
        """Return (begin, end) of the tokens that those of a chunk may see in a branch, or that may see them there.

        These are the tokens of the same documents, segments and windows; the causal mask is not applied.
        """
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
    """Return whether the keys of each query are on the rank of the query, for all ranks of the layout.

    `schedule` asks, as nothing has to travel then, and `layer_kinds` of the planner.
    """
    return rank_blocks(layout).is_local()


def kv_rows_of(mask: Tensor, count: int | None = None) -> Tensor:
    """Return the indices of the True entries of a mask of KV rows (tokens * kv_heads,), ascending, on its device.

    `Round` calls it for each peer.  They are int32, half the size of int64: they lie in memory beside the rows of a
    round.  If the caller gives their `count`, it waits for no device, as nonzero() would.
    """
    if count is None:
        return mask.nonzero().flatten().int()
    rows = torch.arange(len(mask), dtype=torch.int32, device=mask.device)
    # where each row goes: those that are not needed all go behind the last, and are cut off
    target = torch.where(mask, mask.cumsum(0) - 1, count)
    return rows.new_empty(count + 1).scatter_(0, target, rows)[:count]


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
