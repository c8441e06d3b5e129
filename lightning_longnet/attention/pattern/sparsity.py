"""Block sparsity: which blocks of a branch are kept, by a ratio and a rule that reads no tensor.

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

# The kinds with blocks that can be moved from one head to the next
_PHASED = ("dilated_sparse", "strided")


@dataclass(frozen=True)
class Sparsity:
    """A rule for the blocks of pairs that are kept within a set, the rows of one segment and residue.

    A block of queries keeps its own block first, then the global ones, then by `kind`.  Of two blocks the nearer one
    comes first, and of two at the same distance the earlier one:

        local_window    the nearest
        dilated_sparse  those at a multiple of the distance d = 1 / sparsity_ratio; then the nearest
        strided         alternately the nearest, and the nearest of every s-th block, s = 2 / sparsity_ratio, which
                        are the same columns for all queries
        global_local    the nearest; some blocks are global

    Args:
        kind: see above.
        block_size: the number of rows of a block, all of one residue.
        sparsity_ratio: the share of the set's blocks that is kept, of those on or below the diagonal if the branch is
            causal.  Each block of queries keeps its own block even if that exceeds the share.
        global_tokens: the number of rows at the beginning of the set, rounded up to blocks, that are global: all
            queries see them as far as the ratio allows, and they see all keys if the branch is not causal.  None is one
            block for "global_local", and 0 for the other kinds.
        varies_over_heads: whether key head g moves the multiples of "dilated_sparse" and the columns of "strided" by g.
    """

    kind: BlockKind
    block_size: int
    sparsity_ratio: float
    global_tokens: int | None = None
    varies_over_heads: bool = False

    def __post_init__(self) -> None:
        """Check the arguments, and set the default of `global_tokens`, which depends on the kind."""
        if self.kind not in get_args(BlockKind):
            raise ValueError(f"kind must be one of {', '.join(map(repr, get_args(BlockKind)))}, got {self.kind!r}")
        object.__setattr__(self, "block_size", _checked_count("block_size", self.block_size, 1))
        ratio = self.sparsity_ratio
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio <= 1:
            raise ValueError(
                f"sparsity_ratio must be the share of blocks to keep, more than 0 and at most 1, got {ratio!r}"
            )
        object.__setattr__(self, "sparsity_ratio", float(ratio))
        needs_some = self.kind == "global_local"
        if self.global_tokens is None:
            object.__setattr__(self, "global_tokens", self.block_size if needs_some else 0)
        object.__setattr__(self, "global_tokens", _checked_count("global_tokens", self.global_tokens, int(needs_some)))
        if not isinstance(self.varies_over_heads, bool):
            raise ValueError(f"varies_over_heads must be True or False, got {self.varies_over_heads!r}")
        if self.varies_over_heads and self.kind not in _PHASED:
            raise ValueError(
                f"varies_over_heads needs a kind that can be moved, {' or '.join(map(repr, _PHASED))}, got "
                f"{self.kind!r}, whose blocks are the same for all heads"
            )

    def __str__(self) -> str:
        """Return the rule in a few words, for tables and titles."""
        return f"{self.sparsity_ratio:g} of {self.kind} blocks of {self.block_size}"

    @property
    def stride(self) -> int:
        """The distance in blocks between two that "dilated_sparse" or "strided" prefers: d or s of the class."""
        return floor((2 if self.kind == "strided" else 1) / self.sparsity_ratio + 0.5)

    def phase(self, kv_head: int) -> int:
        """Return by how many blocks the preferred blocks of a key/value head are moved.

        It is 0 where all heads keep the same blocks.  `kept` calls it, and `_equal_heads` of the plan, which computes
        such heads together.
        """
        return kv_head % self.stride if self.varies_over_heads else 0

    def blocks(self, rows: int) -> int:
        """Return how many blocks there are in a set of `rows` rows.

        `kept`, `Branch.keeps` and the caches of inference ask.
        """
        return -(-rows // self.block_size)

    def kept(self, rows: int, kv_head: int, is_causal: bool) -> tuple[tuple[int, ...], ...]:
        """Return for each block of queries, in a set of `rows` rows, the blocks of keys that it keeps, ascending.

        In a causal branch they do not depend on how many rows follow.  The plan cuts runs into these blocks
        (`kept_blocks`), `Branch.keeps` and the caches of inference mask pairs by them, and `Branch.border_spacing`
        looks for borders between them.
        """
        return _kept(self, self.blocks(rows), self.phase(kv_head), is_causal)

    def row_counts(self, blocks: int, is_causal: bool) -> list[int]:
        """Return how many blocks of keys each block of queries keeps: at least 1, in sum the ratio of all visible ones.

        The sum is rounded, and larger only where 1 for each block of queries is more.  `_kept` calls it.  The word
        "row" is that of a table of `blocks` x `blocks`: a row for each block of queries, a column for each block of
        keys.
        """
        if is_causal:
            # each row brings the sum up to the share of all blocks so far, so no count depends on later rows
            counts, visible = [], 0
            kept = 0
            for i in range(blocks):
                visible += i + 1
                counts.append(min(max(floor(self.sparsity_ratio * visible + 0.5) - kept, 1), i + 1))
                kept += counts[-1]
            return counts
        total = floor(self.sparsity_ratio * blocks**2 + 0.5)
        some = min(self.global_blocks, blocks)
        rest = blocks - some
        # the global rows keep all blocks, if the ratio then leaves at least one for each other row
        spare = min(max(total - rest, some), some * blocks)
        return [*_split_evenly(spare, some), *_split_evenly(max(total - spare, rest), rest)]

    @property
    def global_blocks(self) -> int:
        """The number of global blocks: those that hold the first `global_tokens` rows of the set."""
        assert self.global_tokens is not None
        return self.blocks(self.global_tokens)

    def preferred(self, block: int, visible: int, phase: int) -> Iterator[int]:
        """Yield blocks of keys in the order in which a block of queries prefers them; some come more than once.

        `_kept` takes from it as many different ones as `row_counts` says.

        Args:
            block: the number of the block of queries.
            visible: how many blocks of keys, from the first one on, the mask leaves.
            phase: the `phase` of the head.
        """

        def near(blocks: Iterable[int]) -> list[int]:
            """Return the blocks but `block` itself, the nearest first, and of two equally near the earlier."""
            return sorted((j for j in blocks if j != block), key=lambda j: (abs(j - block), j))

        yield block
        yield from range(min(self.global_blocks, visible))
        if self.kind == "dilated_sparse":
            yield from near(range((block - phase) % self.stride, visible, self.stride))
        if self.kind == "strided":
            first = (-1 - phase) % self.stride
            columns = near(range(first, visible, self.stride))
            others = (j for j in _other_blocks(block, visible) if (j - first) % self.stride)
            alternating = chain.from_iterable(zip_longest(others, columns))
            yield from (j for j in alternating if j is not None)
        yield from _other_blocks(block, visible)


def _split_evenly(total: int, rows: int) -> list[int]:
    """Return `rows` integers that differ by at most 1 and have the sum `total`."""
    return [total * (i + 1) // rows - total * i // rows for i in range(rows)]


def _other_blocks(block: int, visible: int) -> Iterator[int]:
    """Yield the first `visible` blocks without `block`, the nearest first, and of two equally near the earlier."""
    for distance in range(1, visible):
        if block >= distance:
            yield block - distance
        if block + distance < visible:
            yield block + distance


@lru_cache(256)
def _kept(sparsity: Sparsity, blocks: int, phase: int, is_causal: bool) -> tuple[tuple[int, ...], ...]:
    """Compute what `Sparsity.kept` returns, once for the same arguments.

    Each block of queries takes its preferred blocks until it has as many different ones as `row_counts` says.
    """
    rows = []
    for block, count in enumerate(sparsity.row_counts(blocks, is_causal)):
        chosen: set[int] = set()
        for key_block in sparsity.preferred(block, block + 1 if is_causal else blocks, phase):
            chosen.add(key_block)
            if len(chosen) == count:
                break
        rows.append(tuple(sorted(chosen)))
    return tuple(rows)


def _checked_count(name: str, value: Any, least: int) -> int:
    """Return the value as an int, or raise a ValueError if it is not an integer of at least `least`."""
    if not hasattr(value, "__index__") or isinstance(value, bool) or not least <= index(value) < 2**63:
        raise ValueError(f"{name} must be an integer, at least {least}, got {value!r}")
    return index(value)
