"""`plan`: the blocks that a call computes, as a pure function of pattern, heads and documents, in integers alone.

Runs of one shape are collected over the segments and documents, then over the heads, into lattices, so that a kernel
call covers as many rows as possible.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import chain, pairwise
from typing import TYPE_CHECKING, NamedTuple

from lightning_longnet.attention.plan.gathering import Gathered, gathered
from lightning_longnet.attention.plan.lattice import Lattice
from lightning_longnet.attention.plan.overlap import exclusive_runs, repeated, repeats_align
from lightning_longnet.attention.plan.runs import own_runs, shifted

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from lightning_longnet.attention.pattern.pattern import Branch, Pattern
    from lightning_longnet.attention.plan.runs import Repeat, Shape

# Unevenly spaced runs of up to this many rows are copied together for one call: on two CPU cores a copied row costs
# about 100 ns, and a call 50 us.  Longer runs have calls of their own.
COPIED_ROWS = 512

# To compute a pair once costs a mask of weights, 5 to 12 % of a call: the plan must save more than that
WEIGHTS_PAY = 0.85
# The share of the pairs that calls with fewer segments than threads may have
NARROW_SHARE = 0.1

Starts = range | tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """The pairs of one kernel call: the queries of a lattice against the keys of another one with as many segments.

    `low`, `high`, `repeats` and `stack` are those of `Shape`.  Each pair counts `weight` times; a block of negative
    weight subtracts pairs that two branches showed.
    """

    queries: Lattice
    keys: Lattice
    low: int | None = None
    high: int | None = None
    weight: int = 1
    repeats: tuple[Repeat, ...] = ()
    stack: int | None = None

    @property
    def pairs(self) -> int:
        """The number of visible (query, key) pairs, over all segments and query heads."""

        def at_least(bound: int) -> int:  # the number of (a, b) with a - b >= bound
            return below(self.queries.rows - bound) - below(-bound)

        def below(x: int) -> int:
            full = min(max(x, 0), self.keys.rows)
            return full * (full + 1) // 2 + max(x - self.keys.rows, 0) * self.keys.rows

        seen = self.queries.rows * self.keys.rows if self.low is None else at_least(self.low)
        if self.high is not None:
            seen -= at_least(self.high + 1)
        return len(self.queries.starts) * self.queries.heads * seen


class Part(NamedTuple):
    """A block of a branch; `cells` is where its keys stand among received rows, (segments, heads, rows)."""

    branch: int
    block: Block
    cells: Tensor | None = None


@dataclass(frozen=True)
class Plan:
    """The blocks of each branch, from the finest to the coarsest.

    Attributes:
        branches: the blocks.
        is_partitioned: whether the first branch shows every row once, as a query and as a key.  Its results can then
            be written instead of added, and the accumulators need no initial value.
        counts_once: whether a pair is one and the same in whichever branch it is computed.
        rows: the number of rows of all query heads.
    """

    branches: tuple[tuple[Block, ...], ...]
    is_partitioned: bool
    counts_once: bool
    rows: int = 0

    @cached_property
    def queries_once(self) -> bool:
        """Whether each query is in exactly one call of the first branch, so that its result can be written.

        That may hold for kept blocks, whose keys are in several calls.  It does not hold where a query sees keys in
        several calls, or where rows of some residues are in no call.
        """
        return self.is_partitioned or (
            all(call.queries.step == 1 and call.weight == 1 for call in self.calls[0])
            and sum(call.queries.size for call in self.calls[0]) == self.rows
            and all(isinstance(call.keys, Gathered) for call in self.calls[0])
        )

    @cached_property
    def calls(self) -> tuple[tuple[Block, ...], ...]:
        """The blocks of each branch as one process runs them, kept blocks gathered."""
        return tuple(gathered(blocks) for blocks in self.branches)

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The blocks as one process runs them, those of a branch one after another."""
        return tuple(Part(branch, block) for branch, blocks in enumerate(self.calls) for block in blocks)

    @property
    def pairs(self) -> int:
        """The number of (query, key) pairs that are computed."""
        return sum(block.pairs for blocks in self.branches for block in blocks)


