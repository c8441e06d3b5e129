"""The parts of a plan as rectangles of (query, key) pairs, in tables of integers: what the tile lists are made of.

A rectangle is some queries of one run against some keys of one run, under a band `low <= query - key <= high`:

    block of 2 segments and 2 key heads     4 rectangles
    a page of kept keys                     a rectangle of its own

The rectangles of a branch whose rows lie at one distance are a phase.  One launch computes a phase, or several joined.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

import torch

from lightning_longnet.attention.plan.paged_keys import PagedKeys

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from lightning_longnet.attention.plan.block import Part

NO_BOUND = 2**40  # in place of a bound that is None


class Side(NamedTuple):
    """The queries or the keys of each rectangle; all fields are (R,).

    Attributes:
        owner: a number for the head, and for received keys for their rank, too: rows of other owners are other rows.
        position: the first row among the rows of its owner.
        row: where the first row is in memory: its row in the tensor, or its place in `Phase.received`.
        stride: the distance of two rows in memory.
        length: the number of rows.
        place: the place of the first row modulo the rates of later branches; see `Phase.every`.
    """

    owner: Tensor
    position: Tensor
    row: Tensor
    stride: Tensor
    length: Tensor
    place: Tensor


class Rectangles(NamedTuple):
    """Rectangles of pairs: query x sees key y of its rectangle iff `low <= x - y <= high`; all fields are (R,).

    Attributes:
        head: the key head.
        step: the distance of two queries, and of two keys, among the rows of their owner.
        unit: this distance in the unit in which `Phase.every` counts.
        level: the number of rates in `Phase.every` that divide the places of all rows, and do not count.
        weight: how often each pair counts.
    """

    head: Tensor
    step: Tensor
    queries: Side
    keys: Side
    low: Tensor
    high: Tensor
    unit: Tensor
    level: Tensor
    weight: Tensor

    def transposed(self) -> Rectangles:
        """Return the same pairs with queries and keys exchanged.

        `tiled_phases` makes their tile list, for the program that computes dk and dv.
        """
        return self._replace(queries=self.keys, keys=self.queries, low=-self.high, high=-self.low)


class Phase(NamedTuple):
    """The work of one launch: the rectangles of one branch, or of several.

    Attributes:
        branch: the number of the branch, the first one of several.
        every: the rates of later branches: a pair counts once more for each rate that divides the places of both its
            rows (`Block.repeats`), less the `level` of its rectangle.
        is_joined: whether the rectangles are of several branches.
        is_signed: whether a rectangle counts other than once.
        received: the row of each received key; None for the keys of this process.
    """

    branch: int
    every: tuple[int, ...]
    is_joined: bool
    is_signed: bool
    rectangles: Rectangles
    received: Tensor | None = None


class _Page(NamedTuple):
    """The rectangles of one part, or of one page of its keys, for all segments and key heads: (segments, heads)."""

    part: Part
    query_rows: Tensor
    key_rows: Tensor
    skipped: int  # the keys of this part on earlier pages
    keys: int


def phases(parts: Sequence[Part], group: int, sources: Sequence[int] = ()) -> list[Phase]:
    """Return the phases of parts in the order of their branches, positive weights first.

    `_make_launches` of launch.py calls it once for parts that it has not met.

    Args:
        parts: the parts; those of received keys have a `kv_index`.
        group: the number of query heads of a key head.  They see the same rows, so only the first of them is listed.
        sources: the number of received KV rows of each rank, in their order; empty for the keys of this process.
    """
    pages: dict[tuple[int, int], list[_Page]] = defaultdict(list)
    for part in parts:
        if part.block.queries.head % group:
            continue  # another member of the group, whose rows are those of the first
        pages[part.branch, part.block.queries.step] += _pages(part, group)
    return [_joined_pages(branch, step, pages_of_step, sources) for (branch, step), pages_of_step in pages.items()]


def _pages(part: Part, group: int) -> Iterator[_Page]:
    """Yield the rectangles of a part: those of each page where its keys are paged, else all at once."""
    queries, keys = part.block.queries, part.block.keys
    assert queries.step == keys.step
    per_key, heads = queries.heads // keys.heads, torch.arange(keys.heads)
    assert per_key in (1, group), "the query heads of a group see the same rows"
    query_rows = _rows(queries.starts)[:, None] + heads * per_key * queries.row_shift
    if not isinstance(keys, PagedKeys):
        yield _Page(part, query_rows, _rows(keys.starts)[:, None] + heads * keys.row_shift, 0, keys.rows)
        return
    for number, starts in enumerate(torch.tensor(keys.page_starts).unbind(1)):
        skipped = number * keys.page_rows
        count = min(keys.page_rows, keys.rows - skipped)
        yield _Page(part, query_rows, starts[:, None] + heads * keys.row_shift, skipped, count)


def _joined_pages(branch: int, step: int, pages: list[_Page], sources: Sequence[int]) -> Phase:
    """Return the phase of pages whose rows have a distance of `step` rows: the rectangles of all pages in one table.

    `sources` are those of `phases`; see `Side` and `Phase` for the columns of the table.
    """
    every = {tuple(repeat.every for repeat in page.part.block.repeats) for page in pages}
    assert len(every) == 1, "the later branches of a branch are the same for all its blocks"
    received = torch.tensor(sources).cumsum(0)

    def column(values: Iterator[Tensor | int]) -> Tensor:
        """Return (R,) of what each page has: a table (segments, heads), a row of it or one number."""
        return torch.cat(
            [torch.as_tensor(x).expand(page.query_rows.shape).flatten() for x, page in zip(values, pages, strict=True)]
        )

    blocks = [page.part.block for page in pages]
    head = column(block.keys.head + torch.arange(block.keys.heads) * block.keys.head_step for block in blocks)
    low = column(-NO_BOUND if page.part.block.low is None else page.part.block.low + page.skipped for page in pages)
    high = column(NO_BOUND if page.part.block.high is None else page.part.block.high + page.skipped for page in pages)
    # the rates divide one another, so the place modulo the last of them says those modulo the others
    query_place = column(-b.repeats[-1].queries % b.repeats[-1].every if b.repeats else 0 for b in blocks)
    key_place = column(-b.repeats[-1].keys % b.repeats[-1].every if b.repeats else 0 for b in blocks)
    query_rows, key_rows = column(page.query_rows for page in pages), column(page.key_rows for page in pages)
    source = torch.zeros_like(head)
    if sources:
        source = torch.bucketize(column(_kv_index(page)[..., 0] for page in pages), received, right=True)
    queries_of, keys_of = column(block.queries.rows for block in blocks), column(page.keys for page in pages)
    steps, ones = torch.full_like(head, step), torch.ones_like(head)
    queries = Side(head, query_rows, query_rows, steps, queries_of, query_place)
    keys = Side(source * (int(head.max()) + 1) + head, key_rows, key_rows, steps, keys_of, key_place)
    weight = column(block.weight for block in blocks)
    index = None
    if sources:
        keys, index = _indexed(keys, torch.cat([_kv_index(page).flatten() for page in pages]))
    rectangles = Rectangles(head, steps, queries, keys, low, high, ones, torch.zeros_like(head), weight)
    return Phase(branch, every.pop(), False, bool((weight != 1).any()), rectangles, index)


def _kv_index(page: _Page) -> Tensor:
    """Return the place of each key of a page among all received KV rows, (segments, heads, keys)."""
    assert page.part.kv_index is not None
    return page.part.kv_index[..., page.skipped : page.skipped + page.keys]


def _indexed(keys: Side, kv_index: Tensor) -> tuple[Side, Tensor]:
    """Return keys that count by their places in an index of received rows, and this index.

    Received rows lie at no constant distance.  In the index a rectangle is consecutive, and rectangles that have keys
    in common have the same places of the index in common.
    """
    first = keys.position // keys.stride
    _, lane = (keys.owner * keys.stride + keys.position % keys.stride).unique(return_inverse=True)
    count = int(lane.max()) + 1
    begin = torch.full((count,), NO_BOUND).scatter_reduce(0, lane, first, "amin")
    end = torch.zeros(count, dtype=torch.long).scatter_reduce(0, lane, first + keys.length, "amax")
    before = (end - begin).cumsum(0) - (end - begin)
    row = (before - begin)[lane] + first
    index = torch.zeros(int((end - begin).sum()), dtype=torch.int32)
    index[row.repeat_interleave(keys.length) + places_within(keys.length)] = kv_index.to(torch.int32)
    return keys._replace(row=row, stride=torch.ones_like(row)), index


def places_within(counts: Tensor) -> Tensor:
    """Return 0, 1, ... up to, but not including, each count, one after the other, (sum of counts,).

    `tile_list` numbers the tiles of a rectangle by it, and `_indexed` the keys of a row.
    """
    before = counts.cumsum(0) - counts
    return torch.arange(int(counts.sum())) - before.repeat_interleave(counts)


def _rows(starts: range | tuple[int, ...]) -> Tensor:
    """Return the first rows of segments, (segments,)."""
    if isinstance(starts, range):
        return torch.arange(starts.start, starts.stop, starts.step)
    return torch.tensor(starts)
