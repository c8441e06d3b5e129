"""`shares`: the parts of a block that have their queries on one rank and their keys on another (or the same) rank.

The rows of a block are evenly spaced, so those between two tokens are evenly spaced as well: a share is a block.
Segments that lie within one stretch of tokens are taken at once; segments that a border cuts are taken one by one:

    segments   |0 0 0 0|1 1 1 1|2 2 2 2|3 3 3 3|
    ranks      |0 0 0 0 0 0 0 0 0 0|1 1 1 1 1 1|      rank 0 has segments 0 and 1, and a part of 2
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning_longnet.attention.parallel.placement import Stretch
    from lightning_longnet.attention.plan.blocks import Block
    from lightning_longnet.attention.plan.lattice import Lattice


class _Clip(NamedTuple):
    """The queries and keys of one segment and key head that lie in two stretches, by their index in the run."""

    first_query: int
    last_query: int
    first_key: int
    last_key: int


def shares(block: Block, queries: Stretch, keys: Stretch) -> Iterator[Block]:
    """Yield the parts of a block with queries in one stretch and keys in another, in the local rows of each rank."""
    count = len(block.queries.starts)
    begin, end = _touching(block.queries, queries)
    first, last = _touching(block.keys, keys)
    begin, end = max(begin, first), min(end, last)
    inner = [_inside(lattice, stretch) for lattice, stretch in ((block.queries, queries), (block.keys, keys))]
    whole_begin = min(max(begin, *(a for a, _ in inner)), end)
    whole_end = max(min(end, *(b for _, b in inner)), whole_begin)
    assert 0 <= begin <= whole_begin <= whole_end <= max(end, begin) <= count or begin >= end
    if begin >= end:
        return
    if whole_begin < whole_end:
        yield _moved(
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


def _cut(block: Block, s: int, queries: Stretch, keys: Stretch) -> Iterator[Block]:
    """Yield the shares of one segment: heads of a diagonal have other rows, and so may be cut at other places."""
    group = block.queries.heads // block.keys.heads
    clips = [(a, _clip(block, s, a, queries, keys)) for a in range(block.keys.heads)]
    for clip, members in groupby(clips, key=lambda item: item[1]):
        if clip is None:
            continue
        a = [member for member, _ in members]
        rows = clip.last_query - clip.first_query
        apart = clip.first_query - clip.first_key
        low = None if block.low is None else block.low - apart
        high = None if block.high is None else block.high - apart
        key_rows = clip.last_key - clip.first_key
        yield _moved(
            replace(
                block,
                queries=_part(block.queries, s, a[0] * group, (a[-1] + 1) * group, clip.first_query, rows),
                keys=_part(block.keys, s, a[0], a[-1] + 1, clip.first_key, key_rows),
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


def _clip(block: Block, s: int, a: int, queries: Stretch, keys: Stretch) -> _Clip | None:
    """Return the rows of a segment and key head in both stretches, or None where no query sees a key."""
    group = block.queries.heads // block.keys.heads
    first_query, last_query = _between(block.queries, s, a * group, queries)
    first_key, last_key = _between(block.keys, s, a, keys)
    if first_query >= last_query or first_key >= last_key:
        return None
    # Leave out queries that see no key and keys that no query sees.  As low <= high, what the second bound leaves still
    # satisfies the first
    if block.low is not None:  # b <= a - low
        last_key = min(last_key, last_query - block.low)
        first_query = max(first_query, first_key + block.low)
    if block.high is not None:  # b >= a - high
        first_key = max(first_key, first_query - block.high)
        last_query = min(last_query, last_key + block.high)
    if first_query >= last_query or first_key >= last_key:
        return None
    return _Clip(first_query, last_query, first_key, last_key)


def _between(lattice: Lattice, s: int, a: int, stretch: Stretch) -> tuple[int, int]:
    """Return the first row of a segment and head in a stretch, and the end of those rows."""
    row = lattice.starts[s] + a * lattice.row_shift
    first, last = (-((row - border) // lattice.step) for border in (stretch.begin, stretch.end))
    return min(max(first, 0), lattice.rows), min(max(last, 0), lattice.rows)


def _touching(lattice: Lattice, stretch: Stretch) -> tuple[int, int]:
    """Return the first segment that may have a row in a stretch, and the end of those segments."""
    span = lattice.rows * lattice.step + (lattice.heads - 1) * lattice.row_shift
    return bisect_left(lattice.starts, stretch.begin - span + 1), bisect_left(lattice.starts, stretch.end)


def _inside(lattice: Lattice, stretch: Stretch) -> tuple[int, int]:
    """Return the first segment with all its rows in a stretch, and the end of those segments."""
    last = (lattice.rows - 1) * lattice.step + (lattice.heads - 1) * lattice.row_shift
    return bisect_left(lattice.starts, stretch.begin), bisect_left(lattice.starts, stretch.end - last)


def _part(lattice: Lattice, s: int, first: int, last: int, row: int, rows: int) -> Lattice:
    """Return `rows` rows from `row` on, of segment s and the heads `first` to `last`."""
    part = lattice.segments(s, s + 1).diagonal(first, last).shifted(row * lattice.step)
    start = part.starts[0]
    return replace(part, starts=range(start, start + 1), rows=rows)


def _moved(block: Block, queries: Stretch, keys: Stretch) -> Block:
    """Return the block in the local rows of the ranks that hold the two stretches."""
    return replace(
        block,
        queries=block.queries.shifted(queries.local - queries.begin),
        keys=block.keys.shifted(keys.local - keys.begin),
    )
