"""The blocks that attention computes, as a pure function of pattern, heads and documents: integers only, no tensors.

From a pattern to blocks:

    branch, one head, one document    runs: queries and keys that see each other (`own_runs`, `exclusive_runs`)
    all documents                     runs of one shape, by their first rows (`_head_runs`)
    all heads                         lattices of heads with evenly spaced runs (`lattice_blocks`)

A block is one kernel call over a lattice of queries and a lattice of keys, so the fewer and larger, the better.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain, pairwise
from typing import TYPE_CHECKING, NamedTuple

from lightning_longnet.attention.plan.block import Block, Part
from lightning_longnet.attention.plan.heads import Starts, lattice_blocks, spacing
from lightning_longnet.attention.plan.overlap import exclusive_runs, repeats_align, with_repeats
from lightning_longnet.attention.plan.paged_keys import PagedKeys, merge_stacks
from lightning_longnet.attention.plan.parts import Parts
from lightning_longnet.attention.plan.runs import own_runs, shifted

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lightning_longnet.attention.pattern.pattern import Branch, Pattern
    from lightning_longnet.attention.plan.runs import Shape

# Runs of at most this many rows that are not evenly spaced are copied together for one call, a longer run is a separate
# call.  A GPU copies fast, and takes its time for each call.
COPIED_ROWS = 512

# Pairs are computed once, with a mask of weights, if their number falls to this share; the mask costs 5 to 12 % of the
# time of a call
WEIGHTS_PAY = 0.85
# In place of a number of segments, for a kernel without tables of weights: it takes any number, and blocks stay whole
UNCUT = -1
# The largest share of the pairs that may be in calls of fewer segments than there are threads, if pairs have weights
NARROW_SHARE = 0.1


@dataclass(frozen=True)
class Plan:
    """The blocks of each branch, from the finest to the coarsest; `make_plan` returns it.

    Attributes:
        branches: the blocks of each branch, those of positive weight first.
        is_partitioned: whether the blocks of the first branch have every row once as a query and once as a key.  Then
            their results are written, not added, and the accumulators need no initial value.
        counts_once: whether a pair is the same pair in every branch, so that dropout does not depend on the branch.
        rows: the number of rows of all query heads.
    """

    branches: tuple[tuple[Block, ...], ...]
    is_partitioned: bool
    counts_once: bool
    rows: int = 0

    @cached_property
    def queries_once(self) -> bool:
        """Whether each query is in exactly one call of the first branch, so that results are written and not added.

        That holds for paged keys too, though a key is in several of their calls.  `_line_call` asks, for calls on whole
        sequences.
        """
        return self.is_partitioned or (
            all(call.queries.step == 1 and call.weight == 1 for call in self.calls[0])
            and sum(call.queries.size for call in self.calls[0]) == self.rows
            and all(isinstance(call.keys, PagedKeys) for call in self.calls[0])
        )

    @cached_property
    def calls(self) -> tuple[tuple[Block, ...], ...]:
        """The blocks of each branch as one process runs them, those of a sparsity merged into fewer calls.

        Ranks cut `branches` into their shares instead, and merge these.
        """
        return tuple(merge_stacks(blocks) for blocks in self.branches)

    @cached_property
    def parts(self) -> Parts:
        """The blocks of `calls` in the order in which they run, branch by branch.

        `_line_call` asks whether they have tasks for threads, and gives them to the `RoundsCall` of whole sequences.
        """
        return Parts(Part(branch, block) for branch, blocks in enumerate(self.calls) for block in blocks)

    @property
    def pairs(self) -> int:
        """The number of (query, key) pairs that are computed, over all branches, each once at any weight.

        `make_plan` compares plans by it, and `attended_pairs` counts with it for `longnet plan` and `ModelFlops`.
        """
        return sum(block.pairs for blocks in self.branches for block in blocks)


def make_plan(
    pattern: Pattern,
    heads: int,
    kv_heads: int,
    cuts: tuple[int, ...],
    weighted_segments: int = 0,
    copied_rows: int = COPIED_ROWS,
) -> Plan:
    """Return the blocks that compute attention to a packed row, branch by branch.

    Document i has the tokens `cuts[i]` to `cuts[i + 1]`, so (0, N) is one sequence.  It takes long beside a call, so
    its callers keep the plan: `plan`, `PackedRows.plan` for documents, and `_DocumentBlocks` for the blocks between
    ranks.

    Args:
        pattern: which keys a query sees.
        heads, kv_heads: the numbers of query heads and of key/value heads.
        cuts: where the documents begin, and where the last one ends.
        weighted_segments: 0 computes a pair in every branch that shows it.  Any other number computes such a pair once,
            with a weight, where that saves work.  Such a plan has no result for each branch, which `mix="detached"`
            needs.  Each head has its own weights and so its own calls, which run in parallel over segments only: they
            must have at least this many segments, the number that keeps all threads busy.  They are cut into tiles that
            share a table of weights, unless the number is `UNCUT`.
        copied_rows: as `COPIED_ROWS`.
    """
    branches = pattern.ordered()
    counts_once = pattern.multiplicity == "set"
    rows = _PackedRow(heads, kv_heads, cuts, copied_rows, weighted_segments != UNCUT)
    repeated = _plan(branches, rows, earlier_excluded=counts_once, repeats=False)
    # the pairs in calls of fewer segments than threads: with weights these calls would leave threads idle
    narrow = sum(block.pairs for block in repeated.branches[0] if len(block.queries.starts) < weighted_segments)
    if (
        weighted_segments
        and len(branches) > 1
        and not counts_once
        and narrow <= NARROW_SHARE * sum(block.pairs for block in repeated.branches[0])
        and repeats_align(branches, kv_heads)
    ):
        # the weights cost time in every call, so the plan with them must have clearly fewer pairs
        once = _plan(branches, rows, earlier_excluded=True, repeats=True)
        if once.pairs <= WEIGHTS_PAY * repeated.pairs:
            return once
    return repeated


@lru_cache(32)
def plan(pattern: Pattern, heads: int, kv_heads: int, cuts: tuple[int, ...], weighted_segments: int = 0) -> Plan:
    """Return `make_plan` of the same arguments, made once for the last layouts that were asked for.

    `_line_call` takes it for rows of one document, and `heads_route` for the exchange "swap"; `attended_pairs` counts
    its pairs for `longnet plan` and `ModelFlops`.
    """
    return make_plan(pattern, heads, kv_heads, cuts, weighted_segments)


class _PackedRow(NamedTuple):
    """The heads and the documents of a row, and the properties of the kernel that computes it.

    Attributes:
        heads, kv_heads, cuts: see `make_plan`.
        copied_rows: the most rows of a run that is copied beside others.
        has_tables: whether blocks with weights are cut into tiles that share a table.
    """

    heads: int
    kv_heads: int
    cuts: tuple[int, ...]
    copied_rows: int
    has_tables: bool


def _plan(branches: Sequence[Branch], row: _PackedRow, earlier_excluded: bool, repeats: bool) -> Plan:
    """Return the blocks of each branch: the runs of all heads and documents, collected into as few calls as possible.

    `make_plan` calls it for the plan in which every branch computes all its pairs and, where that may save work, for
    the one in which each pair is computed once.

    Args:
        branches: from the finest to the coarsest.
        row: the heads and documents.
        earlier_excluded: leaves out of each branch the pairs that an earlier one shows.
        repeats: gives each pair a weight: it counts once more for each later branch that shows it, too.
    """
    heads, kv_heads, cuts = row[:3]
    # the first tokens of the documents of each length: equal documents have equal runs
    documents: dict[int, list[int]] = defaultdict(list)
    for begin, end in pairwise(cuts):
        if begin == end:
            continue  # an empty sequence
        documents[end - begin].append(begin)
    planned = []
    for i, branch in enumerate(branches):
        earlier = branches[:i] if earlier_excluded else ()
        later = branches[i + 1 :] if repeats else ()
        # for each shape, spacing of starts and owner: (key head, first rows) of all runs that may be in one lattice
        heads_by_shape: dict[tuple[Shape, tuple[int, ...], int], list[tuple[int, Starts]]] = defaultdict(list)
        # Where kept blocks differ between heads, two heads could share lattices of the blocks that both keep.  But the
        # keys of different lattices cannot be merged into one call, so each such head gets separate lattices.
        is_shared = not any(b.sparsity and b.sparsity.varies_over_heads for b in (*earlier, branch))
        for members in _equal_heads((*earlier, branch, *later), kv_heads):
            for shape, starts in _head_runs(branch, earlier, later, members[0], row, documents):
                owner = 0 if is_shared or shape.stack is None else members[0]  # separates the lattices of heads
                heads_by_shape[shape, spacing(starts), owner] += [(head, starts) for head in members]
        blocks = [
            block
            for (shape, *_), head_starts in heads_by_shape.items()
            for block in lattice_blocks(shape, head_starts, heads // kv_heads)
        ]
        # blocks of negative weight come last, so that no sum ever falls below its final value
        planned.append(tuple(sorted(blocks, key=lambda b: -b.weight)))
    is_partitioned = _has_all_rows_once(planned[0], branches[0], heads, kv_heads, cuts[-1])
    return Plan(tuple(planned), is_partitioned, earlier_excluded, cuts[-1] * heads)


def _has_all_rows_once(blocks: Sequence[Block], branch: Branch, heads: int, kv_heads: int, length: int) -> bool:
    """Return whether every query row and every key row is in exactly one of the blocks of a branch.

    With a window some keys are in two blocks, and so they may be where a group of query heads is split over blocks.
    """
    return (
        branch.dilation_rate == 1
        and sum(b.queries.size for b in blocks) == length * heads
        and sum(b.keys.size for b in blocks) == length * kv_heads
    )


def _equal_heads(branches: Sequence[Branch], kv_heads: int) -> list[list[int]]:
    """Return groups of key/value heads that have the same offset and phase in every branch, and so the same runs."""
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for g in range(kv_heads):
        phases = (branch.sparsity.phase(g) if branch.sparsity else 0 for branch in branches)
        groups[(*(branch.offset(g, kv_heads) for branch in branches), *phases)].append(g)
    return list(groups.values())


def _head_runs(
    branch: Branch,
    earlier: Sequence[Branch],
    later: Sequence[Branch],
    kv_head: int,
    row: _PackedRow,
    documents: dict[int, list[int]],
) -> Iterator[tuple[Shape, Starts]]:
    """Yield (shape, first rows) of all runs that a branch shows to one key/value head, in all documents.

    A shape comes several times if its first rows are not evenly spaced: as several ranges, and a tuple for the rest.

    Args:
        earlier: branches whose pairs are left out.
        later: branches that show some of the pairs again, for which these count more than once.
        documents: for each length of a document the first tokens of the documents of that length.
    """
    kv_heads = row.kv_heads
    starts_by_shape: dict[Shape, list[Starts]] = defaultdict(list)
    for length, begins in documents.items():
        if earlier:
            runs = exclusive_runs(branch, earlier, kv_head, kv_heads, length)
        else:
            runs = own_runs(branch, kv_head, kv_heads, length)
        if later:
            runs = with_repeats(runs, later, kv_head, kv_heads, row.has_tables)
        for shape, starts in runs:
            # runs are counted from the beginning of a document: move them to each document of this length
            starts_by_shape[shape].append(
                shifted(starts, begins[0]) if len(begins) == 1 else tuple(b + s for b in begins for s in starts)
            )
    for shape, parts in starts_by_shape.items():
        if len(parts) == 1 and isinstance(parts[0], range):
            yield shape, parts[0]
            continue
        if shape.stack is not None:  # merged later: copied whatever their spacing, and alike for all heads
            yield shape, tuple(sorted(chain.from_iterable(parts)))
            continue
        scattered: list[int] = []
        for even in _progressions(sorted(chain.from_iterable(parts))):
            # a view where that is worth a separate call; the rest is copied together
            if len(even) > 3 or shape.queries > row.copied_rows:
                yield shape, even
            else:
                scattered += even
        if scattered:
            yield shape, tuple(scattered) if len(scattered) > 1 else range(scattered[0], scattered[0] + 1)


def _progressions(rows: list[int]) -> Iterator[range]:
    """Yield ascending rows as evenly spaced ranges, each as long as possible from its first row on."""
    first = 0
    while first < len(rows):
        step = rows[first + 1] - rows[first] if first + 1 < len(rows) else 1
        last = first
        while last + 1 < len(rows) and rows[last + 1] - rows[last] == step:
            last += 1
        yield range(rows[first], rows[last] + 1, step)
        first = last + 1
