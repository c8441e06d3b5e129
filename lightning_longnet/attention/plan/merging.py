"""Blocks of a rank that are merged to fewer and larger kernel calls.

Where a rank holds two runs of tokens far from one another, as under zigzag, a block of the whole plan becomes several
blocks of the rank, whose rows are neighbours there.  Keys of several other ranks lie side by side once they are
received.  Four kinds of blocks are merged:

    a triangle, a square and a triangle      x . . .      two triangles of one size      x .
    of neighbouring rows, to a triangle      x x . .      at other rows, to              x x
                                             o o x .      segments of one block              x .
                                             o o x x                                         x x

    rectangles of neighbouring queries       x x          rectangles of received keys    x x o o
    with the same keys                       o o          with the same queries          x x o o
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lightning_longnet.attention.plan.block import Block, Part
from lightning_longnet.attention.plan.lattice import Lattice

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from lightning_longnet.attention.plan.runs import Repeat


def merge_neighbors(blocks: Iterable[Block]) -> list[Block]:
    """Return blocks with the same pairs of one branch, in fewer calls; those of negative weight come last.

    `merge_neighboring_parts` calls it for each branch: of a rank's blocks on its own keys, and of those on the keys of
    each other rank.
    """
    mergeable, others = dict[_Corner, Block](), list[Block]()
    for block in blocks:
        if _can_be_merged(block) and _corner(block) not in mergeable:
            mergeable[_corner(block)] = block
        else:
            others.append(block)
    _triangles(mergeable)
    _rectangles(mergeable)
    return sorted([*_segments(mergeable.values()), *others], key=lambda block: -block.weight)


def joined_keys(parts: Iterable[Part], limit: int) -> Iterator[Part]:
    """Yield the parts, of which those that the same queries see on received keys without a mask are one part.

    `Parts.bounded` calls it for the parts of a round.  The keys of a call, or their gradients, are a copy, so that a
    call gets at most `limit` of them, or those of one part.  Parts of negative weight stay where they are: they remove
    pairs that the parts before them have added.
    """
    groups, open_groups = list[list[Part]](), dict[Any, list[Part]]()
    for part in parts:
        block, keys = part.block, part.block.keys
        is_whole = (block.low, block.high, block.repeats, block.head_repeats) == (None, None, (), ())
        if part.is_own or not is_whole or block.weight < 0:
            groups.append([part])
            continue
        key: tuple[Any, ...] = part.branch, block.queries, block.weight
        if part.kv_index is None:
            key = *key, part.received_heads, keys.step, keys.row_shift
        else:
            key = *key, part.kv_index.shape[:2]
        group = open_groups.get(key)
        if group is not None:
            is_full = sum(other.block.keys.size for other in group) + keys.size > limit
            if is_full or (part.kv_index is None and not _follows(group[-1].block.keys, keys)):
                group = None
        if group is None:  # a group stands where its first part stood: never behind what removes its pairs
            group = open_groups[key] = []
            groups.append(group)
        group.append(part)
    yield from (_joined(group) for group in groups)


def _follows(before: Lattice, keys: Lattice) -> bool:
    """Return whether the rows of a lattice of one segment follow those of another, at the same distances."""
    is_one = len(before.starts) == len(keys.starts) == 1
    return is_one and keys.starts[0] == before.starts[0] + before.rows * before.step


def _joined(parts: list[Part]) -> Part:
    """Return one part with the received keys of several, whose queries are the same."""
    if len(parts) == 1:
        return parts[0]
    block = parts[0].block
    if parts[0].kv_index is None:
        keys = replace(block.keys, rows=sum(part.block.keys.rows for part in parts))
        return parts[0]._replace(block=replace(block, keys=keys))
    kv_index = torch.cat([_index_of(part) for part in parts], 2)
    # received keys are read by their index: of the lattice only the sizes count
    keys = Lattice(
        range(kv_index.shape[0]), kv_index.shape[2], 1, block.keys.head, block.keys.heads, block.keys.head_step
    )
    return Part(parts[0].branch, replace(block, keys=keys, stack=None), kv_index)


def _index_of(part: Part) -> torch.Tensor:
    """Return the `kv_index` of a part of received keys, (segments, heads, rows)."""
    assert part.kv_index is not None
    return part.kv_index


class _Corner(NamedTuple):
    """The place of a block's first query and first key, by which its neighbours are found."""

    queries: Any
    keys: Any


def _corner(block: Block, queries: int = 0, keys: int = 0) -> _Corner:
    """Return the corner of a block, or that of the block that begins so many queries and keys after it."""
    return _Corner(_begin(block.queries, queries), _begin(block.keys, keys))


def _begin(lattice: Lattice, rows: int) -> tuple[Any, ...]:
    """Return what identifies a lattice among those of as many rows, if it began `rows` rows later than it does."""
    starts = tuple(start + rows * lattice.step for start in lattice.starts)
    return starts, lattice.step, lattice.head, lattice.heads, lattice.head_step, lattice.row_shift


