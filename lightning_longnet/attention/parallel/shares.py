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
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from lightning_longnet.attention.plan.block import Block
from lightning_longnet.attention.plan.lattice import Lattice

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning_longnet.attention.parallel.placement import Chunk


class _Rows(NamedTuple):
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


def shares(block: Block, queries: ChunkSegments, keys: ChunkSegments) -> Iterator[Block]:
    """Yield the parts of a block with queries in one chunk and keys in another, in the local rows of their ranks.

    `_DocumentBlocks.shares` calls it for each chunk of a rank's queries and each chunk of keys, of another rank, of the
    same one, or of all tokens.

    Args:
        block: a block of the plan of whole documents.
        queries, keys: the segments of the block's queries in one chunk, and those of its keys in the other.
    """
    assert not block.head_repeats, "only `batched` sets them, in the calls of a rank just before they run"
    begin, end = max(queries.begin, keys.begin), min(queries.end, keys.end)
    if begin >= end:
        return
    # of the segments that may have rows in both chunks, begin ... end, those that lie in them as a whole
    whole_begin = min(max(begin, queries.first, keys.first), end)
    whole_end = max(min(end, queries.last, keys.last), whole_begin)
    assert 0 <= begin <= whole_begin <= whole_end <= end <= len(block.queries.starts)
    chunks = queries.chunk, keys.chunk
    if whole_begin < whole_end:
        sides = zip((block.queries, block.keys), chunks, strict=True)
        moved = [x.segments(whole_begin, whole_end).shifted(chunk.local - chunk.begin) for x, chunk in sides]
        yield replace(block, queries=moved[0], keys=moved[1])
    for s in (*range(begin, whole_begin), *range(whole_end, end)):
        yield from _cut(block, s, *chunks)


def _cut(block: Block, s: int, queries: Chunk, keys: Chunk) -> Iterator[Block]:
    """Yield the shares of segment `s`, of which a border cuts off rows.

    The heads of a diagonal have different rows, so a border may cut them at different places.  Heads that are cut at
    the same place are one share.
    """
    many = block.keys.heads
    rows = [_rows_in_chunks(block, s, head, queries, keys) for head in {0, many - 1}]
    if rows[0] == rows[-1]:  # from head to head the rows of a diagonal move one way, so those between are the same
        rows_of_heads = [_kept_rows(block, rows[0])] * many
    else:
        rows_of_heads = [_kept_rows(block, _rows_in_chunks(block, s, head, queries, keys)) for head in range(many)]
    first = 0
    for last in range(1, many + 1):
        if last < many and rows_of_heads[last] == rows_of_heads[first]:
            continue
        kept = rows_of_heads[first]
        if kept is not None:
            yield _share_of(block, s, range(first, last), kept, queries, keys)
        first = last


def _share_of(block: Block, s: int, heads: range, kept: _Rows, queries: Chunk, keys: Chunk) -> Block:
    """Return the share of segment `s` with the rows that `_kept_rows` found, of some key heads and their query heads.

    `queries` and `keys` are the chunks that hold these rows, and the share names the rows by their places on the ranks.
    """
    group = block.queries.heads // block.keys.heads
    query_rows, key_rows = range(kept.first_query, kept.last_query), range(kept.first_key, kept.last_key)
    # low <= a - b <= high for the a-th query and the b-th key: both now count from the first rows that stay
    moved = kept.first_query - kept.first_key
    low = None if block.low is None else block.low - moved
    high = None if block.high is None else block.high - moved
    return Block(  # not by replace(), which takes twice as long: a plan of many documents has thousands of shares
        _sublattice(block.queries, s, range(heads.start * group, heads.stop * group), query_rows, queries),
        _sublattice(block.keys, s, heads, key_rows, keys),
        # a bound that masks no pair is dropped, so that more shares have one shape
        None if low is None or low <= 1 - len(key_rows) else low,
        None if high is None or high >= len(query_rows) - 1 else high,
        block.weight,
        tuple(
            repeat._replace(
                queries=(repeat.queries - kept.first_query) % repeat.every,
                keys=(repeat.keys - kept.first_key) % repeat.every,
            )
            for repeat in block.repeats
        ),
        block.stack,
    )


def _rows_in_chunks(block: Block, s: int, key_head: int, queries: Chunk, keys: Chunk) -> _Rows:
    """Return the rows of segment `s` and of a key head and its query heads that lie in the chunks.

    The query rows are computed for the first of these query heads.
    """
    group = block.queries.heads // block.keys.heads
    of_queries = _rows_inside(block.queries, s, key_head * group, queries)
    return _Rows(*of_queries, *_rows_inside(block.keys, s, key_head, keys))


def _kept_rows(block: Block, rows: _Rows) -> _Rows | None:
    """Return the rows that a share keeps of those that lie in the chunks; None if no query sees a key.

    Rows are dropped that the mask excludes: queries behind a border that see no key before it, for example.
    """
    first_query, last_query, first_key, last_key = rows
    if first_query >= last_query or first_key >= last_key:
        return None
    # Keep the queries that see a key that is kept, and the keys that such a query sees.  One pass over each bound is
    # enough: as low <= high, the rows that `high` leaves still see each other under `low`.
    if block.low is not None:  # b <= a - low
        last_key = min(last_key, last_query - block.low)
        first_query = max(first_query, first_key + block.low)
    if block.high is not None:  # b >= a - high
        first_key = max(first_key, first_query - block.high)
        last_query = min(last_query, last_key + block.high)
    if first_query >= last_query or first_key >= last_key:
        return None
    return _Rows(first_query, last_query, first_key, last_key)


def _rows_inside(lattice: Lattice, s: int, a: int, chunk: Chunk) -> tuple[int, int]:
    """Return [first, end) of the rows of segment `s` and head `a` that lie in a chunk, as indices i of the lattice."""
    row = lattice.starts[s] + a * lattice.row_shift
    first, last = -((row - chunk.begin) // lattice.step), -((row - chunk.end) // lattice.step)
    rows = lattice.rows
    # not by min() and max(): a plan of many ranks or documents asks a hundred thousand times
    return (0 if first < 0 else first if first < rows else rows), (0 if last < 0 else last if last < rows else rows)


def _sublattice(lattice: Lattice, s: int, heads: range, rows: range, chunk: Chunk) -> Lattice:
    """Return segment `s` restricted to some heads and to rows i in `rows`, as rows of the rank's local tensor."""
    start = lattice.starts[s] + heads.start * lattice.row_shift + rows.start * lattice.step
    start += chunk.local - chunk.begin
    head = lattice.head + heads.start * lattice.head_step
    starts = range(start, start + 1)
    return Lattice(starts, len(rows), lattice.step, head, len(heads), lattice.head_step, lattice.row_shift)
