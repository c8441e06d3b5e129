"""The tile list of a launch: which tiles of keys each tile of queries meets, or the other way round; integers only.

An item is at most `rows` rows that one program computes; no two items of a launch have a row in common, so that results
are written without atomic operations.  A span is keys that the rows of an item meet, `others` of them at a time:

    item    rows 0 ... 3 of a causal run of 12, in tiles of 4 rows and 2 others
    span    keys 0 ... 3: tiles (0, 1) and (2, 3), both masked by the band
    item    rows 8 ... 11
    span    keys 0 ... 11: the first four tiles full, without a mask, and two masked ones
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from lightning_longnet.attention.kernels.triton.rectangles import places_within

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.attention.kernels.triton.rectangles import Rectangles

_INT32 = 2**31 - 1


class TileList(NamedTuple):
    """The items of a launch, the longest first, and their spans, one after the other; int32.

    Attributes:
        items: (I, 5) of head, row in memory of the first row, number of rows, first span, and the span after the last.
        spans: (S, 9) of the row in memory of the first key, the number of keys, `low`, `high`, the first full tile, the
            tile after the last full one, the place of the item's first row modulo the rates of later branches, that of
            the span's first key, and the weight.
    """

    items: Tensor
    spans: Tensor


def tile_list(
    rectangles: Rectangles, steps: tuple[int, int], rows: int, others: int, every: tuple[int, ...] = ()
) -> TileList:
    """Return the tile list of rectangles by their queries; that by keys is the list of `rectangles.transposed()`.

    Args:
        rectangles: the pairs.
        steps: the distance in memory of two rows of an item, and of two rows of a span.
        rows, others: the sizes of a tile.
        every: see `Phase`.
    """
    own, other = rectangles.queries, rectangles.keys
    width = int((own.first + own.length).max()) + 1
    begin = own.lane * width + own.first
    # the rows of a lane, cut wherever a rectangle begins or ends: each rectangle has all rows of a piece or none
    cuts = torch.cat((begin, begin + own.length)).unique()
    first, last = torch.searchsorted(cuts, begin), torch.searchsorted(cuts, begin + own.length)
    rectangle = torch.arange(len(begin)).repeat_interleave(last - first)
    piece = first[rectangle] + places_within(last - first)
    # each piece is cut into items, and each rectangle has a span in each of them
    tiles = (cuts[piece + 1] - cuts[piece] + rows - 1) // rows
    rectangle, tile = rectangle.repeat_interleave(tiles), places_within(tiles)
    piece = piece.repeat_interleave(tiles)
    start = cuts[piece] + tile * rows
    count = (cuts[piece + 1] - start).clamp(max=rows)
    # of the rows counted from the beginning of the rectangle
    moved = start - begin[rectangle]
    low, high = rectangles.low[rectangle], rectangles.high[rectangle]
    from_key = (moved - high).clamp(min=0)
    to_key = torch.minimum(moved + count - low, other.length[rectangle])
    kept = from_key < to_key
    rectangle, start, count, moved, low, high, from_key, to_key = (
        x[kept] for x in (rectangle, start, count, moved, low, high, from_key, to_key)
    )
    # and counted from the beginnings of the item and of the span
    low, high, keys = low - moved + from_key, high - moved + from_key, to_key - from_key
    full_first = ((count - 1 - high).clamp(min=0) + others - 1) // others
    full_last = torch.minimum(keys, (1 - low).clamp(min=0)) // others
    full_last = torch.maximum(full_first, full_last)
    place, other_place = own.place[rectangle] + moved, other.place[rectangle] + from_key
    if every:
        place, other_place = place % every[-1], other_place % every[-1]
    spans = torch.stack(
        (
            other.row[rectangle] + from_key * steps[1],
            keys,
            low.clamp(-_INT32, _INT32),
            high.clamp(-_INT32, _INT32),
            full_first.clamp(max=_INT32),
            full_last.clamp(max=_INT32),
            place,
            other_place,
            rectangles.weight[rectangle],
        ),
        1,
    )
    order = start.argsort(stable=True)
    _, lengths = start[order].unique_consecutive(return_counts=True)
    last = lengths.cumsum(0)
    leads = order[last - lengths]  # a span of each item
    row = own.row[rectangle] + moved * steps[0]
    items = torch.stack(
        (rectangles.head[rectangle][leads], row[leads], count[leads], last - lengths, last),
        1,
    )
    # the longest items first, so that no program starts a long one when all others end
    work = torch.zeros(len(items), dtype=torch.long).index_add(
        0, torch.arange(len(items)).repeat_interleave(lengths), ((keys + others - 1) // others)[order]
    )
    items = items[work.argsort(descending=True, stable=True)]
    return TileList(items.to(torch.int32), spans[order].to(torch.int32))
