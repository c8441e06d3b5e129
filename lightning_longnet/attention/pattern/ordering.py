"""Orders of tokens: Hilbert curves over grids of any size, along which the segments of a pattern are compact.

An order is a permutation: `order[p]` is the token that stands at place p of the sequence, by its number in the grid,
which counts the last dimension fastest.  It is applied where tokens enter a model, and its inverse where they leave.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from math import isqrt, prod
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_longnet.attention.pattern.pattern import Pattern

Ordering = Literal["raster", "hilbert"]

# (axis, begin, end), walked backwards where end is before begin
_Stretch = tuple[int, int, int]
_Piece = tuple[_Stretch, _Stretch, _Stretch]
_Sizes = tuple[int, int, int]


def raster_order(shape: Sequence[int]) -> Tensor:
    """Tokens of a grid as they are counted: row by row."""
    return torch.arange(prod(_checked_shape(shape)))


def hilbert_order(shape: Sequence[int]) -> Tensor:
    """Tokens of a grid along a generalised Hilbert curve, whatever its two or three sizes are.

    Tokens that follow each other are neighbours in the grid, without exception.  What lies near each other along the
    curve is near in the grid, too; the converse holds of no curve.

    The curve is made of pieces.  Each walks from a corner to the far end of its first axis, which is possible where
    that axis is even, or all are odd.  Pieces are cut so that this holds of every one: lengths along an axis that
    becomes a first one are even.  The whole may end elsewhere, and then its first axis is chosen so.

    >>> hilbert_order((4, 4)).view(4, 4).tolist()
    [[0, 4, 5, 1], [2, 3, 7, 6], [10, 11, 15, 14], [13, 9, 8, 12]]
    """
    sizes = _checked_shape(shape)
    if len(sizes) not in (2, 3):
        raise ValueError(f"shape must have two or three sizes, got {tuple(shape)!r}")
    known: dict[_Sizes, Tensor] = {}
    rows, columns = sizes[-2:]
    whole = (sizes[0] if len(sizes) == 3 else 1, rows, columns)
    places = torch.zeros(3, prod(sizes), dtype=torch.int32)
    _lay(_opened(whole), places, known)
    order = torch.zeros(prod(sizes), dtype=torch.long)
    for size, along in zip(sizes, places[-len(sizes) :], strict=True):
        order.mul_(size).add_(along)
    return order


def sequence_hilbert_order(length: int) -> Tensor:
    """A sequence laid row by row over a nearly square grid, along the curve there.

    What it changes: a segment of s tokens is then some sqrt(s) stretches of sqrt(s) tokens each, and the stretches
    stand about sqrt(length) apart.  This helps where tokens at such a distance belong together, as in an image or a
    table whose rows are about that long; where their length is known, `hilbert_order` of that grid is the better one.
    In text they do not: a segment loses near tokens for far ones that mean nothing.

    Neighbours in this order are in the sequence 1 or a row apart, except where the last row is not full.
    """
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise ValueError(f"length must be a positive integer, got {length!r}")
    columns = isqrt(length - 1) + 1
    order = hilbert_order((-(-length // columns), columns))
    return order[order < length]


def inverse_order(order: Tensor) -> Tensor:
    """At which place each token stands: `x[order][inverse_order(order)]` is x."""
    if order.dim() != 1 or order.dtype.is_floating_point or order.dtype == torch.bool:
        raise ValueError(f"order must be integers (tokens,), got {order.dtype} {tuple(order.shape)}")
    inverse = torch.full_like(order, -1)
    inverse[order.clamp(0, len(order) - 1)] = torch.arange(len(order), dtype=order.dtype, device=order.device)
    if bool((inverse < 0).any()):
        raise ValueError(f"order must name each of the {len(order)} tokens once")
    return inverse


def order_of(ordering: Ordering, shape: Sequence[int]) -> Tensor:
    """Return the order of a grid by its name."""
    return hilbert_order(shape) if ordering == "hilbert" else raster_order(shape)


def causal_order(order: Tensor, pattern: Pattern) -> Tensor:
    """The same segments and residues, each with its tokens as they are counted in the grid.

    On this order a causal pattern of one branch shows a query those tokens of its set that do not come after it in the
    grid.  A set is a segment's tokens of one residue; both are those of `order`.

    Several branches are refused, as no one order serves them.  A short segment fixes which tokens come first; a longer
    one that holds it would have to mix them with those of the next.  In a grid of 4 x 4 under the Hilbert curve, with
    segments of 4 and 16, token 4 is in the first segment and token 2 in the second: 4 stands before 2, and the longer
    segment would hide 2 from 4.

    Args:
        order: as `hilbert_order` makes them.
        pattern: of one branch, or of several that are equal.
    """
    _check_one_branch(pattern)
    length, rate = pattern.branches[0].segment_length, pattern.branches[0].dilation_rate
    places = torch.arange(len(order), device=order.device)
    length = len(order) if length is None else length
    group = places // length * rate + places % length % rate
    by_token = order.argsort()
    found = torch.empty_like(order)
    found[group.argsort(stable=True)] = order[by_token][group[by_token].argsort(stable=True)]
    return found


def check_ordering(ordering: Ordering, pattern: Pattern) -> None:
    """Raise a ValueError where no order of a sequence serves the pattern."""
    if ordering != "hilbert":
        return
    if any(branch.is_causal for branch in pattern.branches):
        if not pattern.is_causal:
            raise ValueError("pattern must be causal in all of its branches or in none where ordering is 'hilbert'")
        _check_one_branch(pattern)


def _check_one_branch(pattern: Pattern) -> None:
    """Raise a ValueError unless all branches are one, without a window."""
    kinds = {(branch.segment_length, branch.dilation_rate, branch.window) for branch in pattern.branches}
    if len(kinds) != 1 or pattern.branches[0].window is not None:
        raise ValueError(
            f"pattern must have one branch of segments, got {len(kinds)}: no order keeps what is causal in the grid "
            "for segments of several lengths at once"
        )


def order_of_sequence(ordering: Ordering, length: int, pattern: Pattern, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the order of a sequence's rows and its inverse: `order[p]` is the token at place p of the line.

    Where the pattern is causal, a query sees the keys of its segment and residue along the line that do not come after
    it in the sequence.  That is possible for patterns of one branch alone; see `causal_order`.
    """
    return _order(ordering, length, pattern, device)


