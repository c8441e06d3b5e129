"""The tile list of a launch: which tiles of keys each tile of queries meets, or the other way round; integers only.

An item is at most `rows` rows that one program computes; no two items of a launch have a row in common, so that results
are written without atomic operations.  A span is keys that the rows of an item meet, `others` of them at a time:

    item    rows 0 ... 3 of a causal run of 12, in tiles of 4 rows and 2 others
    span    keys 0 ... 3: tiles (0, 1) and (2, 3), both masked by the band
    item    rows 8 ... 11
    span    keys 0 ... 11: the first four tiles full, without a mask, and two masked ones

The rows of an item are in the same rectangles.  Where a launch has branches of several rates, its rows are equally
distant, as in the branch of the largest rate that has them, and of each finer branch they are some of its rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from lightning_longnet.attention.kernels.triton.pieces import pieces
from lightning_longnet.attention.kernels.triton.rectangles import places_within

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.attention.kernels.triton.rectangles import Rectangles

_INT32 = 2**31 - 1


class TileList(NamedTuple):
    """The items of a launch, the longest first, and their spans, one after the other; int32.

    Attributes:
        items: (I, 6) of head, row in memory of the first row, distance of two rows in memory, number of rows, first
            span, and the span after the last.
        spans: (S, 13) of the row in memory of the first key, the distance of two keys in memory, the number of keys,
            `multiple`, `low`, `high`, the first full tile, the tile after the last full one, the place of the item's
            first row modulo the rates of later branches, that of the span's first key, `unit`, `level` and the weight;
            for the last three see `Rectangles`.  Row x of the item sees key y iff `low <= multiple * x - y <= high`.
    """

    items: Tensor
    spans: Tensor

    def positions(self, rows: int, others: int) -> int:
        """Return the number of pairs in all tiles, which the programs multiply whether a mask hides them or not.

        `tiled_phases` compares one launch with several by it.
        """
        return int(((self.spans[:, 2].long() + others - 1) // others).sum()) * rows * others


def tile_list(rectangles: Rectangles, rows: int, others: int, every: tuple[int, ...] = ()) -> TileList:
    """Return the tile list of rectangles by their queries; that by keys is the list of `rectangles.transposed()`.

    `tiled_phases` calls it for each launch.

    Args:
        rectangles: the pairs.
        rows, others: the sizes of a tile.
        every: see `Phase`.
    """
    own, other = rectangles.queries, rectangles.keys
    cut = pieces(rectangles)
    # each piece is cut into items, and each rectangle has a span in each of them
    tiles = (cut.length + rows - 1) // rows
    first_item = tiles.cumsum(0) - tiles
    count = tiles[cut.covered]
    rectangle, piece = cut.rectangle.repeat_interleave(count), cut.covered.repeat_interleave(count)
    tile = places_within(count)
    item, count = first_item[piece] + tile, (cut.length[piece] - tile * rows).clamp(max=rows)
    # of the rows counted from the beginning of the rectangle, of which the item has each `multiple`-th one
    multiple = cut.stride[piece] // rectangles.step[rectangle]
    moved = (cut.position[piece] - own.position[rectangle]) // rectangles.step[rectangle] + multiple * tile * rows
    low, high = rectangles.low[rectangle], rectangles.high[rectangle]
    from_key = (moved - high).clamp(min=0)
    to_key = torch.minimum(moved + multiple * (count - 1) + 1 - low, other.length[rectangle])
    kept = from_key < to_key
    rectangle, item, count, multiple, moved, low, high, from_key, to_key = (
        x[kept] for x in (rectangle, item, count, multiple, moved, low, high, from_key, to_key)
    )
    # and counted from the beginnings of the item and of the span
    low, high, keys = low - moved + from_key, high - moved + from_key, to_key - from_key
    full_first = ((multiple * (count - 1) - high).clamp(min=0) + others - 1) // others
    full_last = torch.minimum(keys, (1 - low).clamp(min=0)) // others
    full_last = torch.maximum(full_first, full_last)
    unit = rectangles.unit[rectangle]
    place, other_place = own.place[rectangle] + moved * unit, other.place[rectangle] + from_key * unit
    if every:
        place, other_place = place % every[-1], other_place % every[-1]
    spans = torch.stack(
        (
            other.row[rectangle] + from_key * other.stride[rectangle],
            other.stride[rectangle],
            keys,
            multiple,
            low.clamp(-_INT32, _INT32),
            high.clamp(-_INT32, _INT32),
            full_first.clamp(max=_INT32),
            full_last.clamp(max=_INT32),
            place,
            other_place,
            unit,
            rectangles.level[rectangle],
            rectangles.weight[rectangle],
        ),
        1,
    )
    order = item.argsort(stable=True)
    _, lengths = item[order].unique_consecutive(return_counts=True)
    last = lengths.cumsum(0)
    leads = order[last - lengths]  # a span of each item
    stride = own.stride[rectangle]
    row = own.row[rectangle] + moved * stride
    items = torch.stack(
        (
            rectangles.head[rectangle][leads],
            row[leads],
            (multiple * stride)[leads],
            count[leads],
            last - lengths,
            last,
        ),
        1,
    )
    # the longest items first, so that no program starts a long one when all others end
    work = torch.zeros(len(items), dtype=torch.long).index_add(
        0, torch.arange(len(items)).repeat_interleave(lengths), ((keys + others - 1) // others)[order]
    )
    items = items[work.argsort(descending=True, stable=True)]
    return TileList(items.to(torch.int32), spans[order].to(torch.int32))
