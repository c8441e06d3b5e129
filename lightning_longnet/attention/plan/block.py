"""`Block`: the pairs of one kernel call, and `Part`: a block of a branch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from lightning_longnet.attention.plan.padded import PaddedLattice

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.attention.plan.lattice import Lattice
    from lightning_longnet.attention.plan.runs import Repeat


@dataclass(frozen=True)
class Block:
    """The pairs of one kernel call: the queries of a lattice against the keys of another, segment by segment.

    `lattice_blocks` makes those of a plan; shares of ranks and merged calls are blocks, too.  Both lattices have the
    same number of segments, and each key head serves `queries.heads / keys.heads` query heads.

    Attributes:
        low, high: the a-th query of a segment sees its b-th key iff low <= a - b <= high, at any step of the lattices;
            None is no limit, and low=0 alone is causal.
        repeats, stack: see `Shape` (runs.py).
        head_repeats: the repeats of each key head, where they differ; `repeats` is empty then.
        weight: how often each pair counts.  A block of negative weight removes pairs that two branches both show.
    """

    queries: Lattice
    keys: Lattice
    low: int | None = None
    high: int | None = None
    weight: int = 1
    repeats: tuple[Repeat, ...] = ()
    stack: int | None = None
    head_repeats: tuple[tuple[Repeat, ...], ...] = ()

    @property
    def pairs(self) -> int:
        """The number of visible (query, key) pairs, over all segments and query heads; each is one, at any `weight`.

        `make_plan`, `Parts.tasks` and the choice of a placement compare it, and `longnet plan` and `ModelFlops` report
        it; no kernel reads it.
        """
        if isinstance(self.queries, PaddedLattice):  # the keys are the same rows
            lengths = Counter(self.queries.lengths)
            return self.queries.heads * sum(many * self._segment_pairs(n, n) for n, many in lengths.items())
        return self.queries.heads * len(self.queries.starts) * self._segment_pairs(self.queries.rows, self.keys.rows)

    @property
    def sides(self) -> tuple[Lattice, Lattice, Lattice]:
        """The lattices of dq, dk and dv, to which `backward_blocks` adds the gradients of the block."""
        return self.queries, self.keys, self.keys

    @property
    def has_keys(self) -> bool:
        """Whether each query is known to see a key, so that no row of the block's lse is -inf.

        It is never known of rows that are copied.  The steps of a forward ask, and `Parts.has_keys`.
        """
        if not self.queries.is_view or not self.keys.is_view:
            return False
        queries, keys = self.queries.rows, self.keys.rows
        reaches = self.high is None or (self.high >= (self.low or 0) and queries - 1 - self.high < keys)
        return (self.low is None or self.low <= 0) and reaches

    def _segment_pairs(self, queries: int, keys: int) -> int:
        """Return the number of visible pairs of one segment with this number of queries and keys."""

        def at_least(bound: int) -> int:
            """Return how many pairs of the a-th query and the b-th key have `a - b >= bound`."""
            return keys_up_to(queries - bound) - keys_up_to(-bound)

        def keys_up_to(x: int) -> int:
            """Return min(1, keys) + min(2, keys) + ... + min(x, keys).

            That is how many pairs a triangle of x rows has, cut off at `keys` columns.
            """
            full = min(max(x, 0), keys)
            return full * (full + 1) // 2 + max(x - keys, 0) * keys

        count = queries * keys if self.low is None else at_least(self.low)
        if self.high is not None:
            count -= at_least(self.high + 1)
        return count


class Part(NamedTuple):
    """A block and the index of its branch: what a kernel is called for.

    If its keys came from other ranks, `kv_index` is the index of each among the received KV rows, (segments, heads,
    rows).  Or the lattice of keys counts these rows, as rows of one head, and `received_heads` has the key head of each
    head of the lattice.  Plans (`Plan.parts`) and routes of ranks consist of parts.
    """

    branch: int
    block: Block
    kv_index: Tensor | None = None
    received_heads: tuple[int, ...] = ()

    @property
    def is_own(self) -> bool:
        """Whether the keys are those of this rank."""
        return self.kv_index is None and not self.received_heads

    @property
    def key_heads(self) -> list[int]:
        """The key head of each head of the lattice of keys.

        `Parts.tasks` divides parts by it.
        """
        keys = self.block.keys
        return list(self.received_heads) or [keys.head + a * keys.head_step for a in range(keys.heads)]
