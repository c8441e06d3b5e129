"""Gather the blocks of keys that the same queries see, so that one kernel call has many queries and all their keys.

In a plan a branch with a sparsity is blocks of queries and keys at one distance each, which ranks can cut and count:

    keys of block   0 1 2 3            plan: distance 0 for queries 0 1 2 3, distance 2 for queries 2 3
    queries 0       x . . .
            1       . x . .            gathered: queries 0 and 1 with one block of keys each,
            2       x . x .                      queries 2 and 3 with two
            3       . x . x

A kernel would be called for each distance, each time with few keys.  So before they run, the keys of blocks with equal
queries are put side by side, and queries that see equally many keys are put into one call.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from lightning_longnet.attention.plan.lattice import Lattice

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

    from lightning_longnet.attention.plan.block import Block


@dataclass(frozen=True)
class Gathered(Lattice):
    """Keys in pieces: row i of segment s is row `places[s][i // piece] + i % piece * step` for the first head.

    Attributes:
        places: for each segment the first rows of its pieces.
        piece: the number of rows of a piece; the last piece of a segment may be shorter.

    A key may be in many segments, so the gradients of its row are summed.
    """

    places: tuple[tuple[int, ...], ...] = ()
    piece: int = 1

    @property
    def is_view(self) -> bool:
        """Whether `read` returns a view: gathered keys are always copied."""
        return False

    def read(self, t: Tensor) -> Tensor:
        """Return a copy of the rows of t (B, N, H, D), (B, segments, heads, rows, D)."""
        return self.copied(t)

    def add(self, t: Tensor, values: Tensor, weight: int) -> None:
        """Add `weight` times values (B, segments, heads, rows, D) to the rows of t, which must be contiguous."""
        rows, heads = self.indices(t.device)
        cells = (rows * t.shape[2] + heads).flatten()
        t.view(t.shape[0], -1, t.shape[3]).index_add_(1, cells, values.flatten(1, 3).to(t.dtype), alpha=weight)

    def indices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the rows (segments, heads, rows) and the heads (heads, 1) of all elements."""
        a = torch.arange(self.heads, device=device)[:, None]
        within = torch.arange(self.piece, device=device) * self.step
        rows = (torch.tensor(self.places, device=device)[..., None] + within).flatten(1)[:, None, : self.rows]
        return rows + a * self.row_shift, self.head + a * self.head_step

    def segments(self, first: int, last: int) -> Lattice:
        """Return the segments `first` to `last`."""
        return replace(self, starts=self.starts[first:last], places=self.places[first:last])

    def shifted(self, by: int) -> Lattice:
        """Return the same elements, `by` rows further on."""
        moved = tuple(tuple(place + by for place in each) for each in self.places)
        return replace(self, starts=tuple(start + by for start in self.starts), places=moved)

    def cells(self) -> Iterator[tuple[int, int]]:
        """Yield the (row, head) of every element, for tests and for drawing."""
        rows, heads = self.indices(torch.device("cpu"))
        for segment in rows.tolist():
            for a, of_head in enumerate(segment):
                yield from ((row, int(heads[a])) for row in of_head)


class _Heads(NamedTuple):
    """The properties that blocks must share for their keys to be gathered: heads, spacing, weight and stack.

    `queries` and `keys` are their lattices without the first rows, and `keys` also without the number of rows.
    """

    queries: Lattice
    keys: Lattice
    weight: int
    stack: int


class _Piece(NamedTuple):
    """A block of keys that some queries see: `rows` keys from row `start` on, under the mask of `low` and `high`."""

    rows: int
    low: int | None
    high: int | None
    start: int


class _Form(NamedTuple):
    """The properties that queries must share to be in one call: `rows` keys in pieces of `piece` rows, and the mask."""

    piece: int
    rows: int
    low: int | None
    high: int | None


