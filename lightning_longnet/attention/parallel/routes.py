"""What one rank computes, sends and receives: a pure function of the plan, the placement and the exchange.

A cell is a row of one key head, `row * kv_heads + head` in the rows of the rank that holds it.  What a rank wants of
another is a sorted set of cells: both work it out, nobody asks, and no row travels twice in an exchange.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import torch

from lightning_longnet.attention.parallel.shares import shares
from lightning_longnet.attention.plan.blocks import plan
from lightning_longnet.attention.plan.gathering import gathered

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from torch import Tensor

    from lightning_longnet.attention.parallel.placement import Placement, Stretch
    from lightning_longnet.attention.pattern.pattern import Branch, Pattern
    from lightning_longnet.attention.plan.blocks import Block
    from lightning_longnet.attention.plan.lattice import Lattice

# A mask of all cells is faster than a list of those that are seen where these are more than one in so many
SPARSE = 16


class Part(NamedTuple):
    """A block of a branch; `cells` is where its keys stand in what was received, (segments, heads, rows)."""

    branch: int
    block: Block
    cells: Tensor | None = None


class Wanted(NamedTuple):
    """What one rank computes with the keys of another, which holds so many tokens."""

    parts: tuple[Part, ...]
    tokens: int
    kv_heads: int

    def mask(self, branches: Collection[int] | None = None) -> Tensor:
        """Which cells of the other are seen, in some branches or in all."""
        found = torch.zeros((1, self.tokens, self.kv_heads, 1), dtype=torch.bool)
        true = torch.ones((), dtype=torch.bool)
        for part in self.parts:
            if branches is None or part.branch in branches:
                part.block.keys.write(found, true)
        return found.flatten()

    def cells(self) -> Tensor:
        return _cells(self.mask())

    @property
    def is_sparse(self) -> bool:
        """Do the parts show so few cells that a list of them is less than a mask of all?"""
        return SPARSE * sum(part.block.keys.size for part in self.parts) < self.tokens * self.kv_heads

    def listed(self, branches: Collection[int] | None = None) -> Tensor:
        """The cells of some branches or of all, in their order, without a mask of them."""
        found = [torch.empty(0, dtype=torch.long)]
        for part in self.parts:
            if branches is None or part.branch in branches:
                rows, heads = part.block.keys.indices(torch.device("cpu"))
                found.append((rows * self.kv_heads + heads).flatten())
        cells: Tensor = torch.cat(found).unique()
        return cells

    def many(self) -> int:
        """How many cells are seen."""
        return len(self.listed()) if self.is_sparse else int(self.mask().sum())


class Indices(NamedTuple):
    """The cells that each rank sends and those that come, and the parts with where their keys stand among these."""

    send: dict[int, Tensor]
    receive: dict[int, Tensor]
    parts: tuple[Part, ...]


@dataclass(frozen=True, eq=False)
class Round:
    """One exchange: what each rank is sent, what comes, and what is then computed.

    What came is kept for the backward where `keeps`, and fetched again elsewhere.  In `turn` t of a ring a rank hears
    of the one t places before it, and tells the one t places behind it.
    """

    sends: dict[int, Wanted]
    receives: dict[int, Wanted]
    keeps: bool
    turn: int

    def indices(self) -> Indices:
        """Kept for a gather, which keeps the rows, too; those of all rounds of a ring would be a whole sequence's."""
        return self._kept if self.keeps else self._made()

    @cached_property
    def _kept(self) -> Indices:
        return self._made()

    def _made(self) -> Indices:
        receive, parts, first = {}, [], 0
        for r, wanted in self.receives.items():
            mask = wanted.mask()
            receive[r] = _cells(mask)
            places = (mask.cumsum(0) + (first - 1)).view(1, wanted.tokens, wanted.kv_heads, 1)
            for part in _gathered(wanted.parts):
                parts.append(part._replace(cells=part.block.keys.read(places)[0, ..., 0].clone()))
            first += len(receive[r])
        parts.sort(key=lambda part: part.branch)
        return Indices({r: wanted.cells() for r, wanted in self.sends.items()}, receive, tuple(parts))


