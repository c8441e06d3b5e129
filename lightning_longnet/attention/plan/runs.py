"""A branch as runs: equally spaced rows of one head and one document that see each other.

A segment of 8 rows with rate 2 and offset 0 is one run of 4 rows; rows of other residues belong to no run of this head:

    rows   0 1 2 3 4 5 6 7
    run    x . x . x . x .
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning_longnet.attention.pattern.pattern import Branch

# A band (a window) is cut into tiles of at least and at most so many queries, which share one mask.  A broad band is
# cut along its keys, too: into two narrow ends with masks, and a middle that all queries of the tile see.
BAND_ROWS = (64, 1024)
BAND_SPLIT = 512


class Repeat(NamedTuple):
    """A later branch that shows pairs again: a pair counts once more where the query's index is `queries` and the key's
    is `keys`, both modulo `every`.
    """

    every: int
    queries: int
    keys: int


class Shape(NamedTuple):
    """The shape of a run.  Runs of one shape can be computed in one kernel call.

    The a-th query sees the b-th key iff `low <= a - b <= high`; None is no bound.

        low = high = None       low = 0, high = None       low = 0, high = 1
        x x x x                 x . . .                    x . . .
        x x x x                 x x . .                    x x . .
        x x x x                 x x x .                    . x x .
    """

    queries: int
    keys: int
    shift: int  # from a run's first query row to its first key row
    step: int
    low: int | None = None
    high: int | None = None
    weight: int = 1
    layer: tuple[int, int] = (0, 0)  # runs of different layers may share rows, and must not share a call
    repeats: tuple[Repeat, ...] = ()
    # The queries of two runs of one stack are equal or disjoint, so that the keys of equal queries can be gathered
    stack: int | None = None


class Runs(NamedTuple):
    """Runs of one shape, and the query row at which each begins."""

    shape: Shape
    starts: range


def segments(branch: Branch, offset: int, length: int) -> Iterator[tuple[range, int]]:
    """Yield (first rows of equal segments, their width): the whole segments of a document, then its shorter tail."""
    width = min(branch.segment_length or length, length)
    whole = length // width
    yield range(offset, whole * width + offset, width), width
    if tail := length - whole * width:
        yield range(whole * width + offset, length + offset, tail), tail


def row_count(width: int, offset: int, rate: int) -> int:
    """Return how many of the first `width` rows of a segment have this residue."""
    return max(0, -(-(width - offset) // rate))


def own_runs(branch: Branch, kv_head: int, kv_heads: int, length: int) -> Iterator[Runs]:
    """Yield all runs of a branch for one key head, in a document of `length` tokens."""
    offset = branch.offset(kv_head, kv_heads)
    for starts, width in segments(branch, offset, length):
        rows = row_count(width, offset, branch.dilation_rate)
        if branch.sparsity is not None:
            run = range(0, rows * branch.dilation_rate, branch.dilation_rate)
            for queries, keys in kept_blocks(branch, kv_head, run):
                for each in keys:
                    yield from block(starts, queries, each, branch.is_causal)
            continue
        yield from banded(starts, rows, branch.dilation_rate, branch.is_causal, branch.window)


def banded(
    starts: range, rows: int, step: int, is_causal: bool, window: int | None, weight: int = 1, layer: int = 0
) -> Iterator[Runs]:
    """Yield runs of `rows` rows that see themselves: whole, or in tiles of queries where a window hides the far keys.

    A causal window of 3 keys over 8 rows, in tiles of 4 queries; the second tile needs none of the first two keys:

        x . . . . . . .
        x x . . . . . .
        x x x . . . . .
        . x x x . . . .
        ----------------
        . . x x x . . .
        . . . x x x . .
    """
    if not rows:
        return
    low = 0 if is_causal else None
    high = None if window is None else (window - 1) // step
    if high is None or high >= rows - 1:
        yield Runs(_shape(rows, rows, 0, step, low, None, weight, (layer, 0)), starts)
        return
    low = 0 if is_causal else -high
    breadth = high - low + 1
    is_split = breadth >= BAND_SPLIT
    fewest, most = BAND_ROWS
    tile = min(max(breadth // 2 if is_split else breadth, fewest), most)
    for n, begin in enumerate(range(0, rows, tile)):
        end = min(begin + tile, rows)
        cuts = [begin - high, end - low]
        if is_split:
            cuts[1:1] = [end - high, begin - low]  # all queries of the tile see the keys between these
        for left, right in pairwise(min(max(cut, 0), rows) for cut in cuts):
            if left == right:
                continue
            local = left - begin
            # neighbouring tiles share keys, so that one call may take only every so many of them
            apart = -(-(right - left) // tile)
            sizes = end - begin, right - left
            shape = _shape(*sizes, local * step, step, low + local, high + local, weight, (layer, n % apart))
            yield Runs(shape, shifted(starts, begin * step))


def kept_blocks(branch: Branch, kv_head: int, run: range) -> Iterator[tuple[range, tuple[range, ...]]]:
    """Yield each block of queries of a run's rows with the blocks of keys that are kept for it."""
    assert branch.sparsity is not None
    size = branch.sparsity.block_size
    for i, kept in enumerate(branch.sparsity.kept(len(run), kv_head, branch.is_causal)):
        yield run[i * size : (i + 1) * size], tuple(run[j * size : (j + 1) * size] for j in kept)


