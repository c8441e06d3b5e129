"""The pairs that one branch shows to one key/value head of one document, as runs of equally spaced rows.

A run is the rows of one segment that have the head's residue.  They see each other, and nothing else of that branch:

    segment_length 8, dilation_rate 2, a head with offset 1, a document of 16 rows

    . x . x . x . x | . x . x . x . x        two runs of 4 rows: starts range(1, 17, 8), step 2

Rows are counted from the beginning of the document, and a and b are the places of a query and a key in their runs.  A
window cuts a run into tiles, and a sparsity into blocks; each of these is a run of queries and a run of keys, too.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning_longnet.attention.pattern.pattern import Branch

# The fewest and the most queries in a tile of a band; the tiles of a band share one mask.  A band of at least
# BAND_SPLIT keys is also cut along its keys: into two narrow ends, and a middle that needs no mask.
BAND_ROWS = (64, 1024)
BAND_SPLIT = 512


class Repeat(NamedTuple):
    """A rule: the pair of query a and key b of a run counts once more if a is `queries` and b `keys`, modulo `every`.

    `with_repeats` makes one for each later branch that shows pairs of a run again, `squares.py` one with queries and
    keys exchanged.
    """

    every: int
    queries: int
    keys: int


class Shape(NamedTuple):
    """The properties that runs must have in common to be computed in one kernel call.

    The a-th query sees the b-th key iff `low <= a - b <= high`; a bound that is None does not bind.

        low = high = None       low = 0, high = None       low = 0, high = 1
        x x x x                 x . . .                    x . . .
        x x x x                 x x . .                    x x . .
        x x x x                 x x x .                    . x x .

    Attributes:
        queries, keys: the number of rows of a run of queries, and of the run of keys that it sees.
        shift: the distance from the first query row to the first key row.
        step: the distance between two rows of a run.
        low, high: the mask, as above.
        weight: how often each pair counts; a negative weight removes pairs that another block counts too often.
        layer: runs of different layers may have rows in common, which one call must not have.
        repeats: which pairs count more than once, where a pair that several branches show is computed once.
        stack: a number if the runs are blocks of a sparsity: two runs of queries with one number are equal or disjoint,
            so that all keys of the same queries can be merged into one call.  None for all other runs.
    """

    queries: int
    keys: int
    shift: int
    step: int
    low: int | None = None
    high: int | None = None
    weight: int = 1
    layer: tuple[int, int] = (0, 0)
    repeats: tuple[Repeat, ...] = ()
    stack: int | None = None


class Runs(NamedTuple):
    """Runs of one shape; `starts` are their first query rows, counted from the beginning of the document.

    The functions of this module and of overlap.py yield them, and `_head_runs` collects them over the documents.
    """

    shape: Shape
    starts: range


def segments(branch: Branch, offset: int, length: int) -> Iterator[tuple[range, int]]:
    """Yield (starts, width): where the runs of the whole segments of a document begin, and then that of a shorter tail.

    Each start is the first row of a segment plus `offset`; `width` is the number of rows of a segment, and `length`, at
    least 1, that of the document.  `own_runs` asks, and `_relation` and `_outside` of overlap.py.
    """
    width = min(branch.segment_length or length, length)
    whole = length // width
    yield range(offset, whole * width + offset, width), width
    if tail := length - whole * width:
        yield range(whole * width + offset, length + offset, tail), tail


def row_count(width: int, offset: int, rate: int) -> int:
    """Return how many of the first `width` rows of a segment have this offset modulo the rate.

    It is 0 if the offset lies behind the segment's end.  `own_runs` asks, and `_relation` and `_outside` of overlap.py.
    """
    return max(0, -(-(width - offset) // rate))


def own_runs(branch: Branch, kv_head: int, kv_heads: int, length: int) -> Iterator[Runs]:
    """Yield all runs that a branch shows to a key/value head in a document of `length` rows.

    These are the segments' rows of the head's residue, cut into tiles by a window and into kept blocks by a sparsity.
    `_head_runs` takes them, unless a branch is to leave out pairs of earlier ones (`exclusive_runs`).
    """
    offset = branch.offset(kv_head, kv_heads)
    for starts, width in segments(branch, offset, length):
        rows = row_count(width, offset, branch.dilation_rate)
        if branch.sparsity is not None:
            run = range(0, rows * branch.dilation_rate, branch.dilation_rate)
            for queries, keys in kept_blocks(branch, kv_head, run):
                for key_block in keys:
                    yield from kept_block_runs(starts, queries, key_block, branch.is_causal)
            continue
        yield from band_runs(starts, rows, branch.dilation_rate, branch.is_causal, branch.window)


def band_runs(
    starts: range, rows: int, step: int, is_causal: bool, window: int | None, weight: int = 1, layer: int = 0
) -> Iterator[Runs]:
    """Yield runs of `rows` rows that see themselves, as a whole or, where a window masks far keys, as tiles.

    `own_runs` takes them for a branch without a sparsity, and `exclusive_runs` for an intersection of such branches.
    There are none where `rows` is 0.  For `weight` see `Shape`; `layer` is the first number of its `layer`.

    A tile is some queries and the keys that they may see; a broad one is cut into three along its keys:

        keys      0 1 2 3 4 5 6       a causal window of 4 rows (low = 0, high = 3), and the tile of queries 4 and 5
        query 4   . x x|x|x . .       far end: keys 1 and 2; middle: key 3, which both queries see; near end: keys 4
        query 5   . . x|x|x x .       and 5
    """
    if not rows:
        return
    low = 0 if is_causal else None
    high = None if window is None else (window - 1) // step
    if high is None or high >= rows - 1:
        yield Runs(_without_idle_bounds(Shape(rows, rows, 0, step, low, None, weight, (layer, 0))), starts)
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
            cuts[1:1] = [end - high, begin - low]  # every query of the tile sees the keys between these two
        for left, right in pairwise(min(max(cut, 0), rows) for cut in cuts):
            if left == right:
                continue
            local = left - begin
            # The keys of neighbouring tiles overlap, and a call must not hold a key twice.  Tile n and tile n + layers
            # have none in common, so the tiles go to this many calls in rotation.
            layers = -(-(right - left) // tile)
            shape = Shape(
                queries=end - begin,
                keys=right - left,
                shift=local * step,
                step=step,
                low=low + local,
                high=high + local,
                weight=weight,
                layer=(layer, n % layers),
            )
            yield Runs(_without_idle_bounds(shape), shifted(starts, begin * step))


def kept_blocks(branch: Branch, kv_head: int, run: range) -> Iterator[tuple[range, tuple[range, ...]]]:
    """Yield each block of queries of a run, as rows, with the blocks of keys that the sparsity keeps for it.

    `own_runs` takes them, and `_relation` of overlap.py.
    """
    assert branch.sparsity is not None
    size = branch.sparsity.block_size
    for i, kept in enumerate(branch.sparsity.kept(len(run), kv_head, branch.is_causal)):
        yield run[i * size : (i + 1) * size], tuple(run[j * size : (j + 1) * size] for j in kept)


def kept_block_runs(
    starts: range, queries: range, keys: range, is_causal: bool, weight: int = 1, stack: int = 0
) -> Iterator[Runs]:
    """Yield runs of a block of queries against a block of keys of one residue, unless the causal mask excludes all.

    Both ranges are rows, counted from each of `starts`.  `own_runs` takes them, and `exclusive_runs` for an
    intersection with kept blocks.  For `weight` and `stack` see `Shape`.
    """
    low = _steps_between(queries, keys) if is_causal else None
    if low is None or low < len(queries):
        shape = Shape(len(queries), len(keys), keys.start - queries.start, queries.step, low, None, weight)
        yield Runs(_without_idle_bounds(shape)._replace(stack=stack), shifted(starts, queries.start))


def windowed_block_runs(
    queries: range, keys: range, is_causal: bool, window: int, weight: int, layer: tuple[int, int]
) -> Iterator[Runs]:
    """Yield one run or none: the rows of a block of queries and a block of keys that see each other in a window.

    `exclusive_runs` takes it for pairs that both a branch with a window and one with kept blocks show.  The cut queries
    of two blocks may overlap without being equal, so these runs have no stack.

    Args:
        queries, keys: the rows of the blocks in a document, of one residue.
        is_causal, window: the mask.
        weight, layer: see `Shape`.
    """
    # query a sees key b iff low <= a - b <= high, with both counted in their blocks
    distance, most = _steps_between(queries, keys), (window - 1) // queries.step
    low, high = distance if is_causal else distance - most, distance + most
    # rows are cut off at both ends until every query sees a key and every key is seen
    first_query, last_key = max(0, low), min(len(keys), len(queries) - low)
    first_key, last_query = max(0, first_query - high), min(len(queries), last_key + high)
    if first_query >= last_query or first_key >= last_key:
        return
    moved = first_query - first_key  # the rows that are left are counted from their new first ones
    queries, keys = queries[first_query:last_query], keys[first_key:last_key]
    shape = Shape(
        queries=len(queries),
        keys=len(keys),
        shift=keys.start - queries.start,
        step=queries.step,
        low=low - moved,
        high=high - moved,
        weight=weight,
        layer=layer,
    )
    yield Runs(_without_idle_bounds(shape), range(queries.start, queries.start + 1))


def rectangle_runs(starts: range, queries: range, keys: range) -> Iterator[Runs]:
    """Yield runs of queries that see all keys of another range; none if one of the two is empty.

    Both ranges are rows, counted from each of `starts`.  `_outside` of overlap.py calls it for pairs of different inner
    segments.
    """
    if queries and keys:
        shape = Shape(len(queries), len(keys), keys.start - queries.start, queries.step)
        yield Runs(shape, shifted(starts, queries.start))


def _steps_between(queries: range, keys: range) -> int:
    """Return how many steps the first key lies behind the first query: key b is not after query a iff a - b >= it."""
    assert keys.step == queries.step
    assert (keys.start - queries.start) % queries.step == 0, "queries and keys have one residue"
    return (keys.start - queries.start) // queries.step


def _without_idle_bounds(shape: Shape) -> Shape:
    """Return the shape with None for a bound that masks no pair, so that equal masks are equal shapes."""
    low, high = shape.low, shape.high
    return shape._replace(
        low=None if low is None or low <= 1 - shape.keys else low,
        high=None if high is None or high >= shape.queries - 1 else high,
    )


def shifted(run: range, by: int) -> range:
    """Return the range with each element moved by `by`.

    Runs are moved to their documents by it (`_head_runs`), tiles and kept blocks to their places in a run, and segments
    by `Lattice.shifted`.
    """
    return range(run.start + by, run.stop + by, run.step)