def _can_be_merged(block: Block) -> bool:
    """Return whether the rows of a block are known by its lattices alone, and its pairs are added, not removed."""
    is_plain = type(block.queries) is type(block.keys) is Lattice
    return is_plain and block.weight > 0 and block.stack is None and block.high is None and not block.head_repeats


def _triangles(blocks: dict[_Corner, Block]) -> None:
    """Replace, in `blocks`, a triangle, the square below it and the triangle beside that by one triangle.

    `merge_neighbors` calls it first.
    """
    for corner in list(blocks):
        while corner in blocks:
            first, rows = blocks[corner], blocks[corner].queries.rows
            below, beside = _corner(first, rows), _corner(first, rows, rows)
            square, second = blocks.get(below), blocks.get(beside)
            if square is None or second is None or not _are_one_triangle(first, square, second):
                break
            del blocks[below], blocks[beside]
            total = rows + second.queries.rows
            queries, keys = (replace(side, rows=total) for side in (first.queries, first.keys))
            blocks[corner] = replace(first, queries=queries, keys=keys, low=0)


def _are_one_triangle(first: Block, square: Block, second: Block) -> bool:
    """Return whether two triangles and the square between them are one triangle, with the same weights of pairs.

    Their rows are neighbours already, as `_triangles` found them by their corners.
    """
    rows, others = first.queries.rows, second.queries.rows
    sizes = [(block.queries.rows, block.keys.rows) for block in (first, square, second)]
    return (
        _is_triangle(first)
        and square.low is None
        and _is_triangle(second)
        and sizes == [(rows, rows), (others, rows), (others, others)]
        and first.weight == square.weight == second.weight
        and square.repeats == _repeats(first, rows)
        and second.repeats == _repeats(first, rows, rows)
    )


def _is_triangle(block: Block) -> bool:
    """Return whether a block is causal; of a single pair the mask was dropped, as it masks nothing."""
    return block.low == 0 or (block.low is None and block.queries.rows == block.keys.rows == 1)


def _rectangles(blocks: dict[_Corner, Block]) -> None:
    """Replace, in `blocks`, rectangles of neighbouring queries with the same keys by one rectangle.

    A rectangle is a block without a mask.  `merge_neighbors` calls it after `_triangles`.
    """
    for corner in list(blocks):
        while corner in blocks:
            first, rows = blocks[corner], blocks[corner].queries.rows
            below = _corner(first, rows)
            second = blocks.get(below)
            if second is None or not _are_one_rectangle(first, second):
                break
            del blocks[below]
            blocks[corner] = replace(first, queries=replace(first.queries, rows=rows + second.queries.rows))


def _are_one_rectangle(first: Block, second: Block) -> bool:
    """Return whether two blocks without a mask have the same keys and the same weights of pairs.

    Their queries are neighbours already, as `_rectangles` found them by their corners.
    """
    return (
        first.low is second.low is None
        and first.keys == second.keys
        and first.weight == second.weight
        and second.repeats == _repeats(first, first.queries.rows)
    )


def _repeats(block: Block, queries: int, keys: int = 0) -> tuple[Repeat, ...]:
    """Return the repeats of a block as they are counted from so many queries and keys after its first ones."""
    return tuple(
        repeat._replace(queries=(repeat.queries - queries) % repeat.every, keys=(repeat.keys - keys) % repeat.every)
        for repeat in block.repeats
    )


def _segments(blocks: Iterable[Block]) -> Iterator[Block]:
    """Yield blocks, of which those that differ in their first rows alone are segments of one block.

    Their first rows must be evenly spaced, so that they are read without a copy, and no row may be in two of them.
    """
    groups: dict[Block, list[Block]] = defaultdict(list)
    for block in blocks:
        shift = block.keys.starts[0] - block.queries.starts[0]
        query_starts, key_starts = range(1), range(shift, shift + 1)
        queries, keys = replace(block.queries, starts=query_starts), replace(block.keys, starts=key_starts)
        groups[replace(block, queries=queries, keys=keys)].append(block)
    for members in groups.values():
        if len(members) == 1:
            yield members[0]
            continue
        queries_of_all = _evenly_spaced([block.queries for block in members])
        keys_of_all = _evenly_spaced([block.keys for block in members])
        if queries_of_all is None or keys_of_all is None:
            yield from members
        else:
            yield replace(members[0], queries=queries_of_all, keys=keys_of_all)


def _evenly_spaced(lattices: list[Lattice]) -> Lattice | None:
    """Return one lattice with the segments of several, in their order, or None if no view has them.

    No view has them if they are not evenly spaced, or if their rows overlap.
    """
    starts = [start for lattice in lattices for start in lattice.starts]
    even = range(starts[0], starts[-1] + 1, max(1, starts[1] - starts[0]))
    if list(even) != starts or even.step < lattices[0].rows * lattices[0].step:
        return None
    return replace(lattices[0], starts=even)
