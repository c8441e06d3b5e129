"""`gathered`: one kernel call for all kept blocks of keys that queries of a block-sparse branch see.

A plan holds a block-sparse branch as pairs of a block of queries and a block of keys at one distance, which ranks can
cut and count.  A kernel call for each distance would have few keys.  Before they run, the keys of blocks with equal
queries are therefore placed side by side, and queries that see equally many keys share one call:

    queries   keys that are kept              calls
    0 to 3    0 to 3                          the first has 4 keys
    4 to 7    0 to 3, 4 to 7                  the others have 8 keys each,
    8 to 11   0 to 3, 8 to 11                 and share one call
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

    from lightning_longnet.attention.plan.blocks import Block


@dataclass(frozen=True)
class Gathered(Lattice):
    """Rows of keys in pieces: row i of segment s is row `i % piece` of the piece at `places[s][i // piece]`.

    A key may be in many segments, so `add` accumulates.
    """

    places: tuple[tuple[int, ...], ...] = ()
    piece: int = 1

    @property
    def is_view(self) -> bool:
        return False

    def read(self, t: Tensor) -> Tensor:
        return self.copied(t)

    def add(self, t: Tensor, values: Tensor, weight: int) -> None:
        """Add `weight` times values (B, segments, heads, rows, D) to their rows of a contiguous (B, N, H, D)."""
        rows, heads = self.indices(t.device)
        cells = (rows * t.shape[2] + heads).flatten()
        t.view(t.shape[0], -1, t.shape[3]).index_add_(1, cells, values.flatten(1, 3).to(t.dtype), alpha=weight)

    def indices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        a = torch.arange(self.heads, device=device)[:, None]
        within = torch.arange(self.piece, device=device) * self.step
        rows = (torch.tensor(self.places, device=device)[..., None] + within).flatten(1)[:, None, : self.rows]
        return rows + a * self.row_shift, self.head + a * self.head_step

    def segments(self, first: int, last: int) -> Lattice:
        return replace(self, starts=self.starts[first:last], places=self.places[first:last])

    def shifted(self, by: int) -> Lattice:
        moved = tuple(tuple(place + by for place in each) for each in self.places)
        return replace(self, starts=tuple(start + by for start in self.starts), places=moved)

    def cells(self) -> Iterator[tuple[int, int]]:
        rows, heads = self.indices(torch.device("cpu"))
        for segment in rows.tolist():
            for a, of_head in enumerate(segment):
                yield from ((row, int(heads[a])) for row in of_head)


class _Alike(NamedTuple):
    """What blocks must have in common to be gathered: all but the first rows and the number of keys."""

    queries: Lattice
    keys: Lattice
    weight: int
    stack: int


class _Piece(NamedTuple):
    """A block of keys that some queries see: the number of its rows, the bounds, and its first row."""

    rows: int
    low: int | None
    high: int | None
    start: int


class _Form(NamedTuple):
    """The keys of a call: the rows of a piece, the rows of all pieces, and the bounds as in `Shape`."""

    piece: int
    rows: int
    low: int | None
    high: int | None


def gathered(blocks: Iterable[Block]) -> tuple[Block, ...]:
    """Return blocks with the same pairs as these blocks of one branch, in fewer kernel calls."""
    found: list[Block] = []
    seen: dict[_Alike, dict[int, list[_Piece]]] = defaultdict(lambda: defaultdict(list))
    templates: dict[_Alike, Block] = {}
    for block in blocks:
        if block.stack is None:
            found.append(block)
            continue
        assert not block.repeats, "a plan gives no weights to kept blocks"
        heads = replace(block.queries, starts=range(1)), replace(block.keys, starts=range(1), rows=1)
        alike = _Alike(*heads, block.weight, block.stack)
        templates[alike] = block
        for query, key in zip(block.queries.starts, block.keys.starts, strict=True):
            seen[alike][query].append(_Piece(block.keys.rows, block.low, block.high, key))
    for alike, of_queries in seen.items():
        calls: dict[_Form, list[tuple[int, tuple[int, ...]]]] = defaultdict(list)
        for query in sorted(of_queries):
            for form, places in _forms(of_queries[query]):
                calls[form].append((query, places))
        for form, placed in calls.items():
            queries = replace(alike.queries, starts=_starts([query for query, _ in placed]))
            keys = _gathered_keys(alike.keys, form, tuple(places for _, places in placed))
            found.append(replace(templates[alike], queries=queries, keys=keys, low=form.low, high=form.high))
    # negative blocks come last, so that no sum is ever below its final value
    return tuple(sorted(found, key=lambda block: -block.weight))


def _forms(pieces: list[_Piece]) -> Iterator[tuple[_Form, tuple[int, ...]]]:
    """Yield the calls for the pieces that some queries see, each with the first rows of its pieces.

    Whole pieces of one size share a call, with one last piece that is shorter or bounded.  A piece that fits nowhere
    has a call of its own.
    """
    by_rows: dict[int, list[int]] = defaultdict(list)
    bounded: list[_Piece] = []
    for piece in pieces:
        if (piece.low, piece.high) == (None, None):
            by_rows[piece.rows].append(piece.start)
        else:
            bounded.append(piece)
    for rows in sorted(by_rows):
        if len(by_rows[rows]) == 1 and rows < max(by_rows):
            (start,) = by_rows.pop(rows)
            bounded.append(_Piece(rows, None, None, start))
    for rows, starts in by_rows.items():
        starts.sort()
        total, low = len(starts) * rows, None
        # a bound on the last rows does not affect the rows before them if the first query sees one of the last
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
    """Return the lattice of pieces at these places; `keys` gives the heads and the spacing of rows."""
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
    """Return the rows as a range where they are evenly spaced, so that they are read without a copy."""
    step = rows[1] - rows[0] if len(rows) > 1 else 1
    even = range(rows[0], rows[-1] + 1, step)
    return even if len(even) == len(rows) and list(even) == rows else tuple(rows)
