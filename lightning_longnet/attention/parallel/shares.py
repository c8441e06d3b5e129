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
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning_longnet.attention.parallel.placement import Chunk
    from lightning_longnet.attention.plan.block import Block
    from lightning_longnet.attention.plan.lattice import Lattice


class _Clip(NamedTuple):
    """The rows of one segment and key head that a share keeps, by their places in the runs of queries and keys."""

    first_query: int
    last_query: int
    first_key: int
    last_key: int


def shares(block: Block, queries: Chunk, keys: Chunk) -> Iterator[Block]:
    """Yield the parts of a block with queries in one chunk and keys in another, in the local rows of their ranks."""
    count = len(block.queries.starts)
    begin, end = _touching(block.queries, queries)
    first, last = _touching(block.keys, keys)
    begin, end = max(begin, first), min(end, last)
    # of the segments that may have rows in both chunks, begin ... end, those that lie in them as a whole
    inner = [_inside(lattice, chunk) for lattice, chunk in ((block.queries, queries), (block.keys, keys))]
    whole_begin = min(max(begin, *(a for a, _ in inner)), end)
    whole_end = max(min(end, *(b for _, b in inner)), whole_begin)
    assert 0 <= begin <= whole_begin <= whole_end <= max(end, begin) <= count or begin >= end
    if begin >= end:
        return
    if whole_begin < whole_end:
        yield _in_local_rows(
            replace(
                block,
                queries=block.queries.segments(whole_begin, whole_end),
                keys=block.keys.segments(whole_begin, whole_end),
            ),
            queries,
            keys,
        )
    for s in (*range(begin, whole_begin), *range(whole_end, end)):
        yield from _cut(block, s, queries, keys)


def _cut(block: Block, s: int, queries: Chunk, keys: Chunk) -> Iterator[Block]:
    """Yield the shares of segment `s`, of which a border cuts off rows.

    The heads of a diagonal have different rows, so a border may cut them at different places.  Heads that are cut at
    the same place are one share.
    """
    group = block.queries.heads // block.keys.heads
    clips = [(a, _clip(block, s, a, queries, keys)) for a in range(block.keys.heads)]
    for clip, members in groupby(clips, key=lambda item: item[1]):
        if clip is None:
            continue
        heads = [head for head, _ in members]
        rows = clip.last_query - clip.first_query
        # a and b count from the first rows that stay, so the bounds of a - b move by their difference
        moved = clip.first_query - clip.first_key
        low = None if block.low is None else block.low - moved
        high = None if block.high is None else block.high - moved
        key_rows = clip.last_key - clip.first_key
        yield _in_local_rows(
            replace(
                block,
                queries=_part(block.queries, s, heads[0] * group, (heads[-1] + 1) * group, clip.first_query, rows),
                keys=_part(block.keys, s, heads[0], heads[-1] + 1, clip.first_key, key_rows),
                # a bound that masks no pair is dropped, so that more shares have one shape
                low=None if low is None or low <= 1 - key_rows else low,
                high=None if high is None or high >= rows - 1 else high,
                repeats=tuple(
                    repeat._replace(
                        queries=(repeat.queries - clip.first_query) % repeat.every,
                        keys=(repeat.keys - clip.first_key) % repeat.every,
                    )
                    for repeat in block.repeats
                ),
            ),
            queries,
            keys,
        )


def _clip(block: Block, s: int, a: int, queries: Chunk, keys: Chunk) -> _Clip | None:
    """Return the rows of segment `s` and key head `a` that a share keeps; None if no query sees a key.

    Rows are dropped, too, that the mask excludes: queries behind a border that see no key before it, for example.
    """
    group = block.queries.heads // block.keys.heads
    first_query, last_query = _between(block.queries, s, a * group, queries)
    first_key, last_key = _between(block.keys, s, a, keys)
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
    return _Clip(first_query, last_query, first_key, last_key)


def _between(lattice: Lattice, s: int, a: int, chunk: Chunk) -> tuple[int, int]:
    """Return the rows of segment `s` and head `a` that lie in a chunk, by their places in the run, first and end."""
    row = lattice.starts[s] + a * lattice.row_shift
    first, last = (-((row - border) // lattice.step) for border in (chunk.begin, chunk.end))
    return min(max(first, 0), lattice.rows), min(max(last, 0), lattice.rows)


def _touching(lattice: Lattice, chunk: Chunk) -> tuple[int, int]:
    """Return the segments that may have a row in a chunk, first and end."""
    extent = lattice.rows * lattice.step + (lattice.heads - 1) * lattice.row_shift
    return bisect_left(lattice.starts, chunk.begin - extent + 1), bisect_left(lattice.starts, chunk.end)


def _inside(lattice: Lattice, chunk: Chunk) -> tuple[int, int]:
    """Return the segments that have all rows in a chunk, first and end."""
    last = (lattice.rows - 1) * lattice.step + (lattice.heads - 1) * lattice.row_shift
    return bisect_left(lattice.starts, chunk.begin), bisect_left(lattice.starts, chunk.end - last)


def _part(lattice: Lattice, s: int, first: int, last: int, row: int, rows: int) -> Lattice:
    """Return `rows` rows of segment `s`, from place `row` of the run on, of the heads `first` to `last`."""
    part = lattice.segments(s, s + 1).diagonal(first, last).shifted(row * lattice.step)
    start = part.starts[0]
    return replace(part, starts=range(start, start + 1), rows=rows)


def _in_local_rows(block: Block, queries: Chunk, keys: Chunk) -> Block:
    """Return the block with local rows of the ranks in place of rows of the whole sequence."""
    return replace(
        block,
        queries=block.queries.shifted(queries.local - queries.begin),
        keys=block.keys.shifted(keys.local - keys.begin),
    )