@lru_cache(32)
@torch.inference_mode(False)  # a cached tensor made in inference mode could not be used in training
def _order(ordering: Ordering, length: int, pattern: Pattern, device: torch.device) -> tuple[Tensor, Tensor]:
    order = torch.arange(length)
    if ordering == "hilbert":
        order = sequence_hilbert_order(length)
        if pattern.is_causal:
            order = causal_order(order, pattern)
    return order.to(device), inverse_order(order).to(device)


def _checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    sizes = tuple(shape)
    if not sizes or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in sizes):
        raise ValueError(f"shape must be positive integers, got {sizes!r}")
    return sizes


def _walked(sizes: _Sizes, known: dict[_Sizes, Tensor]) -> Tensor:
    """Places (3, cells) from the corner at 0 to the far end of the first axis; those of a size are made once."""
    if sizes not in known:
        places = torch.zeros(3, prod(sizes), dtype=torch.int32)
        if sizes[1] == sizes[2] == 1:
            torch.arange(sizes[0], out=places[0])
        else:
            _lay(_pieces(sizes), places, known)
        known[sizes] = places
    return known[sizes]


def _lay(pieces: list[_Piece], places: Tensor, known: dict[_Sizes, Tensor]) -> None:
    """One piece after the other."""
    done = 0
    for piece in pieces:
        first, second, third = (abs(end - begin) for _, begin, end in piece)
        inner = _walked((first, second, third), known)
        here = places[:, done : done + inner.shape[1]]
        for (axis, begin, end), along in zip(piece, inner, strict=True):
            if (begin, end) == (0, 1):
                continue  # as it was made: the memory of a dimension that a grid lacks is never touched
            if begin < end:
                torch.add(along, begin, out=here[axis])
            else:
                torch.sub(torch.tensor(begin - 1, dtype=along.dtype), along, out=here[axis])
        done += inner.shape[1]
    assert done == places.shape[1]


def _pieces(sizes: _Sizes) -> list[_Piece]:
    """A box whose first axis is even, or all of whose are odd, as such boxes that join."""
    assert sizes[0] % 2 == 0 or prod(sizes) % 2, sizes
    a, b, c = sizes
    if 2 * a > 3 * max(b, c):
        half = _half(a)
        return [((0, 0, half), (1, 0, b), (2, 0, c)), ((0, half, a), (1, 0, b), (2, 0, c))]
    y, z = (1, 2) if b >= c else (2, 1)
    if 3 * sizes[y] <= 4 * sizes[z] and not b * c % 2:
        if sizes[z] % 2:
            y, z = z, y
        return _five(a, sizes[y], sizes[z], y, z)
    return _three(a, sizes[y], sizes[z], y, z)


def _three(a: int, b: int, c: int, y: int, z: int) -> list[_Piece]:
    """Up one side, across, and down the other: halves of the first axis and of y."""
    left, low = a // 2, _half(b)
    return [
        ((y, 0, low), (z, 0, c), (0, 0, left)),
        ((0, 0, a), (y, low, b), (z, 0, c)),
        ((y, low, 0), (z, 0, c), (0, a, left)),
    ]


def _five(a: int, b: int, c: int, y: int, z: int) -> list[_Piece]:
    """Up one side, back, across, forth, and down the other: halves of all axes.  z is even."""
    left, low, near = a // 2, _half(b), _half(c)
    return [
        ((y, 0, low), (z, 0, near), (0, 0, left)),
        ((z, 0, c), (0, 0, left), (y, low, b)),
        ((0, 0, a), (y, low, 0), (z, c, near)),
        ((z, c, 0), (0, a, left), (y, low, b)),
        ((y, low, 0), (z, 0, near), (0, a, left)),
    ]


def _half(size: int) -> int:
    """An even one, but of 2."""
    return size // 2 + (size // 2 % 2 if size > 2 else 0)


def _opened(sizes: _Sizes) -> list[_Piece]:
    """The whole, along its longest axis.  Where that is odd and another is even, its last piece turns aside."""
    axes = sorted(range(3), key=lambda axis: -sizes[axis])
    longest = sizes[axes[0]]
    others = [(axis, 0, sizes[axis]) for axis in axes[1:]]
    if longest % 2 == 0 or prod(sizes) % 2:
        return [((axes[0], 0, longest), others[0], others[1])]
    cuts = [0]
    while 2 * (longest - cuts[-1]) > 3 * sizes[axes[1]] and longest - cuts[-1] > 2:
        cuts.append(cuts[-1] + _half(longest - cuts[-1]))
    found: list[_Piece] = [((axes[0], *cut), others[0], others[1]) for cut in pairwise(cuts)]
    rest = (axes[0], cuts[-1], longest)
    first, second = others if others[0][2] % 2 == 0 else others[::-1]
    return [*found, (first, rest, second)]