def block(
    starts: range, queries: range, keys: range, is_causal: bool, weight: int = 1, stack: int = 0
) -> Iterator[Runs]:
    """Yield a block of kept keys for queries of the same residue, as a run of a stack; rows count from each start."""
    low = _apart(queries, keys) if is_causal else None
    if low is None or low < len(queries):
        shape = _shape(len(queries), len(keys), keys.start - queries.start, queries.step, low, None, weight)
        yield Runs(shape._replace(stack=stack), shifted(starts, queries.start))


def narrow(
    queries: range, keys: range, is_causal: bool, window: int, weight: int, layer: tuple[int, int]
) -> Iterator[Runs]:
    """Yield a kept block beneath a window, without queries that see none of its keys: such runs form no stack."""
    apart, most = _apart(queries, keys), (window - 1) // queries.step
    low, high = apart if is_causal else apart - most, apart + most
    first_query, last_key = max(0, low), min(len(keys), len(queries) - low)
    first_key, last_query = max(0, first_query - high), min(len(queries), last_key + high)
    if first_query >= last_query or first_key >= last_key:
        return
    moved = first_query - first_key
    queries, keys = queries[first_query:last_query], keys[first_key:last_key]
    told = keys.start - queries.start, queries.step, low - moved, high - moved, weight, layer
    yield Runs(_shape(len(queries), len(keys), *told), range(queries.start, queries.start + 1))


def _apart(queries: range, keys: range) -> int:
    """Return how many rows of their residue lie from the first query to the first key."""
    assert keys.step == queries.step
    assert (keys.start - queries.start) % queries.step == 0, "queries and keys have one residue"
    return (keys.start - queries.start) // queries.step


def rectangle(starts: range, queries: range, keys: range) -> Iterator[Runs]:
    """Yield a run whose queries see all of other keys; both ranges are rows, counted from each start."""
    if queries and keys:
        shape = _shape(len(queries), len(keys), keys.start - queries.start, queries.step)
        yield Runs(shape, shifted(starts, queries.start))


def _shape(
    queries: int,
    keys: int,
    shift: int,
    step: int,
    low: int | None = None,
    high: int | None = None,
    weight: int = 1,
    layer: tuple[int, int] = (0, 0),
) -> Shape:
    low = None if low is None or low <= 1 - keys else low
    high = None if high is None or high >= queries - 1 else high
    return Shape(queries, keys, shift, step, low, high, weight, layer)


def shifted(run: range, by: int) -> range:
    """Return the range moved by so many rows."""
    return range(run.start + by, run.stop + by, run.step)
