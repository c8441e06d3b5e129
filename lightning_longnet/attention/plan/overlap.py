"""Pairs that several branches show: a "set" counts them once, and a "multiset" need not compute them twice.

Where branches nest, the new pairs of a branch are those outside the segments of the earlier branches: plain
rectangles, and less work than the branch itself.  Elsewhere the pairs are counted by inclusion and exclusion.  Both
rest on one fact: a branch splits a head's rows into runs that see only themselves, or kept blocks of themselves, and
the pairs that two branches share form such runs as well.
"""

from __future__ import annotations

from itertools import pairwise
from math import gcd
from typing import TYPE_CHECKING, NamedTuple

from lightning_longnet.attention.plan.runs import (
    Repeat,
    Runs,
    banded,
    block,
    kept_blocks,
    narrow,
    rectangle,
    row_count,
    segments,
    shifted,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lightning_longnet.attention.pattern.pattern import Branch

# Rows and columns of a table of weights, 4 MiB in float32: as fast as 2048, and 1.5 times as fast as 512
REPEAT_TILE = 1024


def nests(inner: Branch, outer: Branch, kv_heads: int) -> bool:
    """Return whether `inner` shows all pairs that `outer` shows within one segment of `inner`, for every head."""
    if inner.window or outer.window or inner.sparsity or outer.sparsity or inner.is_causal != outer.is_causal:
        return False
    if outer.dilation_rate % inner.dilation_rate:
        return False
    if inner.segment_length is None:
        aligned = outer.segment_length is None
    else:
        # a segment that the rate does not divide begins anew at another residue
        aligned = inner.segment_length % inner.dilation_rate == 0 and (
            outer.segment_length is None or outer.segment_length % inner.segment_length == 0
        )
    return aligned and all(
        outer.offset(g, kv_heads) % inner.dilation_rate == inner.offset(g, kv_heads) for g in range(kv_heads)
    )


def exclusive_runs(
    branch: Branch, earlier: Sequence[Branch], kv_head: int, kv_heads: int, length: int
) -> Iterator[Runs]:
    """Yield the pairs of `branch` that none of the `earlier` branches shows."""
    chain = (*earlier, branch)
    if all(nests(a, b, kv_heads) for a, b in pairwise(chain)):
        yield from _outside(branch, earlier[-1], branch.offset(kv_head, kv_heads), length)
        return
    # inclusion and exclusion: each earlier branch takes away its intersection with every relation counted so far
    signed_counts = {_relation(branch, kv_head, kv_heads, length): 1}
    for other in earlier:
        shown = _relation(other, kv_head, kv_heads, length)
        for relation, count in list(signed_counts.items()):
            common = _intersection(relation, shown)
            if common.shown:
                signed_counts[common] = signed_counts.get(common, 0) - count
    for layer, (relation, count) in enumerate(signed_counts.items()):
        if not count:
            continue
        for queries, keys in relation.shown:
            if relation.is_whole:
                start = range(queries.start, queries.start + 1)
                band = queries.step, relation.is_causal, relation.window, count, layer
                yield from banded(start, len(queries), *band)
                continue
            for n, each in enumerate(keys):
                if relation.window is None:
                    yield from block(range(1), queries, each, relation.is_causal, count, layer)
                else:
                    yield from narrow(queries, each, relation.is_causal, relation.window, count, (layer, n))


def repeats_align(branches: Sequence[Branch], kv_heads: int) -> bool:
    """Return whether branches nest and each segment begins at the same residue of every later rate.

    The pairs of a multiset can then be computed once, with a weight that depends on indices modulo the rates.
    """
    return all(nests(a, b, kv_heads) for a, b in pairwise(branches)) and all(
        inner.segment_length is None or inner.segment_length % outer.dilation_rate == 0
        for i, inner in enumerate(branches)
        for outer in branches[i + 1 :]
    )


def repeated(found: Iterator[Runs], later: Sequence[Branch], kv_head: int, kv_heads: int) -> Iterator[Runs]:
    """Yield the same pairs in tiles, with the places at which later branches show them again.

    The tiles are small, so that few tables of weights serve all of them.
    """
    for shape, starts in found:
        for q in range(0, shape.queries, REPEAT_TILE):
            for k in range(0, shape.keys if shape.low is None else q + 1, REPEAT_TILE):
                first_query = starts.start + q * shape.step
                first_key = starts.start + shape.shift + k * shape.step
                repeats = []
                for branch in later:
                    offset, every = branch.offset(kv_head, kv_heads), branch.dilation_rate // shape.step
                    places = [(offset - first) // shape.step % every for first in (first_query, first_key)]
                    repeats.append(Repeat(every, *places))
                tile = shape._replace(
                    queries=min(REPEAT_TILE, shape.queries - q),
                    keys=min(REPEAT_TILE, shape.keys - k),
                    shift=first_key - first_query,
                    low=shape.low if k == q else None,
                    repeats=tuple(repeats),
                )
                yield Runs(tile, shifted(starts, q * shape.step))


def _outside(branch: Branch, inner: Branch, offset: int, length: int) -> Iterator[Runs]:
    """Yield the pairs of `branch` in different segments of `inner`, as few large rectangles.

    Halving a span of segments again and again leaves out the segments of `inner`, 1.  The first step gives the
    rectangle 3, the second the rectangles 2:

        1 . . .
        2 1 . .
        3 3 1 .
        3 3 2 1
    """
    for starts, width in segments(branch, offset, length):
        part = min(inner.segment_length or width, width)
        spans = [(0, -(-width // part))]
        while spans:
            first, last = spans.pop()
            if last - first < 2:
                continue
            middle = first + (1 << (last - first - 1).bit_length() - 1)
            spans += [(first, middle), (middle, last)]
            cuts = [row_count(min(x * part, width), offset, branch.dilation_rate) for x in (first, middle, last)]
            early, late = (
                range(a * branch.dilation_rate, b * branch.dilation_rate, branch.dilation_rate)
                for a, b in pairwise(cuts)
            )
            yield from rectangle(starts, late, early)
            if not branch.is_causal:
                yield from rectangle(starts, early, late)


class _Relation(NamedTuple):
    """The pairs of one head in one document: runs of queries in ascending order, and the runs of keys that each sees.

    With `is_whole` each run of queries sees itself and nothing else.
    """

    is_causal: bool
    window: int | None
    is_whole: bool
    shown: tuple[tuple[range, tuple[range, ...]], ...]


def _relation(branch: Branch, kv_head: int, kv_heads: int, length: int) -> _Relation:
    """Return the pairs that a branch shows."""
    shown: list[tuple[range, tuple[range, ...]]] = []
    offset = branch.offset(kv_head, kv_heads)
    for starts, width in segments(branch, offset, length):
        rows = row_count(width, offset, branch.dilation_rate)
        for run in (range(s, s + rows * branch.dilation_rate, branch.dilation_rate) for s in starts if rows):
            shown += [(run, (run,))] if branch.sparsity is None else kept_blocks(branch, kv_head, run)
    return _Relation(branch.is_causal, branch.window, branch.sparsity is None, tuple(shown))


def _intersection(a: _Relation, b: _Relation) -> _Relation:
    """Return the pairs that both relations show."""
    windows = [w for w in (a.window, b.window) if w is not None]
    is_whole = a.is_whole and b.is_whole
    shown, i, j = [], 0, 0
    while i < len(a.shown) and j < len(b.shown):
        (queries, keys), (other_queries, other_keys) = a.shown[i], b.shown[j]
        if common := _common(queries, other_queries):
            seen = (common,) if is_whole else tuple(c for x in keys for y in other_keys if (c := _common(x, y)))
            if seen:
                shown.append((common, seen))
        # the runs of a relation do not overlap, so the one that ends first meets no further run of the other
        if queries[-1] < other_queries[-1]:
            i += 1
        else:
            j += 1
    return _Relation(a.is_causal or b.is_causal, min(windows, default=None), is_whole, tuple(shown))


def _common(a: range, b: range) -> range:
    """Return the rows that two runs share, by the Chinese remainder theorem."""
    divisor = gcd(a.step, b.step)
    apart = b.start - a.start
    if apart % divisor:
        return range(0)
    step = a.step * b.step // divisor
    meet = a.start + a.step * (apart // divisor * pow(a.step // divisor, -1, b.step // divisor) % (b.step // divisor))
    low, high = max(a.start, b.start), min(a[-1], b[-1])
    first = meet + -(-(low - meet) // step) * step
    return range(first, high + 1, step) if first <= high else range(0)