@dataclass(frozen=True, eq=False)
class Route:
    """A rank's whole work: what needs no exchange, and the rounds in their order."""

    own: tuple[Part, ...]
    rounds: tuple[Round, ...]
    kv_heads: int


class Layout(NamedTuple):
    """What decides who computes and sends what; equal on all ranks."""

    pattern: Pattern
    heads: int
    kv_heads: int
    cuts: tuple[int, ...]
    placement: Placement
    distinct: int = 0


def route(layout: Layout, rank: int, exchanges: tuple[str, ...]) -> Route:
    """The exchange of each branch is "gather", all of them in one round, or "ring", a round for each turn."""
    gathers, rings = (tuple(i for i, kind in enumerate(exchanges) if kind == name) for name in ("gather", "ring"))
    assert len(gathers) + len(rings) == len(exchanges) == len(layout.pattern.branches)
    between, ranks = crossings(layout), layout.placement.ranks
    peers = between.neighbours(rank)
    rounds = [_round(between, rank, peers, peers, gathers)] if gathers else []
    for turn in sorted({(rank - r) % ranks for r in peers} | {(r - rank) % ranks for r in peers}) if rings else ():
        before, behind = (rank - turn) % ranks, (rank + turn) % ranks
        rounds.append(_round(between, rank, [before], [behind], rings, turn))
    own = _gathered(between.wanted(rank, rank).parts)
    return Route(own, tuple(each for each in rounds if each.sends or each.receives), layout.kv_heads)


def _round(
    between: Crossings, rank: int, sources: list[int], targets: list[int], branches: tuple[int, ...], turn: int = 0
) -> Round:
    receives = {r: between.wanted(rank, r, branches) for r in sources}
    sends = {r: between.wanted(r, rank, branches) for r in targets}
    some_sends, some_receives = ({r: w for r, w in each.items() if w.parts} for each in (sends, receives))
    return Round(some_sends, some_receives, keeps=turn == 0, turn=turn)


@lru_cache(8)
def crossings(layout: Layout) -> Crossings:
    return Crossings(layout)


