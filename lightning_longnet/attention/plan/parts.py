"""`Parts`: the blocks that run one after the other, cut into calls of bounded size, and into tasks for threads."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from lightning_longnet.attention.plan.batches import batched
from lightning_longnet.attention.plan.block import Part
from lightning_longnet.attention.plan.merging import joined_keys
from lightning_longnet.attention.plan.paged_keys import PagedKeys

if TYPE_CHECKING:
    from collections.abc import Iterator

# Paged keys are copies: a call may copy this many rows for each row that it may cover otherwise
PAGED_ROWS = 4
# A call of fewer pairs has no tasks: threads would take longer to start than to compute them
LEAST_PAIRS = 2**24
# The calls of a task have at least so many pairs on average: threads wait for one another in the Python of shorter ones
LEAST_CALL = 2**17
# Tasks must keep threads busy for this share of the time
LEAST_BUSY = 0.8


class Task(NamedTuple):
    """A share of the parts that one thread computes: some samples and key heads, with the query heads that they serve.

    The key heads and samples of different tasks differ, so that no two threads write the same rows.
    """

    samples: slice
    parts: Parts


class Parts(tuple[Part, ...]):
    """The parts of a plan in the order in which they run: what `forward_blocks` and `backward_blocks` compute.

    The calls that they are cut into are kept here, so that the steps after the first one make none.  `Plan.parts` makes
    those of whole sequences, `merge_parts` and `Round` those of a rank.
    """

    def bounded(self, limit: int, threads: int, joins: bool = False, key_limit: int = 0) -> Parts:
        """Return the parts cut into calls of at most `limit` query rows, or of more if threads would be idle.

        A row of each head counts.  Received keys of the same queries, at most `limit` or `key_limit` rows, are first
        joined by `joined_keys` and, with `joins`, small parts by `joined`.  `cut_parts` calls it in each
        forward and backward.
        """
        cuts: dict[tuple[int, int, bool, int], Parts] = self.__dict__.setdefault("_cuts", {})
        key = limit, threads, joins, key_limit if self._has_received_keys else 0
        if key not in cuts:
            parts = self.joined() if joins else self
            joined = joined_keys(parts, max(limit, key_limit))
            cuts[key] = Parts(cut for part in joined for cut in bounded_part(part, limit, threads))
        return cuts[key]

    @cached_property
    def _has_received_keys(self) -> bool:
        """Whether keys of some part are of another rank: `joined_keys` joins these alone."""
        return any(not part.is_own for part in self)

    def joined(self) -> Parts:
        """Return the same pairs in fewer parts, where small ones on this rank's keys are joined.

        `bounded` calls it with `joins`, on a CPU, and `_divided` to count the calls of a task.
        """
        joined = list[Part]()
        for (branch, is_own), group in groupby(self, key=lambda part: (part.branch, part.is_own)):
            members = list(group)
            joined += (Part(branch, block) for block in batched(part.block for part in members)) if is_own else members
        return Parts(joined)

    @cached_property
    def has_keys(self) -> bool:
        """Whether each query of the first branch is known to see a key of it.

        `RoundsCall.gradients` asks, where the first branch has every query.
        """
        return all(part.block.has_keys for part in self if part.branch == 0)

    @cached_property
    def pairs(self) -> int:
        """The number of visible pairs of a sample, over all query heads.

        `tasks` asks whether they are worth threads.
        """
        return sum(part.block.pairs for part in self)

    def tasks(self, samples: int, threads: int) -> tuple[Task, ...]:
        """Return the tasks that threads compute side by side; none where calls are short or threads would be idle.

        They depend on the number of threads only in whether there are any, so that results do not.  `forward_blocks`
        and `backward_blocks` take them, and `_line_call` asks whether there are any.
        """
        if threads == 1 or self.pairs * samples < LEAST_PAIRS:
            return ()
        kept: dict[int, tuple[Task, ...]] = self.__dict__.setdefault("_tasks", {})
        if samples not in kept:
            kept[samples] = tuple(self._divided(samples))
        rounds = -(-len(kept[samples]) // threads)
        return kept[samples] if len(kept[samples]) >= LEAST_BUSY * rounds * threads else ()

    def _divided(self, samples: int) -> Iterator[Task]:
        """Yield the tasks: some heads of one sample each, or all heads of some samples where calls would be short.

        A task has so many heads and samples that its calls have at least `LEAST_CALL` pairs on average; `tasks` calls
        it.
        """
        heads = sorted({head for part in self for head in part.key_heads})
        if not heads:
            return
        first, last = heads[0], heads[-1]
        one = self.of_heads(first, first + 1)
        items = max(1, -(-LEAST_CALL * len(one.joined()) // one.pairs))
        each = min(items, len(heads))
        many = max(1, items // len(heads))
        divided = [self.of_heads(head, head + each) for head in range(first, last + 1, each)]
        for sample in range(0, samples, many):
            yield from (Task(slice(sample, sample + many), parts) for parts in divided if parts)

    def of_heads(self, first: int, last: int) -> Parts:
        """Return the blocks of the key heads from `first` up to, but not including, `last`, counted in the whole layer.

        `_divided` calls it for each task.
        """
        parts = []
        for part in self:
            members = [a for a, head in enumerate(part.key_heads) if first <= head < last]
            if members:
                parts.append(part_heads(part, members[0], members[-1] + 1))
        return Parts(parts)

    def by_branch(self) -> tuple[Parts, ...]:
        """Return the parts of each branch.

        `RoundsCall` calls it in the backward of "detached", to compute the result of one branch after the other again.
        """
        if "_branches" not in self.__dict__:
            groups = groupby(self, key=lambda part: part.branch)
            self.__dict__["_branches"] = tuple(Parts(group) for _, group in groups)
        branches: tuple[Parts, ...] = self.__dict__["_branches"]
        return branches


def bounded_part(part: Part, limit: int, threads: int) -> Iterator[Part]:
    """Yield a part cut into pieces of at most `limit` query rows: by segments, and a large segment by heads.

    A piece has more rows where one segment of a head has, or where threads would be idle: then it has heads for all of
    them.  `Parts.bounded` calls it.
    """
    queries, keys = part.block.queries, part.block.keys
    count, group = len(queries.starts), queries.heads // keys.heads
    rows = queries.rows * queries.heads
    if isinstance(keys, PagedKeys):
        rows = max(rows, keys.rows * keys.heads // PAGED_ROWS)
    segments, heads = max(1, limit // rows), keys.heads
    if queries.rows * queries.heads > limit:
        # fewer heads than threads would leave some idle: the CPU operator's backward runs in parallel over heads
        heads = max(limit // (queries.rows * group), -(-threads // group))
    if segments >= count and heads >= keys.heads:
        yield part
        return
    for s in range(0, count, segments):
        for a in range(0, keys.heads, heads):
            yield part_segments(part_heads(part, a, min(a + heads, keys.heads)), s, s + segments)


def part_heads(part: Part, first: int, last: int) -> Part:
    """Return a part with only the key heads of its lattice from `first` up to, but not including, `last`.

    The query heads that these serve are kept with them.  `bounded_part` and `Parts.of_heads` call it.
    """
    queries, keys = part.block.queries, part.block.keys
    group = queries.heads // keys.heads
    block = replace(
        part.block,
        queries=queries.of_heads(first * group, last * group),
        keys=keys.of_heads(first, last),
        head_repeats=part.block.head_repeats[first:last],
    )
    kv_index = None if part.kv_index is None else part.kv_index[:, first:last]
    return part._replace(block=block, kv_index=kv_index, received_heads=part.received_heads[first:last])


def part_segments(part: Part, first: int, last: int) -> Part:
    """Return a part with only its segments from `first` up to, but not including, `last`.

    `bounded_part` calls it, and `_split_by_padding` of the kernels for the segments that padding leaves.
    """
    block, kv_index = part.block, part.kv_index
    return part._replace(
        block=replace(block, queries=block.queries.segments(first, last), keys=block.keys.segments(first, last)),
        kv_index=None if kv_index is None else kv_index[first:last],
    )
