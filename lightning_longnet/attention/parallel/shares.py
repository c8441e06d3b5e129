"""Shares of a plan: the part of each block that has its queries on one rank and its keys on another.

The rows of a block lie at equal distances, and so do those of them that lie between two tokens: a share is a block,
too.  Segments with all queries in one chunk of tokens and all keys in another are taken at once.  A segment that a
border cuts is taken alone:

    tokens     0 1 2 3 4 5 6 7 8 9 ...        a block of segments of 4 tokens
    ranks      0 0 0 0 0 0|1 1 1 1 1 1        a border at token 6
    segments   a a a a b b|b b c c c c

    queries of rank 0, keys of rank 0    segment a as a whole, and the first two queries and keys of b
    queries of rank 1, keys of rank 0    the last two queries of b against its first two keys
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, NamedTuple

from lightning_longnet.attention.plan.block import Block, Part
from lightning_longnet.attention.plan.lattice import Lattice

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lightning_longnet.attention.parallel.placement import Chunk
    from lightning_longnet.attention.plan.runs import Repeat


class _KeptRows(NamedTuple):
    """Rows of one segment and key head, by their indices in the segment: from `first_*` up to, not with, `last_*`."""

    first_query: int
    last_query: int
    first_key: int
    last_key: int


class ChunkSegments(NamedTuple):
    """The segments of a lattice that may have rows in a chunk: those from `begin` up to, but not with, `end`.

    Of these, those from `first` up to `last` have all their rows in it; none do where `first` is `last`.
    """

    chunk: Chunk
    begin: int
    end: int
    first: int
    last: int


def segments_in(lattice: Lattice, chunk: Chunk) -> ChunkSegments:
    """Return the segments of a lattice that may have rows in a chunk; `_DocumentBlocks.shares` asks, and keeps them."""
    starts = lattice.starts
    # from the first row of a segment to the last one of its last head
    reach = (lattice.rows - 1) * lattice.step + (lattice.heads - 1) * lattice.row_shift
    begin, end = _first_from(starts, chunk.begin - reach), _first_from(starts, chunk.end)
    if reach >= chunk.end - chunk.begin:  # no segment is so short
        return ChunkSegments(chunk, begin, end, end, end)
    return ChunkSegments(chunk, begin, end, _first_from(starts, chunk.begin), _first_from(starts, chunk.end - reach))


def _first_from(starts: range | tuple[int, ...], row: int) -> int:
    """Return the number of the first segment that begins at a row or after it; that of segments if none does."""
    if not isinstance(starts, range):
        return bisect_left(starts, row)
    number, count = -((starts.start - row) // starts.step), len(starts)
    return 0 if number < 0 else number if number < count else count


class _ShareRows(NamedTuple):
    """The rows of a share, by their places on the ranks, and its key heads `first` to `last`, counted in the block.

    The starts are those of its segments; for the other fields see `Block`.
    """

    query_starts: range | tuple[int, ...]
    query_rows: int
    key_starts: range | tuple[int, ...]
    key_rows: int
    first: int
    last: int
    low: int | None
    high: int | None
    repeats: tuple[Repeat, ...]


class BlockShares:
    """The shares of blocks that have equal rows, and differ in their heads: a border cuts all of them alike.

    Each share is made once.  Ranks that lie at equal places of their segments have equal shares, so that thousands of
    ranks have few different ones.

    Args:
        blocks: the blocks, with their branches.
    """

    def __init__(self, blocks: Sequence[tuple[int, Block]]) -> None:
        self._blocks, block = blocks, blocks[0][1]
        assert not block.head_repeats, "only `batched` sets them, in the calls of a rank just before they run"
        self.queries, self.keys = block.queries, block.keys
        self._low, self._high, self._repeats = block.low, block.high, block.repeats
        self._group = block.queries.heads // block.keys.heads
        self._parts: dict[_ShareRows, tuple[Part, ...]] = {}

    def between(self, queries: ChunkSegments, keys: ChunkSegments) -> list[tuple[Part, ...]]:
        """Return the shares with queries in one chunk and keys in another, each as one part for every block.

        `_DocumentBlocks.shares` calls it for each chunk of a rank's queries and each chunk of keys, of another rank, of
        the same one, or of all tokens.

        Args:
            queries, keys: the segments of the queries in one chunk, and those of the keys in the other.
        """
        begin, end = max(queries.begin, keys.begin), min(queries.end, keys.end)
        if begin >= end:
            return []
        # of the segments that may have rows in both chunks, begin ... end, those that lie in them as a whole
        whole_begin = min(max(begin, queries.first, keys.first), end)
        whole_end = max(min(end, queries.last, keys.last), whole_begin)
        assert 0 <= begin <= whole_begin <= whole_end <= end <= len(self.queries.starts)
        shares = list[_ShareRows]()
        if whole_begin < whole_end:
            sides = (self.queries, queries.chunk), (self.keys, keys.chunk)
            moved = [x.segments(whole_begin, whole_end).shifted(chunk.local - chunk.begin) for x, chunk in sides]
            rows = moved[0].starts, moved[0].rows, moved[1].starts, moved[1].rows
            shares.append(_ShareRows(*rows, 0, self.keys.heads, self._low, self._high, self._repeats))
        for s in (*range(begin, whole_begin), *range(whole_end, end)):
            shares += self._cut(s, queries.chunk, keys.chunk)
        return [self._parts.get(share) or self._made(share) for share in shares]

    def _cut(self, s: int, queries: Chunk, keys: Chunk) -> Iterator[_ShareRows]:
        """Yield the shares of segment `s`, of which a border cuts off rows.

        The heads of a diagonal have different rows, so a border may cut them at different places.  Heads that are cut
        at the same place are one share.
        """
        many = self.keys.heads
        rows = self._rows_in_chunks(s, 0, queries, keys)
        # from head to head the rows of a diagonal move one way, so if those of the last are the same, all are
        if not self.keys.row_shift or rows == self._rows_in_chunks(s, many - 1, queries, keys):
            kept = self._kept_rows(*rows)
            if kept is not None:
                yield self._share_rows(s, 0, many, kept, queries, keys)
            return
        rows_of_heads = [self._kept_rows(*self._rows_in_chunks(s, head, queries, keys)) for head in range(many)]
        first = 0
        for last in range(1, many + 1):
            if last < many and rows_of_heads[last] == rows_of_heads[first]:
                continue
            kept = rows_of_heads[first]
            if kept is not None:
                yield self._share_rows(s, first, last, kept, queries, keys)
            first = last

    def _rows_in_chunks(self, s: int, key_head: int, queries: Chunk, keys: Chunk) -> tuple[int, int, int, int]:
        """Return the rows of segment `s` and of a key head and its query heads that lie in the chunks."""
        return (
            *_rows_inside(self.queries, s, key_head * self._group, queries),
            *_rows_inside(self.keys, s, key_head, keys),
        )

    def _kept_rows(self, first_query: int, last_query: int, first_key: int, last_key: int) -> _KeptRows | None:
        """Return the rows that a share keeps of those that lie in the chunks; None if no query sees a key.

        Rows are dropped that the mask excludes: queries behind a border that see no key before it, for example.
        """
        if first_query >= last_query or first_key >= last_key:
            return None
        # Keep the queries that see a key that is kept, and the keys that such a query sees.  One pass over each bound
        # is enough: as low <= high, the rows that `high` leaves still see each other under `low`.
        if self._low is not None:  # b <= a - low
            last_key = min(last_key, last_query - self._low)
            first_query = max(first_query, first_key + self._low)
        if self._high is not None:  # b >= a - high
            first_key = max(first_key, first_query - self._high)
            last_query = min(last_query, last_key + self._high)
        if first_query >= last_query or first_key >= last_key:
            return None
        return _KeptRows(first_query, last_query, first_key, last_key)

    def _share_rows(self, s: int, first: int, last: int, kept: _KeptRows, queries: Chunk, keys: Chunk) -> _ShareRows:
        """Return the share of segment `s` with the rows that `_kept_rows` found, of the key heads `first` to `last`.

        `queries` and `keys` are the chunks that hold these rows.
        """
        query_rows, key_rows = kept.last_query - kept.first_query, kept.last_key - kept.first_key
        # low <= a - b <= high for the a-th query and the b-th key: both now count from the first rows that stay
        moved, low, high = kept.first_query - kept.first_key, self._low, self._high
        # a bound that masks no pair is dropped, so that more shares have one shape
        if low is not None:
            low = None if low - moved <= 1 - key_rows else low - moved
        if high is not None:
            high = None if high - moved >= query_rows - 1 else high - moved
        repeats = self._repeats and tuple(
            repeat._replace(
                queries=(repeat.queries - kept.first_query) % repeat.every,
                keys=(repeat.keys - kept.first_key) % repeat.every,
            )
            for repeat in self._repeats
        )
        query_start = _local_row(self.queries, s, first * self._group, kept.first_query, queries)
        key_start = _local_row(self.keys, s, first, kept.first_key, keys)
        query_starts, key_starts = range(query_start, query_start + 1), range(key_start, key_start + 1)
        return _ShareRows(query_starts, query_rows, key_starts, key_rows, first, last, low, high, repeats)

    def _made(self, share: _ShareRows) -> tuple[Part, ...]:
        """Make a share: one part for every block."""
        group, first, last = self._group, share.first, share.last
        parts, keys_of = [], dict[int, Lattice]()
        for branch, block in self._blocks:
            queries = _sublattice(block.queries, share.query_starts, first * group, last * group, share.query_rows)
            keys = keys_of.get(id(block.keys))  # query heads of one key head share its lattice
            if keys is None:
                keys = _sublattice(block.keys, share.key_starts, first, last, share.key_rows)
                keys_of[id(block.keys)] = keys
            # not by replace(), which takes twice as long: a plan of many documents has thousands of shares
            cut = Block(queries, keys, share.low, share.high, block.weight, share.repeats, block.stack)
            parts.append(Part(branch, cut))
        self._parts[share] = tuple(parts)
        return self._parts[share]


def rows_alone(block: Block) -> Block:
    """Return a block without its heads: blocks of which this is equal are cut alike, by one `BlockShares`."""
    queries, keys = (Lattice(x.starts, x.rows, x.step, 0, x.heads, 0, x.row_shift) for x in (block.queries, block.keys))
    return Block(queries, keys, block.low, block.high, repeats=block.repeats)


def _rows_inside(lattice: Lattice, s: int, a: int, chunk: Chunk) -> tuple[int, int]:
    """Return [first, end) of the rows of segment `s` and head `a` that lie in a chunk, as indices i of the lattice."""
    row = lattice.starts[s] + a * lattice.row_shift
    first, last = -((row - chunk.begin) // lattice.step), -((row - chunk.end) // lattice.step)
    rows = lattice.rows
    # not by min() and max(): a plan of many ranks or documents asks a hundred thousand times
    return (0 if first < 0 else first if first < rows else rows), (0 if last < 0 else last if last < rows else rows)


def _local_row(lattice: Lattice, s: int, head: int, i: int, chunk: Chunk) -> int:
    """Return the row of the rank's local tensor that is row `i` of segment `s` and a head of a lattice."""
    return lattice.starts[s] + head * lattice.row_shift + i * lattice.step + chunk.local - chunk.begin


def _sublattice(lattice: Lattice, starts: range | tuple[int, ...], first: int, last: int, rows: int) -> Lattice:
    """Return the rows of a rank's local tensor from `starts` on, of the heads of a lattice from `first` to `last`."""
    head = lattice.head + first * lattice.head_step
    return Lattice(starts, rows, lattice.step, head, last - first, lattice.head_step, lattice.row_shift)
