"""Orders of the tokens in which a pattern counts them: along a Hilbert curve the segments of a grid are compact.

An order is a permutation, (tokens,): `order[p]` is the token at place p of the sequence, by its number in the grid,
which counts the last dimension fastest.  It is applied where tokens enter a model, and its inverse where they leave.
"""

from __future__ import annotations

from itertools import pairwise
from math import isqrt, prod
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_longnet.attention.pattern.pattern import Pattern

Ordering = Literal["raster", "hilbert"]

# (axis, begin, end): the cells of a box along one axis, backwards if end < begin
_Stretch = tuple[int, int, int]
# A box within a box.  Its curve begins at the first corner and ends at the far end of the first stretch.
_Piece = tuple[_Stretch, _Stretch, _Stretch]
_Sizes = tuple[int, int, int]


def raster_order(shape: Sequence[int]) -> Tensor:
    """Return the tokens of a grid in the order in which they are counted, row by row.

    Users call it, and `order_of`.
    """
    return torch.arange(prod(_checked_shape(shape)))


def hilbert_order(shape: Sequence[int]) -> Tensor:
    """Return the tokens of a grid along a generalised Hilbert curve, for two or three sizes of any value.

    Users call it for their grids, `order_of` for images, and `sequence_hilbert_order`.

    Tokens that follow each other are neighbours in the grid, without exception.  Tokens that are near each other along
    the curve are near in the grid, too; the converse is true of no curve.

    The curve is made of pieces.  Each runs from a corner to the far end of its first axis, which is possible if that
    axis is even, or if all three are odd.  Pieces are cut so that this is so for every one: the lengths along an axis
    that becomes a first one are even.  The curve of the whole grid may end at another corner; see `_first_pieces`.

    >>> hilbert_order((4, 4)).view(4, 4).tolist()
    [[0, 4, 5, 1], [2, 3, 7, 6], [10, 11, 15, 14], [13, 9, 8, 12]]
    """
    sizes = _checked_shape(shape)
    if len(sizes) not in (2, 3):
        raise ValueError(f"shape must have two or three sizes, got {tuple(shape)!r}")
    cache: dict[_Sizes, Tensor] = {}
    rows, columns = sizes[-2:]
    whole = (sizes[0] if len(sizes) == 3 else 1, rows, columns)
    coordinates = torch.zeros(3, prod(sizes), dtype=torch.int32)
    _write_pieces(_first_pieces(whole), coordinates, cache)
    order = torch.zeros(prod(sizes), dtype=torch.long)
    for size, along in zip(sizes, coordinates[-len(sizes) :], strict=True):
        order.mul_(size).add_(along)
    return order


