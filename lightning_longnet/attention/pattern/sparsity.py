"""`Sparsity`: the blocks of a branch that are kept, as many as a ratio says, by a rule that reads no tensor.

The rows of a segment that have one residue are counted from 0 and cut into blocks of `block_size`; the last may be
shorter.  A block of queries sees the blocks of keys that are kept for it, its own among them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, zip_longest
from math import floor
from operator import index
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

BlockKind = Literal["local_window", "dilated_sparse", "global_local", "strided"]

# Kinds whose blocks another head may see at another place
_PHASED = ("dilated_sparse", "strided")


@dataclass(frozen=True)
class Sparsity:
    """The blocks of a (segment, residue) set that stay, by what a query's block prefers.

    Each keeps its own block first, then the global ones, then by `kind`, the nearer of two first and the earlier of two
    that are as near:

        local_window    the nearest
        dilated_sparse  those whose distance is a multiple of d = 1 / sparsity_ratio; then the nearest
        strided         by turns the nearest, and the nearest of every s-th, s = 2 / sparsity_ratio, which all queries
                        have in common
        global_local    the nearest; some blocks are global

    Args:
        kind: see above.
        block_size: rows of a block, of one residue each.
        sparsity_ratio: the share of the set's blocks that is kept; of those that a causal set has, where it is causal.
            Own blocks stay in any case.
        global_tokens: so many rows at the beginning of the set, rounded up to blocks, are seen by all as far as the
            ratio allows, and see all where not causal; None is one block for "global_local", none elsewhere.
        varies_over_heads: key head g moves the multiples of "dilated_sparse" and the columns of "strided" by g.
    """

    kind: BlockKind
    block_size: int
    sparsity_ratio: float
    global_tokens: int | None = None
    varies_over_heads: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(BlockKind):
            raise ValueError(f"kind must be one of {', '.join(map(repr, get_args(BlockKind)))}, got {self.kind!r}")
        object.__setattr__(self, "block_size", _count("block_size", self.block_size, 1))
        ratio = self.sparsity_ratio
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio <= 1:
            raise ValueError(
                f"sparsity_ratio must be the share of blocks to keep, more than 0 and at most 1, got {ratio!r}"
            )
        object.__setattr__(self, "sparsity_ratio", float(ratio))
        needs_some = self.kind == "global_local"
        if self.global_tokens is None:
            object.__setattr__(self, "global_tokens", self.block_size if needs_some else 0)
        object.__setattr__(self, "global_tokens", _count("global_tokens", self.global_tokens, int(needs_some)))
        if not isinstance(self.varies_over_heads, bool):
            raise ValueError(f"varies_over_heads must be True or False, got {self.varies_over_heads!r}")
        if self.varies_over_heads and self.kind not in _PHASED:
            raise ValueError(
                f"varies_over_heads needs a kind that can be moved, {' or '.join(map(repr, _PHASED))}, got "
                f"{self.kind!r}, whose blocks are the same for all heads"
            )

    def __str__(self) -> str:
        return f"{self.sparsity_ratio:g} of {self.kind} blocks of {self.block_size}"

    @property
    def stride(self) -> int:
        """The distance between two of the blocks that a kind prefers."""
        return floor((2 if self.kind == "strided" else 1) / self.sparsity_ratio + 0.5)

    def phase(self, kv_head: int) -> int:
        """Return the number of blocks by which the kept blocks of a head are shifted."""
        return kv_head % self.stride if self.varies_over_heads else 0

    def blocks(self, rows: int) -> int:
        return -(-rows // self.block_size)

    def kept(self, rows: int, kv_head: int, is_causal: bool) -> tuple[tuple[int, ...], ...]:
        """For each block of so many rows the blocks of keys that it sees, in ascending order.

        What a causal block sees hangs on no row behind it.
        """
        return _kept(self, self.blocks(rows), self.phase(kv_head), is_causal)

    def row_counts(self, blocks: int, is_causal: bool) -> list[int]:
        """Return how many blocks each row of blocks keeps: the requested share in all, and at least one each."""
        if is_causal:
            counts, seen = [], 0
            kept = 0
            for i in range(blocks):
                seen += i + 1
                counts.append(min(max(floor(self.sparsity_ratio * seen + 0.5) - kept, 1), i + 1))
                kept += counts[-1]
            return counts
        total = floor(self.sparsity_ratio * blocks**2 + 0.5)
        some = min(self.global_blocks, blocks)
        rest = blocks - some
        spare = min(max(total - rest, some), some * blocks)  # what the global rows get: all, if that leaves own blocks
        return [*_spread(spare, some), *_spread(max(total - spare, rest), rest)]

    @property
    def global_blocks(self) -> int:
        assert self.global_tokens is not None
        return self.blocks(self.global_tokens)

    def preferred(self, block: int, seen: int, phase: int) -> Iterator[int]:
        """Yield the first `seen` blocks in the order of preference; some may come again."""

        def near(blocks: Iterable[int]) -> list[int]:
            return sorted((j for j in blocks if j != block), key=lambda j: (abs(j - block), j))

        yield block
        yield from range(min(self.global_blocks, seen))
        if self.kind == "dilated_sparse":
            yield from near(range((block - phase) % self.stride, seen, self.stride))
        if self.kind == "strided":
            first = (-1 - phase) % self.stride
            columns = near(range(first, seen, self.stride))
            others = (j for j in _nearest(block, seen) if (j - first) % self.stride)
            turns = chain.from_iterable(zip_longest(others, columns))
            yield from (j for j in turns if j is not None)
        yield from _nearest(block, seen)


def _spread(total: int, rows: int) -> list[int]:
    """Split a total over rows as evenly as integers allow."""
    return [total * (i + 1) // rows - total * i // rows for i in range(rows)]


def _nearest(block: int, seen: int) -> Iterator[int]:
    for distance in range(1, seen):
        if block >= distance:
            yield block - distance
        if block + distance < seen:
            yield block + distance


@lru_cache(256)
def _kept(sparsity: Sparsity, blocks: int, phase: int, is_causal: bool) -> tuple[tuple[int, ...], ...]:
    found = []
    for block, count in enumerate(sparsity.row_counts(blocks, is_causal)):
        chosen: set[int] = set()
        for each in sparsity.preferred(block, block + 1 if is_causal else blocks, phase):
            chosen.add(each)
            if len(chosen) == count:
                break
        found.append(tuple(sorted(chosen)))
    return tuple(found)


def _count(name: str, value: Any, least: int) -> int:
    if not hasattr(value, "__index__") or isinstance(value, bool) or not least <= index(value) < 2**63:
        raise ValueError(f"{name} must be an integer, at least {least}, got {value!r}")
    return index(value)