@lru_cache(32)
def plan(pattern: Pattern, heads: int, kv_heads: int, cuts: tuple[int, ...], weighted_segments: int = 0) -> Plan:
    """Return the plan of a packed row whose documents are `cuts[i]` to `cuts[i + 1]`; (0, N) is one whole sequence.

    With `weighted_segments` a pair that several branches show is computed once, with a weight, where that pays.  The
    plan then has no result for each branch, which the detached mixture needs; and each head has its own weights and so
    its own call, which must cover at least so many segments to keep as many threads busy.
    """
    branches = pattern.ordered()
    counts_once = pattern.multiplicity == "set"
    whole = _plan(branches, heads, kv_heads, cuts, earlier_excluded=counts_once, repeats=False)
    narrow = sum(block.pairs for block in whole.branches[0] if len(block.queries.starts) < weighted_segments)
    if (
        weighted_segments
        and len(branches) > 1
        and not counts_once
        and narrow <= NARROW_SHARE * sum(block.pairs for block in whole.branches[0])
        and repeats_align(branches, kv_heads)
    ):
        once = _plan(branches, heads, kv_heads, cuts, earlier_excluded=True, repeats=True)
        if once.pairs <= WEIGHTS_PAY * whole.pairs:
            return once
    return whole


def _plan(
    branches: Sequence[Branch],
    heads: int,
    kv_heads: int,
    cuts: tuple[int, ...],
    earlier_excluded: bool,
    repeats: bool,
) -> Plan:
    documents: dict[int, list[int]] = defaultdict(list)
    for begin, end in pairwise(cuts):
        if begin == end:
            continue  # a whole without a token
        documents[end - begin].append(begin)
    planned = []
    for i, branch in enumerate(branches):
        earlier = branches[:i] if earlier_excluded else ()
        later = branches[i + 1 :] if repeats else ()
        found: dict[tuple[Shape, tuple[int, ...], int], list[tuple[int, Starts]]] = defaultdict(list)
        # heads that share a few of their kept blocks would be parted wherever they differ, and share no gathered call
        is_shared = not any(each.sparsity and each.sparsity.varies_over_heads for each in (*earlier, branch))
        for members in _alike((*earlier, branch, *later), kv_heads):
            for shape, starts in _gathered(branch, earlier, later, members[0], kv_heads, documents):
                whose = 0 if is_shared or shape.stack is None else members[0]
                found[shape, _spacing(starts), whose] += [(head, starts) for head in members]
        blocks = [b for (shape, *_), placed in found.items() for b in _fused(shape, placed, heads // kv_heads)]
        # what is taken away comes last, so that no sum ever falls below its final value
        planned.append(tuple(sorted(blocks, key=lambda b: -b.weight)))
    is_partitioned = _partitions(planned[0], branches[0], heads, kv_heads, cuts[-1])
    return Plan(tuple(planned), is_partitioned, earlier_excluded, cuts[-1] * heads)


def _partitions(blocks: Sequence[Block], branch: Branch, heads: int, kv_heads: int, length: int) -> bool:
    """Return whether every row is in exactly one block.  A window shows keys twice, and a group of heads may."""
    return (
        branch.dilation_rate == 1
        and sum(b.queries.size for b in blocks) == length * heads
        and sum(b.keys.size for b in blocks) == length * kv_heads
    )


def _alike(branches: Sequence[Branch], kv_heads: int) -> list[list[int]]:
    """Group key heads with the same offset and phase in every branch, which have the same runs."""
    alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for g in range(kv_heads):
        phases = (branch.sparsity.phase(g) if branch.sparsity else 0 for branch in branches)
        alike[(*(branch.offset(g, kv_heads) for branch in branches), *phases)].append(g)
    return list(alike.values())


def _gathered(
    branch: Branch,
    earlier: Sequence[Branch],
    later: Sequence[Branch],
    kv_head: int,
    kv_heads: int,
    documents: dict[int, list[int]],
) -> Iterator[tuple[Shape, Starts]]:
    """Yield the runs of a branch for one key head in all documents: a shape, and the rows where runs begin."""
    gathered: dict[Shape, list[Starts]] = defaultdict(list)
    for length, begins in documents.items():
        if earlier:
            found = exclusive_runs(branch, earlier, kv_head, kv_heads, length)
        else:
            found = own_runs(branch, kv_head, kv_heads, length)
        if later:
            found = repeated(found, later, kv_head, kv_heads)
        for shape, starts in found:
            gathered[shape].append(
                shifted(starts, begins[0]) if len(begins) == 1 else tuple(b + s for b in begins for s in starts)
            )
    for shape, parts in gathered.items():
        if len(parts) == 1 and isinstance(parts[0], range):
            yield shape, parts[0]
            continue
        if shape.stack is not None:  # gathered keys are copies anyway, whatever their spacing
            yield shape, tuple(sorted(chain.from_iterable(parts)))
            continue
        scattered: list[int] = []
        for run in _progressions(sorted(chain.from_iterable(parts))):
            if len(run) > 3 or shape.queries > COPIED_ROWS:
                yield shape, run
            else:
                scattered += run
        if scattered:
            yield shape, tuple(scattered) if len(scattered) > 1 else range(scattered[0], scattered[0] + 1)


def _progressions(rows: list[int]) -> Iterator[range]:
    """Split ascending rows into evenly spaced ranges, each as long as possible."""
    first = 0
    while first < len(rows):
        step = rows[first + 1] - rows[first] if first + 1 < len(rows) else 1
        last = first
        while last + 1 < len(rows) and rows[last + 1] - rows[last] == step:
            last += 1
        yield range(rows[first], rows[last] + 1, step)
        first = last + 1


def _spacing(starts: Starts) -> tuple[int, ...]:
    """Return what two heads must have in common, besides the shape, to share a lattice: the spacing of their runs."""
    if isinstance(starts, range):
        return len(starts), starts.step if len(starts) > 1 else 0
    return tuple(start - starts[0] for start in starts)


def _fused(shape: Shape, placed: list[tuple[int, Starts]], group: int) -> Iterator[Block]:
    """Yield blocks of a shape for heads and the rows where their runs begin, in as few lattices as possible.

    A lattice takes heads with equal first rows, or heads whose first rows grow evenly (a diagonal):

        by row     heads 0, 2, 4 begin at row 0 and heads 1, 3, 5 at row 1: two lattices
        by turn    head 0 begins at row 0 and head 1 at row 1; then heads 2 and 3; then 4 and 5: three lattices

    Whichever needs fewer lattices is taken; with more offsets than heads of each, that is the diagonals.
    """
    by_row: dict[int, list[tuple[int, Starts]]] = defaultdict(list)
    by_turn: dict[int, list[tuple[int, Starts]]] = defaultdict(list)
    for head, starts in sorted(placed, key=lambda item: item[0]):
        by_turn[len(by_row[starts[0]])].append((head, starts))
        by_row[starts[0]].append((head, starts))
    ways = ([run for items in way.values() for run in _diagonals(items)] for way in (by_row, by_turn))
    for run in min(ways, key=len):
        (head, starts), (next_head, next_starts) = run[0], run[1] if len(run) > 1 else run[0]
        keys = Lattice(
            starts=starts,
            rows=shape.keys,
            step=shape.step,
            head=head,
            heads=len(run),
            head_step=next_head - head,
            row_shift=next_starts[0] - starts[0],
        )
        for queries, keys_ in _grouped(keys, group):
            yield Block(
                replace(queries, rows=shape.queries),
                keys_.shifted(shape.shift),
                shape.low,
                shape.high,
                shape.weight,
                shape.repeats,
                shape.stack,
            )


def _diagonals(items: list[tuple[int, Starts]]) -> Iterator[list[tuple[int, Starts]]]:
    """Split heads with their first rows into groups in which both grow by equal steps."""
    run: list[tuple[int, Starts]] = []
    for item in items:
        if run:
            step = item[0] - run[-1][0], item[1][0] - run[-1][1][0]
            if step[1] < 0 or (len(run) > 1 and step != (run[1][0] - run[0][0], run[1][1][0] - run[0][1][0])):
                yield run
                run = []
        run.append(item)
    yield run


def _grouped(keys: Lattice, group: int) -> Iterator[tuple[Lattice, Lattice]]:
    """Yield (queries, keys) lattices where each key head serves `group` neighbouring query heads.

    One lattice can hold the query heads of several key heads only where these are neighbours with equal rows.
    Elsewhere there is one for each member of a group, or for each key head.
    """
    if keys.heads == 1 or (keys.head_step == 1 and keys.row_shift == 0):
        yield replace(keys, head=keys.head * group, heads=keys.heads * group, head_step=1, row_shift=0), keys
    elif keys.heads < group:
        for a in range(keys.heads):
            yield from _grouped(keys.diagonal(a, a + 1), group)
    else:
        for member in range(group):
            yield replace(keys, head=keys.head * group + member, head_step=keys.head_step * group), keys
