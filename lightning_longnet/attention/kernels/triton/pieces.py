"""The rows of rectangles, cut into pieces: equally distant rows, which each rectangle has all of or none.

The queries of three branches are in three pieces:

    branch 0    0 1 2 3 4 5 6 7        0 4, which all branches have
    branch 1    0   2   4   6          2 6, which branches 0 and 1 have
    branch 2    0       4              1 3 5 7, which only branch 0 has
"""

from __future__ import annotations

from math import lcm
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lightning_longnet.attention.kernels.triton.rectangles import Rectangles


class Pieces(NamedTuple):
    """The pieces (P,) of the queries of rectangles, and the rectangles that have each of them, (C,).

    Attributes:
        position, stride, length: the first row among those of its owner, the distance of two rows, and their number.
        covered, rectangle: a piece, and a rectangle that has its rows.
    """

    position: Tensor
    stride: Tensor
    length: Tensor
    covered: Tensor
    rectangle: Tensor


class _Group(NamedTuple):
    """Pieces of one stride; all fields are (P,).

    Attributes:
        number: the number of the piece of one residue with which the piece begins, in which `covers` counts.
        owner, position, length: as those of `Side` and `Pieces`.
        cover: a number for the set of rectangles that have the piece.
    """

    number: Tensor
    owner: Tensor
    position: Tensor
    length: Tensor
    cover: Tensor

    def taken(self, which: Tensor) -> _Group:
        """Return some of the pieces, by their places or a mask."""
        return _Group(*(x[which] for x in self))


def period(rectangles: Rectangles) -> int:
    """Return the number of rows after which the rows of all rectangles repeat.

    It is the least common multiple of their steps.  `pieces` cuts rows into residues modulo it, and `tiled_phases`
    joins no phases where it is long.
    """
    return lcm(*rectangles.step.unique().tolist())


def pieces(rectangles: Rectangles) -> Pieces:
    """Return the pieces of the queries of rectangles, as large as possible: rows that rectangles end in are cut.

    `tile_list` calls it and cuts each piece into items.
    """
    own, widest = rectangles.queries, period(rectangles)
    # the rows of each residue modulo the largest distance are a lane, of which each rectangle has consecutive rows
    residues = widest // rectangles.step
    rectangle = torch.arange(len(residues)).repeat_interleave(residues)
    skipped = torch.arange(len(rectangle)) - (residues.cumsum(0) - residues)[rectangle]
    length = (own.length[rectangle] - skipped + residues[rectangle] - 1) // residues[rectangle]
    rectangle, skipped, length = (x[length > 0] for x in (rectangle, skipped, length))
    position = own.position[rectangle] + skipped * rectangles.step[rectangle]
    width = int((position // widest + length).max()) + 1
    begin = (own.owner[rectangle] * widest + position % widest) * width + position // widest
    cuts = torch.cat((begin, begin + length)).unique()
    first, last = torch.searchsorted(cuts, begin), torch.searchsorted(cuts, begin + length)
    entry = torch.arange(len(begin)).repeat_interleave(last - first)
    before = (last - first).cumsum(0) - (last - first)
    covered = first[entry] + torch.arange(len(entry)) - before[entry]
    rectangle = rectangle[entry]
    # a random number for each rectangle: equal sums are equal sets
    names = torch.randint(2**62, (len(residues),), generator=torch.Generator().manual_seed(0))
    cover = torch.zeros(len(cuts), dtype=torch.long).index_add(0, covered, names[rectangle])
    number = covered.unique()
    lane, place = cuts[number] // width, cuts[number] % width
    group = _Group(
        number,
        lane // widest,
        place * widest + lane % widest,
        cuts[number + 1] - cuts[number],
        cover[number],
    )
    joined = list(_joined(group, widest))
    stride = torch.cat([torch.full_like(members.number, distance) for members, distance in joined])
    whole = _Group(*(torch.cat(columns) for columns in zip(*(members for members, _ in joined), strict=True)))
    place_of = torch.full((len(cuts),), -1).index_copy(0, whole.number, torch.arange(len(whole.number)))
    is_kept = place_of[covered] >= 0
    return Pieces(whole.position, stride, whole.length, place_of[covered[is_kept]], rectangle[is_kept])


def _joined(group: _Group, stride: int) -> Iterator[tuple[_Group, int]]:
    """Yield pieces with their stride, after those that interleave and are in the same rectangles were joined."""
    for factor in _prime_factors(stride):
        group, joined = _interleaved(group, stride, factor)
        if len(joined.number):
            yield from _joined(joined, stride // factor)
    if len(group.number):
        yield group, stride


def _interleaved(group: _Group, stride: int, factor: int) -> tuple[_Group, _Group]:
    """Return the pieces that stay, and those that `factor` pieces at the distance `stride // factor` make together."""
    extent = int(group.position.max()) + stride + 1 if len(group.number) else 1
    key, order = (group.owner * extent + group.position).sort()
    is_first, members = torch.ones(len(order), dtype=torch.bool), [torch.arange(len(order))]
    group = group.taken(order)
    for n in range(1, factor):
        place = torch.searchsorted(key, key + n * (stride // factor)).clamp(max=len(key) - 1)
        is_first &= key[place] == key + n * (stride // factor)
        is_first &= group.cover[place] == group.cover
        # the rows alternate, so the first pieces may have one row more than the last; where rectangles of kept blocks
        # end in between, pieces differ by more
        is_first &= group.length[members[-1]] >= group.length[place]
        is_first &= group.length - group.length[place] <= 1
        members.append(place)
    first = torch.stack(members)[:, is_first]
    stays = torch.ones(len(order), dtype=torch.bool)
    stays[first.flatten()] = False
    return group.taken(stays), group.taken(first[0])._replace(length=group.length[first].sum(0))


def _prime_factors(number: int) -> list[int]:
    """Return the prime numbers that divide a number."""
    return [n for n in range(2, number + 1) if number % n == 0 and all(n % m for m in range(2, n))]
