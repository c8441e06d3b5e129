"""The pairs that several branches show: a "set" counts them once, and a "multiset" need not compute them twice.

Where branches nest, what a branch shows beyond the earlier ones is the branch without their segments: plain rectangles,
and fewer pairs than the branch has.  Elsewhere it is computed by inclusion and exclusion, with blocks of negative
weight.  Both rest on one fact: a branch splits the rows of a head into runs that see only themselves, or kept blocks of
themselves, and so does the intersection of two branches.
"""

from __future__ import annotations

from itertools import pairwise
from math import gcd
from typing import TYPE_CHECKING, NamedTuple

from lightning_longnet.attention.plan.runs import (
    Repeat,
    Runs,
    band_runs,
    kept_block_runs,
    kept_blocks,
    rectangle_runs,
    row_count,
    segments,
    shifted,
    windowed_block_runs,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lightning_longnet.attention.pattern.pattern import Branch

# Rows and columns of a tile of pairs with weights: each tile is merged, so that the five branches of
# benchmarks/ratios.py took 6 % longer with 1024
REPEAT_TILE = 2048


def nests(inner: Branch, outer: Branch, kv_heads: int) -> bool:
    """Return whether `inner` shows every pair that `outer` shows within one segment of `inner`, for every head.

    `exclusive_runs` and `repeats_align` ask, for each branch and the next coarser one.
    """
    if inner.window or outer.window or inner.sparsity or outer.sparsity or inner.is_causal != outer.is_causal:
        return False
    if outer.dilation_rate % inner.dilation_rate:
        return False
    if inner.segment_length is None:
        aligned = outer.segment_length is None
    else:
        # if the rate does not divide the segment, the residue modulo the rate changes from one segment to the next
        aligned = inner.segment_length % inner.dilation_rate == 0 and (
            outer.segment_length is None or outer.segment_length % inner.segment_length == 0
        )
    return aligned and all(
        outer.offset(g, kv_heads) % inner.dilation_rate == inner.offset(g, kv_heads) for g in range(kv_heads)
    )


def exclusive_runs(
    branch: Branch, earlier: Sequence[Branch], kv_head: int, kv_heads: int, length: int
) -> Iterator[Runs]:
    """Yield runs over the pairs of `branch` that none of the `earlier` branches shows.

    The weights of the runs add up to 1 for such a pair, and to 0 for a pair that an earlier branch shows.  `_head_runs`
    takes them instead of `own_runs` where a pair is to be computed in one branch only.
    """
    chain = (*earlier, branch)
    if all(nests(a, b, kv_heads) for a, b in pairwise(chain)):
        # an earlier branch shows a pair of this branch iff it lies within one segment of the last of them
        yield from _outside(branch, earlier[-1], branch.offset(kv_head, kv_heads), length)
        return
    # The product branch * (1 - first) * (1 - second) * ... of indicators of pairs, multiplied out: each summand is the
    # indicator of an intersection, with a count.  Equal intersections are added, and often cancel out.
    signed_counts = {_relation(branch, kv_head, kv_heads, length): 1}
    for other in earlier:
        shown = _relation(other, kv_head, kv_heads, length)
        for relation, count in list(signed_counts.items()):
            common = _intersection(relation, shown)
            if common.runs:
                signed_counts[common] = signed_counts.get(common, 0) - count
    for layer, (relation, count) in enumerate(signed_counts.items()):
        if not count:
            continue
        for queries, keys in relation.runs:
            start = range(queries.start, queries.start + 1)
            if relation.sees_itself:
                yield from band_runs(
                    start, len(queries), queries.step, relation.is_causal, relation.window, count, layer
                )
                continue
            for n, key_run in enumerate(keys):
                if relation.window is None:
                    yield from kept_block_runs(range(1), queries, key_run, relation.is_causal, count, layer)
                else:
                    yield from windowed_block_runs(
                        queries, key_run, relation.is_causal, relation.window, count, (layer, n)
                    )


def repeats_align(branches: Sequence[Branch], kv_heads: int) -> bool:
    """Return whether all branches nest, and each segment begins at the same residue of every later rate.

    Then the pairs of a multiset can be computed once each: how often a pair counts depends only on the places of its
    query and key in the segment, modulo the rates.  `make_plan` asks before it plans weights.
    """
    return all(nests(a, b, kv_heads) for a, b in pairwise(branches)) and all(
        inner.segment_length is None or inner.segment_length % outer.dilation_rate == 0
        for i, inner in enumerate(branches)
        for outer in branches[i + 1 :]
    )


def with_repeats(
    runs: Iterator[Runs], later: Sequence[Branch], kv_head: int, kv_heads: int, has_tables: bool
) -> Iterator[Runs]:
    """Yield the same pairs, each run with the rules by which the `later` branches show its pairs again.

    With `has_tables` runs are cut into tiles, whose tables of weights are parts of one table of about `REPEAT_TILE`
    rows and columns.  `_head_runs` calls it for a plan that computes each pair once, with a weight.
    """
    for shape, starts in runs:
        tile = REPEAT_TILE if has_tables else max(shape.queries, shape.keys)
        for q in range(0, shape.queries, tile):
            # under a causal mask no query of the tile sees the tiles of keys behind it
            for k in range(0, shape.keys if shape.low is None else q + 1, tile):
                first_query = starts.start + q * shape.step
                first_key = starts.start + shape.shift + k * shape.step
                repeats = []
                for branch in later:
                    offset, every = branch.offset(kv_head, kv_heads), branch.dilation_rate // shape.step
                    # row `first + a * step` has the later branch's residue iff a is this place modulo `every`
                    places = [(offset - first) // shape.step % every for first in (first_query, first_key)]
                    repeats.append(Repeat(every, *places))
                cut = shape._replace(
                    queries=min(tile, shape.queries - q),
                    keys=min(tile, shape.keys - k),
                    shift=first_key - first_query,
                    low=shape.low if k == q else None,
                    repeats=tuple(repeats),
                )
                yield Runs(cut, shifted(starts, q * shape.step))


def _outside(branch: Branch, inner: Branch, offset: int, length: int) -> Iterator[Runs]:
    """Yield runs over the pairs of `branch` that have query and key in different segments of `inner`.

    They are few large rectangles, from halving the row of inner segments again and again:

                   keys of segment
                   0 1 2 3
        queries 0  - . . .        -: the same segment of `inner`, left out
                1  a - . .        a: a rectangle of two neighbouring segments
                2  b b - .        b: one rectangle of four segments
                3  b b a -        .: computed as well, unless the branch is causal
    """
    for starts, width in segments(branch, offset, length):
        part = min(inner.segment_length or width, width)
        spans = [(0, -(-width // part))]  # in segments of `inner`
        while spans:
            first, last = spans.pop()
            if last - first < 2:
                continue
            # the largest power of two below their number: most rectangles then have one of few shapes, and share calls
            middle = first + (1 << (last - first - 1).bit_length() - 1)
            spans += [(first, middle), (middle, last)]
            # each border in segments of `inner` becomes a number of rows of this residue
            cuts = [row_count(min(x * part, width), offset, branch.dilation_rate) for x in (first, middle, last)]
            early, late = (
                range(a * branch.dilation_rate, b * branch.dilation_rate, branch.dilation_rate)
                for a, b in pairwise(cuts)
            )
            yield from rectangle_runs(starts, late, early)
            if not branch.is_causal:
                yield from rectangle_runs(starts, early, late)


class _Relation(NamedTuple):
    """The pairs that one branch, or each of several branches, shows to one head of one document.

    Attributes:
        is_causal, window: the mask over all pairs of `runs`.
        sees_itself: whether each run of queries sees itself and nothing else.
        runs: each run of queries, in ascending order and disjoint, with the runs of keys that it sees.
    """

    is_causal: bool
    window: int | None
    sees_itself: bool
    runs: tuple[tuple[range, tuple[range, ...]], ...]


def _relation(branch: Branch, kv_head: int, kv_heads: int, length: int) -> _Relation:
    """Return the pairs that a branch shows to a head in a document of `length` rows."""
    runs: list[tuple[range, tuple[range, ...]]] = []
    offset = branch.offset(kv_head, kv_heads)
    for starts, width in segments(branch, offset, length):
        rows = row_count(width, offset, branch.dilation_rate)
        for run in (range(s, s + rows * branch.dilation_rate, branch.dilation_rate) for s in starts if rows):
            runs += [(run, (run,))] if branch.sparsity is None else kept_blocks(branch, kv_head, run)
    return _Relation(branch.is_causal, branch.window, branch.sparsity is None, tuple(runs))


def _intersection(a: _Relation, b: _Relation) -> _Relation:
    """Return the pairs that are in both relations."""
    windows = [w for w in (a.window, b.window) if w is not None]
    sees_itself = a.sees_itself and b.sees_itself
    runs, i, j = [], 0, 0
    while i < len(a.runs) and j < len(b.runs):
        (queries, keys), (other_queries, other_keys) = a.runs[i], b.runs[j]
        if common := _common_rows(queries, other_queries):
            if sees_itself:
                common_keys: tuple[range, ...] = (common,)
            else:
                common_keys = tuple(c for x in keys for y in other_keys if (c := _common_rows(x, y)))
            if common_keys:
                runs.append((common, common_keys))
        # the runs of a relation are disjoint and ascending, so the one that ends first intersects no later one
        if queries[-1] < other_queries[-1]:
            i += 1
        else:
            j += 1
    return _Relation(a.is_causal or b.is_causal, min(windows, default=None), sees_itself, tuple(runs))


def _common_rows(a: range, b: range) -> range:
    """Return the rows of both runs as a range, by the Chinese remainder theorem; `a` and `b` are ranges of rows."""
    divisor = gcd(a.step, b.step)
    distance = b.start - a.start
    if distance % divisor:
        return range(0)
    step = a.step * b.step // divisor
    # a row that both have modulo their steps: a.start + a.step * n, where a.step * n = distance modulo b.step
    inverse = pow(a.step // divisor, -1, b.step // divisor)
    meet = a.start + a.step * (distance // divisor * inverse % (b.step // divisor))
    # and from there the first such row that is not before the start of either run
    low, high = max(a.start, b.start), min(a[-1], b[-1])
    first = meet + -(-(low - meet) // step) * step
    return range(first, high + 1, step) if first <= high else range(0)
