"""Paged keys: blocks of keys that the same queries see are read as pages of one kernel call.

In a plan a branch with a sparsity is blocks of queries and keys at one distance each, which ranks can cut and count:

    keys of block   0 1 2 3            plan: distance 0 for queries 0 1 2 3, distance 2 for queries 2 3
    queries 0       x . . .
            1       . x . .            merged: queries 0 and 1 with one page of keys each,
            2       x . x .                    queries 2 and 3 with two
            3       . x . x

A kernel would be called for each distance, each time with few keys.  Therefore blocks with equal queries are merged
before they run: the keys of each become a page, and queries that see equally many keys share a call.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from lightning_longnet.attention.plan.copied import CopiedLattice

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

    from lightning_longnet.attention.plan.block import Block
    from lightning_longnet.attention.plan.lattice import Lattice


@dataclass(frozen=True)
class PagedKeys(CopiedLattice):
    """Keys in pages, as in paged attention; `merge_stacks` makes them.  For its methods see also `Lattice`.

    Row i of segment s is row `page_starts[s][i // page_rows] + i % page_rows * step` of the first head.

    Attributes:
        page_starts: for each segment the first row of each of its pages, in the first head.
        page_rows: the number of rows of a page; the last page of a segment may be shorter.

    A key may be in many segments, so the gradients of its row are summed.
    """

    page_starts: tuple[tuple[int, ...], ...] = ()
    page_rows: int = 1

    @property
    def _has_whole_rows(self) -> bool:
        """False: the rows of pages are read by their indices."""
        return False

    def _first_rows(self, device: torch.device) -> Tensor:
        """Return the first row of each page, (segments, pages); `indices` calls it."""
        return self._kept_on(device, self.page_starts)

    def add(self, t: Tensor, values: Tensor, weight: int) -> None:
        """Add `weight` times values (B, segments, heads, rows, D) to the rows of t, which must be contiguous.

        `Accumulator.add` calls it, for dk and dv.
        """
        rows, heads = self.indices(t.device)
        flat = (rows * t.shape[2] + heads).flatten()
        t.view(t.shape[0], -1, t.shape[3]).index_add_(1, flat, values.flatten(1, 3).to(t.dtype), alpha=weight)

    def indices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the rows (segments, heads, rows) and the heads (heads, 1) of all elements, which broadcast.

        `copied` calls it when a kernel reads the keys, `add` for their gradients, and `elements`.
        """
        a = torch.arange(self.heads, device=device)[:, None]
        within = torch.arange(self.page_rows, device=device) * self.step
        rows = (self._first_rows(device)[..., None] + within).flatten(1)[:, None, : self.rows]
        return rows + a * self.row_shift, self.head + a * self.head_step

    def segments(self, first: int, last: int) -> Lattice:
        """Return the lattice of the segments from `first` up to, but not including, `last`, or the end.

        `part_segments` cuts calls by it.
        """
        if first == 0 and last >= len(self.starts):
            return self
        return replace(self, starts=self.starts[first:last], page_starts=self.page_starts[first:last])

    def shifted(self, by: int) -> Lattice:
        """Return the same elements, `by` rows further on; `of_heads` calls it for heads with other rows."""
        if not by:
            return self
        moved = tuple(tuple(start + by for start in starts) for starts in self.page_starts)
        return replace(self, starts=tuple(start + by for start in self.starts), page_starts=moved)

    def elements(self) -> Iterator[tuple[int, int]]:
        """Yield the (row, head) of every element, by segments, then heads; only tests call it."""
        rows, heads = self.indices(torch.device("cpu"))
        for segment in rows.tolist():
            for a, of_head in enumerate(segment):
                yield from ((row, int(heads[a])) for row in of_head)


class _HeadGroup(NamedTuple):
    """The properties that blocks must share to be merged: heads, spacing, weight and stack.

    `queries` and `keys` are their lattices without the first rows, and `keys` also without the number of rows.
    """

    queries: Lattice
    keys: Lattice
    weight: int
    stack: int


class _Page(NamedTuple):
    """A block of keys that some queries see: `rows` keys from row `start` on, under the mask of `low` and `high`."""

    rows: int
    low: int | None
    high: int | None
    start: int


class _CallShape(NamedTuple):
    """The properties that the queries of one call share: `rows` keys in pages of `page_rows` rows, and the mask."""

    page_rows: int
    rows: int
    low: int | None
    high: int | None


