"""The rows that a cache keeps for one branch of a pattern: their slots, and which queries see them.

Query t of a head is in a segment of the branch, and of that segment it sees the rows with the residue of the head.  The
cache keeps these rows until the segment ends, in the order of the sequence: the n-th row of a segment and residue is in
slot n.  Where the branch has a window, the slots are a ring, in which a row takes the place of one that no later query
sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_longnet.attention.pattern.branch import Branch
    from lightning_longnet.attention.pattern.pattern import Pattern

T = TypeVar("T", int, Tensor)


@dataclass(frozen=True)
class BranchRows:
    """The slots of one causal branch in a cache.

    Args:
        branch: the branch.
        kv_heads: the number of key/value heads of the layer.
    """

    branch: Branch
    kv_heads: int

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """The residue that each key/value head attends to."""
        return tuple(self.branch.offset(g, self.kv_heads) for g in range(self.kv_heads))

    @cached_property
    def capacity(self) -> int | None:
        """The largest number of rows of a head that are kept at a time; None where nothing bounds it."""
        w, r, window = self.branch.segment_length, self.branch.dilation_rate, self.branch.window
        bounds = [-(-w // r)] if w is not None else []
        bounds += [(window - 1) // r + 1] if window is not None else []
        return min(bounds, default=None)

    def heads_at(self, position: int) -> slice | None:
        """Return the key/value heads that have the token at a position in this branch; None if there are none."""
        return self.heads_of(self._place(position) % self.branch.dilation_rate)

    def heads_of(self, residue: int) -> slice | None:
        """Return the key/value heads that attend to a residue; None if there are none."""
        if self.branch.head_offsets == "interleaved":
            return slice(residue, None, self.branch.dilation_rate) if residue < self.kv_heads else None
        each = -(-self.kv_heads // self.branch.dilation_rate)
        heads = slice(residue * each, min((residue + 1) * each, self.kv_heads))
        return heads if heads.start < heads.stop else None

    def row(self, position: int) -> int:
        """Return the number of a token among the rows of its segment and residue."""
        return self._place(position) // self.branch.dilation_rate

    def seen_later(self, position: int) -> list[int]:
        """Return how many rows of each head, of those before a position, some query from there on sees.

        Block sparsity is not considered: its blocks are kept until their segment ends.
        """
        w, r, window = self.branch.segment_length, self.branch.dilation_rate, self.branch.window
        place = self._place(position)
        found = []
        for offset in self.offsets:
            count = max(0, -(-(place - offset) // r))
            if w is not None and offset + count * r >= w:  # the next token of this residue is in another segment
                count = 0
            found.append(count if window is None else min(count, (window - 1) // r))
        return found

    def earliest(self, position: int) -> int:
        """Return the position back to which the last tokens can be dropped, so that all rows before it are kept."""
        place = self._place(position)
        if self.branch.window is None:
            return position - place
        r = self.branch.dilation_rate
        counts = [max(0, -(-(place - offset) // r)) for offset in self.offsets]
        if max(counts) <= (self.capacity or 0):
            return position - place  # no row took the place of another
        rows = [offset + (count - 1) * r for offset, count in zip(self.offsets, counts, strict=True) if count]
        return position - place + max(rows) + 1

    # The same for tensors

    def counts(self, positions: Tensor) -> Tensor:
        """Return how many rows each head has in the segment of a position, of those before it: (B,) to (B, Hkv)."""
        offsets = torch.tensor(self.offsets, device=positions.device)
        return (-((offsets - self._place(positions)[:, None]) // self.branch.dilation_rate)).clamp(min=0)

    def kept(self, positions: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Return the positions of the rows in `slots` (n,) before the tokens at positions (B,), and whether there are.

        Both are (B, Hkv, n).
        """
        last = self.counts(positions)[..., None] - 1
        if self.capacity is None:
            rows = torch.where(slots <= last, slots, -1)
        else:
            rows = last - (last - slots) % self.capacity
            rows = torch.where(slots < self.capacity, rows, -1)
        offsets = torch.tensor(self.offsets, device=positions.device)[:, None]
        begins = (positions - self._place(positions))[:, None, None]
        return begins + offsets + rows * self.branch.dilation_rate, rows >= 0

    def written(self, positions: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        """Return the slots of new tokens, and whether they are kept, given the positions `ends` that follow them.

        `positions` are (B, n), `ends` (B,), the results (B, n) and (B, Hkv, n).
        """
        places = self._place(positions)
        rows = places // self.branch.dilation_rate
        offsets = torch.tensor(self.offsets, device=positions.device)[:, None]
        is_kept = (places % self.branch.dilation_rate)[:, None] == offsets
        is_kept &= ((positions - places) == (ends - self._place(ends))[:, None])[:, None]
        if self.capacity is None:
            return rows, is_kept
        is_kept &= rows[:, None] >= self.counts(ends)[..., None] - self.capacity
        return rows % self.capacity, is_kept

    def shows(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return whether queries see keys, by their positions: of shapes that broadcast to (B, Hkv, n, keys)."""
        w, r, window = self.branch.segment_length, self.branch.dilation_rate, self.branch.window
        offsets = torch.tensor(self.offsets, device=queries.device)[:, None, None]
        query_places, key_places = self._place(queries), self._place(keys)
        visible = (query_places % r == offsets) & (key_places % r == offsets) & (keys <= queries)
        if w is not None:
            visible &= queries // w == keys // w
        if window is not None:
            visible &= queries - keys < window
        if self.branch.sparsity is not None and keys.numel():
            size = r * self.branch.sparsity.block_size
            last = max(int(queries.max()), int(keys.max()))  # keys of an earlier document may be the later ones
            longest = self.capacity or last // r + 1
            table = _kept_blocks(self, 1 << (longest - 1).bit_length()).to(queries.device)
            heads = torch.arange(self.kv_heads, device=queries.device)[:, None, None]
            visible &= table[heads, query_places // size, key_places // size]
        return visible

    def _place(self, positions: T) -> T:
        return positions if self.branch.segment_length is None else positions % self.branch.segment_length


def rows_of(pattern: Pattern, kv_heads: int) -> tuple[BranchRows, ...]:
    """Return the rows of the branches of a pattern, from the finest to the coarsest."""
    return tuple(BranchRows(branch, kv_heads) for branch in pattern.ordered())


@lru_cache(64)
@torch.inference_mode(False)
def _kept_blocks(rows: BranchRows, count: int) -> Tensor:
    """Return which blocks of keys each block of queries keeps, in `count` rows: booleans (Hkv, blocks, blocks)."""
    sparsity = rows.branch.sparsity
    assert sparsity is not None
    blocks = sparsity.blocks(count)
    table = torch.zeros(rows.kv_heads, blocks, blocks, dtype=torch.bool)
    for g in range(rows.kv_heads):
        for block, kept in enumerate(sparsity.kept(count, g, True)):
            table[g, block, list(kept)] = True
    return table
