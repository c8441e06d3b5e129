"""`Placement`: which rank holds which token.  It does not change results."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

if TYPE_CHECKING:
    from collections.abc import Sequence

Kind = Literal["contiguous", "zigzag"]


class Chunk(NamedTuple):
    """Consecutive tokens of one rank: `begin` to `end` of the whole sequence, at `local` and onwards on the rank."""

    begin: int
    end: int
    local: int


@dataclass(frozen=True)
class Placement:
    """The ranks of a sequence's tokens; `lengths[r]` is the number of tokens on rank r.

    "contiguous" gives each rank the tokens that follow those of the rank before it.  "zigzag" cuts each rank's tokens
    into halves, and places the second halves in the opposite order: under a dense causal mask all ranks then compute
    equally many pairs.

        contiguous   0 0 0 0 1 1 1 1 2 2 2 2
        zigzag       0 0 1 1 2 2 2 2 1 1 0 0

    "documents" has the chunks that are `listed` for each rank; `balanced_placement` returns one.
    """

    lengths: tuple[int, ...]
    kind: Kind | Literal["documents"] = "contiguous"
    listed: tuple[tuple[Chunk, ...], ...] = ()

    def __post_init__(self) -> None:
        """Check the arguments."""
        if (self.kind == "documents") != bool(self.listed) or self.kind not in (*get_args(Kind), "documents"):
            raise ValueError(f"placement must be one of {', '.join(map(repr, get_args(Kind)))}, got {self.kind!r}")
        if not self.lengths or min(self.lengths) < 0:
            raise ValueError(f"lengths must be those of at least one rank, none of them negative, got {self.lengths}")

    @classmethod
    @lru_cache(256)
    def even(cls, length: int, ranks: int, kind: Kind = "contiguous") -> Placement:
        """Return the placement of `length` tokens over `ranks` ranks, whose numbers of tokens differ by one at most.

        `BatchSplitter.placement_of` splits batches by it; `Job.placed` of the planner and `placement_choice` plan with
        it.  Equal arguments give the same object, as the last 256 are cached.
        """
        cuts = [length * rank // ranks for rank in range(ranks + 1)]
        return cls(tuple(end - begin for begin, end in pairwise(cuts)), kind)

    @classmethod
    def of_chunks(cls, ranges: Sequence[Sequence[tuple[int, int]]]) -> Placement:
        """Return the placement in which each rank holds the tokens of its ranges (begin, end), in ascending order.

        Adjacent ranges of a rank are merged into one chunk, and empty ranges are dropped.  `balanced_placement` makes
        its placements with it.
        """
        listed = []
        for of_rank in ranges:
            chunks, length = list[Chunk](), 0
            for begin, end in sorted(of_rank):
                if chunks and chunks[-1].end == begin:
                    chunks[-1] = Chunk(chunks[-1].begin, end, chunks[-1].local)
                elif begin < end:
                    chunks.append(Chunk(begin, end, length))
                length += end - begin
            listed.append(tuple(chunks))
        lengths = tuple(sum(c.end - c.begin for c in chunks) for chunks in listed)
        placement = cls(lengths, "documents", tuple(listed))
        in_order = sorted(chain.from_iterable(listed))
        if [c.begin for c in in_order] != [0, *(c.end for c in in_order)][:-1]:  # a gap, or a token on two ranks
            raise ValueError("the ranges of all ranks must hold each token of the sequence once")
        return placement

    def __hash__(self) -> int:
        """Return the hash of all fields, computed once."""
        return self._hash  # hashing thousands of lengths would cost at every look into a cache

    @cached_property
    def _hash(self) -> int:
        """The hash of all fields."""
        return hash((self.lengths, self.kind, self.listed))

    def __getstate__(self) -> dict[str, object]:
        """Leave out cached values: another process has other hashes of strings."""
        return {"lengths": self.lengths, "kind": self.kind, "listed": self.listed}

    @property
    def ranks(self) -> int:
        """The number of ranks; plans, exchanges and shards read it."""
        return len(self.lengths)

    @cached_property
    def length(self) -> int:
        """The number N of tokens of the whole sequence; plans, exchanges, shards and collectives read it."""
        return sum(self.lengths)

    def chunks(self, rank: int) -> tuple[Chunk, ...]:
        """Return the chunks of a rank, in local order: one, two under "zigzag", or those that are `listed` for it.

        No chunk is empty: a rank without tokens has none, and one with a single token has one under "zigzag" too.
        Batches, plans, messages and datasets are cut by them.
        """
        if self.listed:
            return self.listed[rank]
        begins, length = self._begins, self.lengths[rank]
        if self.kind == "contiguous":
            chunks = [Chunk(begins[rank], begins[rank] + length, 0)]
        else:
            first, second = -(-length // 2), length // 2
            end = self.length - (begins[rank] - self._first_halves[rank])
            chunks = [
                Chunk(self._first_halves[rank], self._first_halves[rank] + first, 0),
                Chunk(end - second, end, first),
            ]
        return tuple(chunk for chunk in chunks if chunk.begin < chunk.end)

    def stretches(self, rank: int) -> tuple[Chunk, ...]:
        """Return `chunks(rank)`, under its former name, for users of earlier releases."""
        return self.chunks(rank)

    def holders(self, begin: int, end: int) -> set[int]:
        """Return the ranks that hold some of the tokens from `begin` up to, but not including, `end`.

        Tokens outside of the sequence are left out.  `RankBlocks.possible_peers` asks with the tokens that a branch may
        show.
        """
        begin, end = max(begin, 0), min(end, self.length)
        if self.listed:
            if begin >= end:
                return set()
            begins, ranks = self._sorted
            return set(ranks[bisect_right(begins, begin) - 1 : bisect_left(begins, end)])
        if self.kind == "contiguous":
            return _ranks_holding(self._begins, begin, end)
        middle = self._first_halves[-1]
        after = self.length - end, self.length - max(begin, middle)  # counted from the end, in the order of ranks
        return _ranks_holding(self._first_halves, begin, min(end, middle)) | _ranks_holding(self._second_halves, *after)

    @cached_property
    def _sorted(self) -> tuple[list[int], list[int]]:
        """The begins of all listed chunks, ascending, and their ranks."""
        pairs = sorted((chunk.begin, rank) for rank, chunks in enumerate(self.listed) for chunk in chunks)
        return [begin for begin, _ in pairs], [rank for _, rank in pairs]

    # Cumulative numbers of tokens by rank: of the second halves, of all tokens, and of the first halves

    @cached_property
    def _second_halves(self) -> tuple[int, ...]:
        """For each rank r, the number of tokens in the second halves of the ranks before it; then that of all ranks.

        These halves lie in the order of descending ranks, so they are counted from the end of the sequence.
        """
        return tuple(accumulate((length // 2 for length in self.lengths), initial=0))

    @cached_property
    def _begins(self) -> tuple[int, ...]:
        """For each rank r, the number of tokens of the ranks before it; then that of all ranks."""
        return tuple(accumulate(self.lengths, initial=0))

    @cached_property
    def _first_halves(self) -> tuple[int, ...]:
        """For each rank r, the number of tokens in the first halves of the ranks before it; then that of all ranks."""
        return tuple(accumulate((-(-length // 2) for length in self.lengths), initial=0))


def _ranks_holding(borders: tuple[int, ...], begin: int, end: int) -> set[int]:
    """Return the ranks that hold a token of [begin, end): rank r holds [borders[r], borders[r + 1])."""
    if begin >= end:
        return set()
    first, last = bisect_right(borders, begin) - 1, bisect_left(borders, end)
    return {rank for rank in range(first, last) if borders[rank] < borders[rank + 1]}