def sequence_hilbert_order(length: int) -> Tensor:
    """Return the order of a sequence that is laid row by row over a nearly square grid, along the curve there.

    A segment of s tokens then has about sqrt(s) stretches of sqrt(s) tokens each, at a distance of about sqrt(length)
    from one another.  This helps if tokens at such a distance belong together, as in an image or a table with rows of
    about that length; if that length is known, `hilbert_order` of that grid is better.  In text they do not: a segment
    loses near tokens, and gains far ones without a meaning for it.  `attend` draws patterns along it where its ordering
    is "hilbert": `_document_curve` of lines.py calls it.

    Neighbours in this order are 1 or a row from each other in the sequence, except where the last row is not full.
    """
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise ValueError(f"length must be a positive integer, got {length!r}")
    columns = isqrt(length - 1) + 1
    order = hilbert_order((-(-length // columns), columns))
    return order[order < length]


def inverse_order(order: Tensor) -> Tensor:
    """Return the place of each token, (tokens,): `x[order][inverse_order(order)]` is x.

    Users call it to undo an order, and `_curve_lines`, as each `Line` along a curve has both.  A ValueError is raised
    if `order` does not name each token once.
    """
    if order.dim() != 1 or order.dtype.is_floating_point or order.dtype == torch.bool:
        raise ValueError(f"order must be integers (tokens,), got {order.dtype} {tuple(order.shape)}")
    inverse = torch.full_like(order, -1)
    inverse[order.clamp(0, len(order) - 1)] = torch.arange(len(order), dtype=order.dtype, device=order.device)
    if bool((inverse < 0).any()):
        raise ValueError(f"order must name each of the {len(order)} tokens once")
    return inverse


def order_of(ordering: Ordering, shape: Sequence[int]) -> Tensor:
    """Return the order of a grid by its name: `hilbert_order(shape)` or `raster_order(shape)`.

    `_cached_order` of the model LongViT calls it for the patches of an image.
    """
    return hilbert_order(shape) if ordering == "hilbert" else raster_order(shape)


def causal_order(order: Tensor, pattern: Pattern) -> Tensor:
    """Return an order with the same segments and residues, each with its tokens sorted as they are counted in the grid.

    Users call it for a causal model of a grid; nothing in the package does.  In this order a causal pattern of one
    branch shows a query those tokens of its set that do not come after it in the grid.  A set is the tokens of one
    segment and residue of `order`.

    Patterns of several different branches are refused, since no single order serves them: `attend` uses one for each.
    A short segment decides which tokens come first; a longer one that contains it would have to mix them with those of
    the next.  In a grid of 4 x 4 under the Hilbert curve, with segments of 4 and 16, token 4 is in the first segment
    and token 2 in the second: 4 is at an earlier place than 2, so the longer segment would hide 2 from 4.

    Args:
        order: an order as that of `hilbert_order`.
        pattern: a pattern of one branch, or of several equal ones.
    """
    kinds = {(branch.segment_length, branch.dilation_rate, branch.window) for branch in pattern.branches}
    if len(kinds) != 1 or pattern.branches[0].window is not None:
        raise ValueError(
            f"pattern must have one branch of segments, got {len(kinds)}: no order keeps what is causal in the grid "
            "for segments of several lengths at once"
        )
    return sorted_sets(order, pattern.branches[0].segment_length, pattern.branches[0].dilation_rate)


def sorted_sets(order: Tensor, segment_length: int | None, rate: int) -> Tensor:
    """Return an order in which the tokens of each set are sorted among the places that the set has in `order`.

    A set is the tokens of one segment and residue of `order`.  `causal_order` calls it, and `_curve_lines` for a causal
    pattern along a curve, on whose lines a mask by places then masks the tokens that come later in the sequence.
    """
    places = torch.arange(len(order), device=order.device)
    length = len(order) if segment_length is None else segment_length
    set_of_place = places // length * rate + places % length % rate  # the number of the set
    by_token = order.argsort()
    # Stable sorts by set: on the left the places of each set in order, on the right its tokens in ascending order.
    result = torch.empty_like(order)
    result[set_of_place.argsort(stable=True)] = order[by_token][set_of_place[by_token].argsort(stable=True)]
    return result


def _checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the sizes of a grid, or raise a ValueError if they are not positive integers."""
    sizes = tuple(shape)
    if not sizes or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in sizes):
        raise ValueError(f"shape must be positive integers, got {sizes!r}")
    return sizes


def _box_curve(sizes: _Sizes, cache: dict[_Sizes, Tensor]) -> Tensor:
    """Return the coordinates of the cells of a box in the order of its curve, (3, cells).

    The curve begins at (0, 0, 0) and ends at (sizes[0] - 1, 0, 0).  `cache` holds the curves of boxes by
    size: the pieces of a large box have few different sizes.
    """
    if sizes not in cache:
        coordinates = torch.zeros(3, prod(sizes), dtype=torch.int32)
        if sizes[1] == sizes[2] == 1:
            torch.arange(sizes[0], out=coordinates[0])
        else:
            _write_pieces(_pieces(sizes), coordinates, cache)
        cache[sizes] = coordinates
    return cache[sizes]


def _write_pieces(pieces: list[_Piece], coordinates: Tensor, cache: dict[_Sizes, Tensor]) -> None:
    """Write the coordinates of the cells along pieces that follow one another, (3, cells), to `coordinates`."""
    done = 0
    for piece in pieces:
        first, second, third = (abs(end - begin) for _, begin, end in piece)
        inner = _box_curve((first, second, third), cache)
        target = coordinates[:, done : done + inner.shape[1]]
        for (axis, begin, end), along in zip(piece, inner, strict=True):
            if (begin, end) == (0, 1):
                continue  # zeros already: the pages of a dimension that a grid lacks are then never allocated
            if begin < end:
                torch.add(along, begin, out=target[axis])
            else:
                torch.sub(torch.tensor(begin - 1, dtype=along.dtype), along, out=target[axis])
        done += inner.shape[1]
    assert done == coordinates.shape[1]


def _pieces(sizes: _Sizes) -> list[_Piece]:
    """Return the pieces of a box along its curve; it and each piece has an even first axis, or three odd ones."""
    assert sizes[0] % 2 == 0 or prod(sizes) % 2, sizes
    a, b, c = sizes
    if 2 * a > 3 * max(b, c):  # a long box: one half after the other
        half = _even_half(a)
        return [((0, 0, half), (1, 0, b), (2, 0, c)), ((0, half, a), (1, 0, b), (2, 0, c))]
    y, z = (1, 2) if b >= c else (2, 1)
    if 3 * sizes[y] <= 4 * sizes[z] and not b * c % 2:
        if sizes[z] % 2:
            y, z = z, y
        return _five_pieces(a, sizes[y], sizes[z], y, z)
    return _three_pieces(a, sizes[y], sizes[z], y, z)


def _three_pieces(a: int, b: int, c: int, y: int, z: int) -> list[_Piece]:
    """Return pieces up one side, across, and down the other: halves of the first axis x and of y.

    `_pieces` takes them for the boxes that are not long and do not get five pieces.  a, b, c are the sizes along x
    (axis 0), y and z; y and z are the numbers of those axes.

    The picture has x to the right and y upwards.  Each piece has all of z, and the curve runs from the lower left
    corner to the lower right one:

        2 2 2 2
        1 1 3 3
    """
    left, low = a // 2, _even_half(b)
    return [
        ((y, 0, low), (z, 0, c), (0, 0, left)),
        ((0, 0, a), (y, low, b), (z, 0, c)),
        ((y, low, 0), (z, 0, c), (0, a, left)),
    ]


def _five_pieces(a: int, b: int, c: int, y: int, z: int) -> list[_Piece]:
    """Return pieces up one side, back, across, forth, and down the other: halves of all axes.

    `_pieces` takes them for a box that is not long, and of which y and z are about equally long, one of them even.  a,
    b, c are the sizes along x (axis 0), y and z; y and z are the numbers of those axes; c must be even.

    The picture has x to the right and y upwards.  The curve runs from the lower left corner in front to the lower right
    one in front:

        front half of z   back half of z
        2 2 4 4           2 2 4 4
        1 1 5 5           3 3 3 3
    """
    left, low, near = a // 2, _even_half(b), _even_half(c)
    return [
        ((y, 0, low), (z, 0, near), (0, 0, left)),
        ((z, 0, c), (0, 0, left), (y, low, b)),
        ((0, 0, a), (y, low, 0), (z, c, near)),
        ((z, c, 0), (0, a, left), (y, low, b)),
        ((y, low, 0), (z, 0, near), (0, a, left)),
    ]


def _even_half(size: int) -> int:
    """Return half of a size, rounded up to an even number, unless the size is 2."""
    return size // 2 + (size // 2 % 2 if size > 2 else 0)


def _first_pieces(sizes: _Sizes) -> list[_Piece]:
    """Return the pieces of the whole grid, along its longest axis.

    If that axis is odd and another is even, no curve ends at its far end.  Then even pieces are cut off along it, and
    the last piece runs along an even axis instead.
    """
    axes = sorted(range(3), key=lambda axis: -sizes[axis])
    longest = sizes[axes[0]]
    others = [(axis, 0, sizes[axis]) for axis in axes[1:]]
    if longest % 2 == 0 or prod(sizes) % 2:
        return [((axes[0], 0, longest), others[0], others[1])]
    cuts = [0]
    while 2 * (longest - cuts[-1]) > 3 * sizes[axes[1]] and longest - cuts[-1] > 2:
        cuts.append(cuts[-1] + _even_half(longest - cuts[-1]))
    pieces: list[_Piece] = [((axes[0], *cut), others[0], others[1]) for cut in pairwise(cuts)]
    rest = (axes[0], cuts[-1], longest)
    first, second = others if others[0][2] % 2 == 0 else others[::-1]
    return [*pieces, (first, rest, second)]
