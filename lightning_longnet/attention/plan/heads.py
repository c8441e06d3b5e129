"""Blocks of several heads: runs of one shape are collected over the heads into as few lattices as possible."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

from lightning_longnet.attention.plan.block import Block
from lightning_longnet.attention.plan.lattice import Lattice

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning_longnet.attention.plan.runs import Shape

Starts = range | tuple[int, ...]


def spacing(starts: Starts) -> tuple[int, ...]:
    """Return what two heads must have in common to share a lattice: the distances between their starts.

    `_plan` of blocks.py groups heads by it.  Of a range these are (number of starts, step), of a tuple the distance of
    each start from the first.
    """
    if isinstance(starts, range):
        return len(starts), starts.step if len(starts) > 1 else 0
    return tuple(start - starts[0] for start in starts)


def lattice_blocks(shape: Shape, head_starts: list[tuple[int, Starts]], group: int) -> Iterator[Block]:
    """Yield the blocks of one shape over all heads, in as few lattices as one of two ways of grouping heads gives.

    `_plan` of blocks.py calls it.

    `head_starts` holds (key head, first rows of its runs), and `group` is the number of query heads of a key head.
    Where 6 heads begin at rows 0, 1, 2, 0, 1, 2, each way gives lattices of evenly spaced heads:

        by row         heads 0 3, 1 4, 2 5       head_step 3, row_shift 0
        by diagonal    heads 0 1 2, 3 4 5        head_step 1, row_shift 1: fewer, and so taken
    """
    by_row: dict[int, list[tuple[int, Starts]]] = defaultdict(list)
    by_diagonal: dict[int, list[tuple[int, Starts]]] = defaultdict(list)
    for head, starts in sorted(head_starts, key=lambda item: item[0]):
        # the n-th head that begins at its row is on the n-th diagonal
        by_diagonal[len(by_row[starts[0]])].append((head, starts))
        by_row[starts[0]].append((head, starts))
    ways = ([run for items in way.values() for run in _evenly_spaced(items)] for way in (by_row, by_diagonal))
    for members in min(ways, key=len):
        (head, starts), (next_head, next_starts) = members[0], members[1] if len(members) > 1 else members[0]
        keys = Lattice(
            starts=starts,
            rows=shape.keys,
            step=shape.step,
            head=head,
            heads=len(members),
            head_step=next_head - head,
            row_shift=next_starts[0] - starts[0],
        )
        for query_heads, key_heads in _with_query_heads(keys, group):
            queries = query_heads if query_heads.rows == shape.queries else replace(query_heads, rows=shape.queries)
            key_rows = key_heads.shifted(shape.shift)
            yield Block(
                queries,
                queries if key_rows == queries else key_rows,  # one lattice keeps one set of indices
                shape.low,
                shape.high,
                shape.weight,
                shape.repeats,
                shape.stack,
            )


def _evenly_spaced(items: list[tuple[int, Starts]]) -> Iterator[list[tuple[int, Starts]]]:
    """Yield (head, starts) in groups that one lattice can hold: heads and first rows at constant distances.

    The distance of rows is never negative, so that the rows of a lattice ascend with its heads.
    """
    group: list[tuple[int, Starts]] = []
    for item in items:
        if group:
            step = item[0] - group[-1][0], item[1][0] - group[-1][1][0]
            if step[1] < 0 or (len(group) > 1 and step != (group[1][0] - group[0][0], group[1][1][0] - group[0][1][0])):
                yield group
                group = []
        group.append(item)
    yield group


def _with_query_heads(keys: Lattice, group: int) -> Iterator[tuple[Lattice, Lattice]]:
    """Yield (queries, keys) for a lattice of key heads, each of which serves `group` query heads.

    The query heads of key head g are `g * group` to `(g + 1) * group`.  They are one lattice only if they are evenly
    spaced, so otherwise there is one for each key head, or one for each place in the group, whichever is fewer.
    """
    if group == 1 and keys.heads > 1:
        yield keys, keys
    elif keys.heads == 1 or (keys.head_step == 1 and keys.row_shift == 0):
        yield Lattice(keys.starts, keys.rows, keys.step, keys.head * group, keys.heads * group), keys
    elif keys.heads < group:
        for a in range(keys.heads):
            yield from _with_query_heads(keys.of_heads(a, a + 1), group)
    else:
        for member in range(group):
            head, head_step = keys.head * group + member, keys.head_step * group
            yield Lattice(keys.starts, keys.rows, keys.step, head, keys.heads, head_step, keys.row_shift), keys