def gathered(blocks: Iterable[Block]) -> tuple[Block, ...]:
    """Return blocks with the same pairs of one branch, those of a stack gathered into fewer calls.

    Blocks of negative weight come last.
    """
    result: list[Block] = []
    # for each kind of heads, and each first row of queries, the pieces that these queries see
    pieces: dict[_Heads, dict[int, list[_Piece]]] = defaultdict(lambda: defaultdict(list))
    templates: dict[_Heads, Block] = {}
    for block in blocks:
        if block.stack is None:
            result.append(block)
            continue
        assert not block.repeats, "a plan gives no weights to kept blocks"
        heads = _Heads(
            replace(block.queries, starts=range(1)),
            replace(block.keys, starts=range(1), rows=1),
            block.weight,
            block.stack,
        )
        templates[heads] = block
        for query, key in zip(block.queries.starts, block.keys.starts, strict=True):
            pieces[heads][query].append(_Piece(block.keys.rows, block.low, block.high, key))
    for heads, of_queries in pieces.items():
        calls: dict[_Form, list[tuple[int, tuple[int, ...]]]] = defaultdict(list)
        for query in sorted(of_queries):
            for form, places in _forms(of_queries[query]):
                calls[form].append((query, places))
        for form, placed in calls.items():
            queries = replace(heads.queries, starts=_starts([query for query, _ in placed]))
            keys = _gathered_keys(heads.keys, form, tuple(places for _, places in placed))
            result.append(replace(templates[heads], queries=queries, keys=keys, low=form.low, high=form.high))
    return tuple(sorted(result, key=lambda block: -block.weight))


def _forms(pieces: list[_Piece]) -> Iterator[tuple[_Form, tuple[int, ...]]]:
    """Yield the forms into which the pieces of the same queries are put, each with the first rows of its pieces.

    A form has whole pieces of one size.  One shorter or masked piece may follow as the last one; any other such piece
    is a form of its own.
    """
    by_rows: dict[int, list[int]] = defaultdict(list)
    bounded: list[_Piece] = []
    for piece in pieces:
        if (piece.low, piece.high) == (None, None):
            by_rows[piece.rows].append(piece.start)
        else:
            bounded.append(piece)
    # a single short piece is cheaper behind longer ones than in a call of its own
    for rows in sorted(by_rows):
        if len(by_rows[rows]) == 1 and rows < max(by_rows):
            (start,) = by_rows.pop(rows)
            bounded.append(_Piece(rows, None, None, start))
    for rows, starts in by_rows.items():
        starts.sort()
        total, low = len(starts) * rows, None
        # The mask of the last piece, `low` moved by the rows before it, masks none of these rows as long as the first
        # query sees the first row of the last piece.
        last = next((p for p in bounded if p.rows <= rows and p.high is None and (p.low or 0) <= 0), None)
        if last is not None:
            bounded.remove(last)
            starts.append(last.start)
            low = None if last.low is None else last.low - total
            total += last.rows
        yield _Form(rows, total, low, None), tuple(starts)
    for piece in bounded:
        yield _Form(piece.rows, piece.rows, piece.low, piece.high), (piece.start,)


def _gathered_keys(keys: Lattice, form: _Form, places: tuple[tuple[int, ...], ...]) -> Gathered:
    """Return the keys of a call with the heads and the spacing of `keys`; `places` are its pieces by segment."""
    return Gathered(
        tuple(each[0] for each in places),
        form.rows,
        keys.step,
        keys.head,
        keys.heads,
        keys.head_step,
        keys.row_shift,
        places,
        form.piece,
    )


def _starts(rows: list[int]) -> range | tuple[int, ...]:
    """Return ascending rows as a range if they are evenly spaced, so that they are read without a copy."""
    step = rows[1] - rows[0] if len(rows) > 1 else 1
    even = range(rows[0], rows[-1] + 1, step)
    return even if len(even) == len(rows) and list(even) == rows else tuple(rows)
