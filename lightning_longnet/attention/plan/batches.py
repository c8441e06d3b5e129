"""Fewer and larger kernel calls on a CPU, out of blocks that are too small to be worth a call each.

Two kinds of blocks are joined:

    heads       blocks that differ in their heads and in the weights of their pairs alone
    documents   runs that see themselves and have similar lengths, as one batch of padded runs

A plan has the blocks that ranks cut into shares and count; they are joined just before they run.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_longnet.attention.plan.lattice import Lattice
from lightning_longnet.attention.plan.padded import padded

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from lightning_longnet.attention.plan.block import Block
    from lightning_longnet.attention.plan.runs import Repeat

# On a CPU a call takes as long as the copies of about this many rows of one head each
CALL_ROWS = 512
# A row of padding takes as long as the copies of this many
PADDED_ROW = 2
# A row of this many pairs takes twice the time of one without any
ROW_PAIRS = 256
# The most elements of a table of weights of several heads
HEAD_WEIGHTS = 2**19


def batched(blocks: Iterable[Block]) -> list[Block]:
    """Return blocks of one branch with the same pairs, in fewer calls; those of negative weight come last.

    `Parts.joined` calls it for blocks on a rank's own keys, before their first run on a CPU with a kernel that takes
    weights; `Parts` keeps the calls.
    """
    joined = list(_similar_runs(_all_heads(blocks)))
    return sorted(joined, key=lambda block: -block.weight)


# Heads


class _HeadPair(NamedTuple):
    """A query head and its key head, with the weights of their pairs."""

    query: int
    key: int
    repeats: tuple[Repeat, ...]


def _all_heads(blocks: Iterable[Block]) -> Iterator[Block]:
    """Yield the blocks; small ones with weights are joined where they differ in heads and weights alone, and come last.

    `batched` calls it.
    """
    groups: dict[Block, list[Block]] = defaultdict(list)
    for block in map(_of_one_head, blocks):
        is_small = block.queries.rows * block.keys.rows <= HEAD_WEIGHTS
        if block.repeats and is_small and not block.queries.row_shift and not block.keys.row_shift:
            queries, keys = (replace(side, head=0, heads=1, head_step=1) for side in (block.queries, block.keys))
            moduli = tuple(repeat._replace(queries=0, keys=0) for repeat in block.repeats)
            groups[replace(block, queries=queries, keys=keys, repeats=moduli)].append(block)
        else:
            yield block
    for members in groups.values():
        yield from _joined_heads(members) if len(members) > 1 else members


def _of_one_head(block: Block) -> Block:
    """Return a small block that reads one head several times as a block of one head with more segments.

    The lattices of such a block have `head_step` 0 and a `row_shift`, for runs of one head that no range of segments
    holds.  Other blocks are returned as they are.
    """
    queries, keys = block.queries, block.keys
    if queries.heads == 1 or queries.head_step or keys.head_step or queries.size > CALL_ROWS:
        return block
    assert queries.heads == keys.heads, "query heads at distance 0 have as many key heads"
    sides = []
    for side in (queries, keys):
        starts = tuple(start + a * side.row_shift for a in range(side.heads) for start in side.starts)
        sides.append(replace(side, starts=starts, heads=1, head_step=1, row_shift=0))
    return replace(block, queries=sides[0], keys=sides[1])


def _joined_heads(blocks: list[Block]) -> Iterator[Block]:
    """Yield few blocks, each of several heads, for blocks that differ in their heads and weights alone.

    They come back as they are unless their heads are all those from the first to the last, as a lattice needs.
    """
    head_pairs = []  # every query head with its key head
    for block in blocks:
        group = block.queries.heads // block.keys.heads
        for a in range(block.queries.heads):
            query = block.queries.head + a * block.queries.head_step
            key = block.keys.head + a // group * block.keys.head_step
            head_pairs.append(_HeadPair(query, key, block.repeats))
    head_pairs.sort()
    repeats = {pair.key: pair.repeats for pair in head_pairs}
    heads, group = list(repeats), len(head_pairs) // len(repeats)
    if [(pair.query, pair.key) for pair in head_pairs] != [
        (query, query // group) for query in range(heads[0] * group, (heads[-1] + 1) * group)
    ]:
        yield from blocks
        return
    one = blocks[0]
    heads_per_call = max(1, HEAD_WEIGHTS // (one.queries.rows * one.keys.rows))
    for first in range(0, len(heads), heads_per_call):
        keys = heads[first : first + heads_per_call]
        yield replace(
            one,
            queries=replace(one.queries, head=keys[0] * group, heads=len(keys) * group, head_step=1),
            keys=replace(one.keys, head=keys[0], heads=len(keys), head_step=1),
            repeats=(),
            head_repeats=tuple(repeats[key] for key in keys),
        )


# Documents


def _similar_runs(blocks: Iterable[Block]) -> Iterator[Block]:
    """Yield the blocks, of which those whose runs see only themselves are joined with others of about their length."""
    groups: dict[tuple[Any, ...], list[Block]] = defaultdict(list)
    for block in blocks:
        if _sees_itself(block):
            groups[_all_but_rows(block)].append(block)
        else:
            yield block
    for members in groups.values():
        if _are_disjoint(members):
            for batch in _batches(members):
                yield batch[0] if len(batch) == 1 else _padded_block(batch)
        else:
            yield from members


def _sees_itself(block: Block) -> bool:
    """Return whether each segment of queries sees itself alone.

    It then sees all of its rows or, under a causal mask, those up to its own.
    """
    queries, keys = block.queries, block.keys
    return (
        block.stack is None
        and (queries.heads == 1 or queries.head_step != 0)  # else the "heads" are segments, which may overlap
        and block.high is None
        and block.low in (None, 0)
        and (queries.starts, queries.rows, queries.step) == (keys.starts, keys.rows, keys.step)
        and type(queries) is type(keys) is Lattice
    )


def _all_but_rows(block: Block) -> tuple[Any, ...]:
    """Return what distinguishes a block that `_sees_itself` from others, besides its segments and their lengths."""
    sides = ((side.step, side.head, side.heads, side.head_step, side.row_shift) for side in (block.queries, block.keys))
    return *sides, block.low, block.weight, block.repeats, block.head_repeats


def _are_disjoint(blocks: list[Block]) -> bool:
    """Return whether no segment begins before another one ends, so that no row is in two of them."""
    extents = sorted(
        (start, start + (block.queries.rows - 1) * block.queries.step)
        for block in blocks
        for start in block.queries.starts
    )
    return all(before[1] < after[0] for before, after in pairwise(extents))


def _batches(blocks: list[Block]) -> Iterator[list[Block]]:
    """Yield lists of blocks that share a call: the padding and copies of each take less time than a separate call."""
    batch: list[Block] = []
    for block in sorted(blocks, key=lambda block: -block.queries.rows):
        if batch and _joining_cost(block, batch) > CALL_ROWS:
            yield batch
            batch = []
        batch.append(block)
    if batch:
        yield batch


def _joining_cost(block: Block, batch: list[Block]) -> float:
    """Return the cost of adding a block to a batch, in units of the time to copy one row of one head."""
    longest, rows = batch[0].queries.rows, block.queries.rows
    padding = (longest - rows) * len(block.queries.starts) * block.queries.heads
    # a view becomes a copy, and the results of padded runs are copied twice: those of the first block of a batch, too
    copied = sum(x.queries.size for x in ([block] if len(batch) > 1 else [block, *batch]) if x.queries.is_view)
    again = block.queries.size if longest > rows else 0
    if longest > rows and batch[-1].queries.rows == longest:
        again += sum(x.queries.size for x in batch)
    return PADDED_ROW * padding * (1 + longest / ROW_PAIRS) + copied + again / 2


def _padded_block(blocks: list[Block]) -> Block:
    """Return one block of all segments of several, each padded to the longest of them."""
    queries, keys = padded([block.queries for block in blocks]), padded([block.keys for block in blocks])
    return replace(blocks[0], queries=queries, keys=queries if queries == keys else keys)