def merge_stacks(blocks: Iterable[Block]) -> tuple[Block, ...]:
    """Return blocks with the same pairs of one branch, those of kept blocks merged into fewer calls with paged keys.

    `Plan.calls`, and `merge_parts` for the routes of ranks, call it just before blocks run.  Blocks of negative weight
    come last.
    """
    result: list[Block] = []
    # for each group of heads and each first row of queries, the pages that these queries see
    pages: dict[_HeadGroup, dict[int, list[_Page]]] = defaultdict(lambda: defaultdict(list))
    templates: dict[_HeadGroup, Block] = {}
    for block in blocks:
        if block.stack is None:  # no block of a sparsity: it stays a call
            result.append(block)
            continue
        assert not block.repeats, "a plan gives no weights to kept blocks"
        heads = _HeadGroup(
            replace(block.queries, starts=range(1)),
            replace(block.keys, starts=range(1), rows=1),
            block.weight,
            block.stack,
        )
        templates[heads] = block  # any of them: they differ only in what is replaced below
        for query, key in zip(block.queries.starts, block.keys.starts, strict=True):
            pages[heads][query].append(_Page(block.keys.rows, block.low, block.high, key))
    # queries whose pages make calls of one shape share a call
    for heads, of_queries in pages.items():
        calls_by_shape: dict[_CallShape, list[tuple[int, tuple[int, ...]]]] = defaultdict(list)
        for query in sorted(of_queries):
            for shape, page_starts in _call_shapes(of_queries[query]):
                calls_by_shape[shape].append((query, page_starts))
        for shape, members in calls_by_shape.items():
            queries = replace(heads.queries, starts=_starts([query for query, _ in members]))
            keys = _paged_keys(heads.keys, shape, tuple(page_starts for _, page_starts in members))
            result.append(replace(templates[heads], queries=queries, keys=keys, low=shape.low, high=shape.high))
    return tuple(sorted(result, key=lambda block: -block.weight))


def _call_shapes(pages: list[_Page]) -> Iterator[tuple[_CallShape, tuple[int, ...]]]:
    """Yield the calls that compute the pages of the same queries, each with the first rows of its pages.

    A call has whole pages of one size.  One shorter or masked page may follow as the last one; any other such page
    is a separate call.
    """
    by_rows: dict[int, list[int]] = defaultdict(list)
    bounded: list[_Page] = []
    for page in pages:
        if (page.low, page.high) == (None, None):  # without a mask: pages of one size can be put side by side
            by_rows[page.rows].append(page.start)
        else:
            bounded.append(page)
    # a single short page is cheaper behind longer ones than in a separate call
    for rows in sorted(by_rows):
        if len(by_rows[rows]) == 1 and rows < max(by_rows):
            (start,) = by_rows.pop(rows)
            bounded.append(_Page(rows, None, None, start))
    for rows, starts in by_rows.items():
        starts.sort()
        total, low = len(starts) * rows, None
        # The mask of the last page, `low` moved by the rows before it, masks none of these rows as long as the first
        # query sees the first row of the last page.
        last = next((p for p in bounded if p.rows <= rows and p.high is None and (p.low or 0) <= 0), None)
        if last is not None:
            bounded.remove(last)
            starts.append(last.start)
            low = None if last.low is None else last.low - total
            total += last.rows
        yield _CallShape(rows, total, low, None), tuple(starts)
    for page in bounded:
        yield _CallShape(page.rows, page.rows, page.low, page.high), (page.start,)


def _paged_keys(keys: Lattice, shape: _CallShape, page_starts: tuple[tuple[int, ...], ...]) -> PagedKeys:
    """Return the keys of a call with the heads and the spacing of `keys`; `page_starts` are its pages by segment."""
    return PagedKeys(
        tuple(starts[0] for starts in page_starts),
        shape.rows,
        keys.step,
        keys.head,
        keys.heads,
        keys.head_step,
        keys.row_shift,
        page_starts,
        shape.page_rows,
    )


def _starts(rows: list[int]) -> range | tuple[int, ...]:
    """Return ascending rows as a range if they are evenly spaced, so that they are read without a copy."""
    step = rows[1] - rows[0] if len(rows) > 1 else 1
    even = range(rows[0], rows[-1] + 1, step)
    return even if len(even) == len(rows) and list(even) == rows else tuple(rows)