class Crossings:
    """What of a plan lies between one rank and another, looked up by the rows that they hold."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        found = plan(layout.pattern, layout.heads, layout.kv_heads, layout.cuts, layout.distinct)
        self._blocks = [(branch, block) for branch, blocks in enumerate(found.branches) for block in blocks]
        sides = [[_extent(side) for side in (block.queries, block.keys)] for _, block in self._blocks]
        self._extents = torch.tensor(sides, dtype=torch.long).view(len(sides), 2, 2)
        self._touching: dict[tuple[int, int], set[int]] = {}
        self._parts: dict[tuple[int, int], tuple[Part, ...]] = {}

    def wanted(self, rank: int, source: int, branches: Collection[int] | None = None) -> Wanted:
        """A rank's parts against the keys of a source."""
        if (rank, source) not in self._parts:
            stretches = self.layout.placement.stretches
            self._parts[rank, source] = tuple(
                Part(branch, share)
                for branch, block in (self._blocks[n] for n in sorted(self._of(rank, 0) & self._of(source, 1)))
                for queries in stretches(rank)
                for keys in stretches(source)
                for share in shares(block, queries, keys)
            )
        parts = self._parts[rank, source]
        if branches is not None:
            parts = tuple(part for part in parts if part.branch in branches)
        return Wanted(parts, self.layout.placement.lengths[source], self.layout.kv_heads)

    def _of(self, rank: int, side: int) -> set[int]:
        """The blocks that may have queries (side 0) or keys (side 1) on a rank."""
        if (rank, side) not in self._touching:
            begins, ends = self._extents[:, side].unbind(1)
            found: set[int] = set()
            for stretch in self.layout.placement.stretches(rank):
                found.update(((begins < stretch.end) & (ends > stretch.begin)).nonzero().flatten().tolist())
            self._touching[rank, side] = found
        return self._touching[rank, side]

    def is_local(self) -> bool:
        """Does every query find all its keys on its own rank?"""
        ranks = range(self.layout.placement.ranks)
        return not any(self.wanted(rank, source).parts for rank in ranks for source in self.neighbours(rank))

    def neighbours(self, rank: int) -> list[int]:
        """The ranks that a document, a segment or a window may span to: of thousands, a few."""
        found: set[int] = set()
        for stretch in self.layout.placement.stretches(rank):
            reaches = [self._reach(stretch, branch) for branch in self.layout.pattern.branches]
            found |= self.layout.placement.holders(min(a for a, _ in reaches), max(b for _, b in reaches))
        return sorted(found - {rank})

    def traffic(self, rank: int) -> tuple[float, float]:
        """About how many rows a rank hears of, and is heard of: from how far its segments and documents span."""
        before = behind = 0.0
        for stretch in self.layout.placement.stretches(rank):
            for branch in self.layout.pattern.branches:
                begin, end = self._reach(stretch, branch)
                before += (stretch.begin - begin) / branch.dilation_rate
                behind += (end - stretch.end) / branch.dilation_rate
        return (before, behind) if self.layout.pattern.is_causal else (before + behind, before + behind)

    def _reach(self, stretch: Stretch, branch: Branch) -> tuple[int, int]:
        """From where to where a branch may show something to, or of, these tokens."""
        cuts = self.layout.cuts
        first, last = (bisect_right(cuts, token) - 1 for token in (stretch.begin, stretch.end - 1))
        begin, end = cuts[first], cuts[last + 1]
        if branch.segment_length is not None:
            width = branch.segment_length
            begin += (stretch.begin - begin) // width * width
            end = min(end, cuts[last] + ((stretch.end - 1 - cuts[last]) // width + 1) * width)
        if branch.window is not None:
            begin = max(begin, stretch.begin - branch.window + 1)
            end = min(end, stretch.end + branch.window - 1)
        return begin, end


def is_local(layout: Layout) -> bool:
    return crossings(layout).is_local()


def head_parts(layout: Layout, kv_heads: range) -> tuple[Part, ...]:
    """What the whole sequence is to some of the key heads, and to the query heads that they serve."""
    found = plan(layout.pattern, layout.heads, layout.kv_heads, layout.cuts, layout.distinct)
    group, parts = layout.heads // layout.kv_heads, []
    for branch, blocks in enumerate(found.branches):
        for block in blocks:
            queries, keys = block.queries, block.keys
            members = [a for a in range(keys.heads) if keys.head + a * keys.head_step in kv_heads]
            if members:
                each, first, last = queries.heads // keys.heads, members[0], members[-1] + 1
                queries, keys = queries.diagonal(first * each, last * each), keys.diagonal(first, last)
                queries = replace(queries, head=queries.head - kv_heads.start * group)
                keys = replace(keys, head=keys.head - kv_heads.start)
                parts.append(Part(branch, replace(block, queries=queries, keys=keys)))
    return _gathered(parts)


def _gathered(parts: Iterable[Part]) -> tuple[Part, ...]:
    """As they are run; those of a branch follow one another."""
    return tuple(
        Part(branch, block)
        for branch, group in groupby(parts, key=lambda part: part.branch)
        for block in gathered(part.block for part in group)
    )


def _cells(mask: Tensor) -> Tensor:
    return mask.nonzero().flatten().int()  # half of what is in memory beside the rows of a round


def _extent(side: Lattice) -> tuple[int, int]:
    """The first row, and the one behind the last."""
    last = side.starts[-1] + (side.heads - 1) * side.row_shift + (side.rows - 1) * side.step
    return side.starts[0], last + 1
