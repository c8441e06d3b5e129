"""The places of KV rows among those that a rank received, where they lie at constant distances.

A rank receives the KV rows that it needs, ascending, and so not those between them.  Their places are counted in the
received rows of all ranks, (B, R, 1, D), as rows of one head:

    all rows of neighbouring tokens        the place of a row is its index, less that of the first
    the rows of one lattice                row after row, the heads of each side by side

Kernels then read the keys of a block as a view.  Other rows are copied by an index of each.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lightning_longnet.attention.plan.lattice import Lattice

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from lightning_longnet.attention.parallel.peer_blocks import PeerBlocks
    from lightning_longnet.attention.plan.block import Part


def kv_row_range(blocks: PeerBlocks, count: int) -> range | None:
    """Return the indices of the needed KV rows if these are all rows of neighbouring tokens, else None.

    `count` is the number of needed rows.
    """
    sides = [part.block.keys for part in blocks.parts]
    first = min(side.starts[0] for side in sides)
    last = max(side.starts[-1] + (side.heads - 1) * side.row_shift + (side.rows - 1) * side.step for side in sides)
    rows = range(first * blocks.kv_heads, (last + 1) * blocks.kv_heads)
    return rows if len(rows) == count else None


def received_parts(blocks: PeerBlocks, parts: Iterable[Part], count: int, offset: int) -> list[Part] | None:
    """Return the parts with the keys of one rank, their keys as lattices of received rows; None where one has none.

    `Round` calls it for each rank that it receives from.

    Args:
        blocks: the blocks with the keys of the rank.
        parts: these, merged.
        count: the number of needed KV rows.
        offset: the place of the first of them.
    """
    parts = tuple(parts)
    if not all(type(part.block.keys) is Lattice and part.block.keys.is_view for part in parts):
        return None
    if (rows := kv_row_range(blocks, count)) is not None:
        places = {part.block.keys: _among_all(part.block.keys, blocks.kv_heads, offset - rows.start) for part in parts}
    else:
        places = {part.block.keys: _alone(part.block.keys, offset) for part in parts}
        if len(places) > 1 or any(side.size != count or not _is_ascending(side) for side in places):
            return None
    return [
        part._replace(
            block=replace(part.block, keys=places[part.block.keys], stack=None), received_heads=tuple(part.key_heads)
        )
        for part in parts
    ]


def rows_by_rank(rows: Tensor, indices: dict[int, Tensor]) -> dict[int, Tensor]:
    """Return views of the rows (R, B, D + Dv) of each rank, of which each index in `indices` stands for one.

    `RoundsCall` cuts what it sends and receives by it.
    """
    if len(indices) == 1:
        return dict.fromkeys(indices, rows)
    return dict(zip(indices, rows.split([len(index) for index in indices.values()]), strict=True))


def rows_of_one_head(rows: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Return views (B, R, 1, D) of the keys and (B, R, 1, Dv) of the values in contiguous rows (R, B, D + Dv).

    `RoundsCall` gives them to kernels whose parts have lattices of received rows.
    """
    count, batch, width = rows.shape
    strides, offset = (width, batch * width, width, 1), rows.storage_offset()
    return (
        rows.as_strided((batch, count, 1, head_dim), strides, offset),
        rows.as_strided((batch, count, 1, width - head_dim), strides, offset + head_dim),
    )


def _among_all(side: Lattice, kv_heads: int, offset: int) -> Lattice:
    """Return the places of the rows of a lattice where all heads of neighbouring tokens are received."""
    assert isinstance(side.starts, range)
    first, every = side.starts[0] * kv_heads + side.head + offset, side.starts.step * kv_heads
    starts = range(first, first + (len(side.starts) - 1) * every + 1, every)
    row_shift = side.row_shift * kv_heads + side.head_step
    return Lattice(starts, side.rows, side.step * kv_heads, 0, side.heads, 0, row_shift)


def _alone(side: Lattice, offset: int) -> Lattice:
    """Return the places of the rows of a lattice that are the only ones received, and ascending."""
    every = side.rows * side.heads
    return Lattice(range(offset, offset + side.size, every), side.rows, side.heads, 0, side.heads, 0, 1)


def _is_ascending(side: Lattice) -> bool:
    """Return whether (row, head) ascends from segment to segment, in each from row to row, and from head to head."""
    assert isinstance(side.starts, range)
    reach = (side.heads - 1) * side.row_shift
    return (
        side.row_shift >= 0
        and (side.rows == 1 or side.step > reach)
        and (len(side.starts) == 1 or side.starts.step > (side.rows - 1) * side.step + reach)
        and (side.heads == 1 or side.row_shift > 0 or side.head_step > 0)
    )
