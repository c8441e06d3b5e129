"""The blocks of one rank's queries against the keys of another rank, and the KV rows that these blocks read.

A KV row is the key and the value of one token in one key head.  Its index on the rank that holds it is
`row * kv_heads + head`, where `row` is the local index of the token.  Both ranks compute the sorted indices of the KV
rows that one needs of the other, so no rank asks for them, and no row is sent twice in an exchange.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torch import Tensor

    from lightning_longnet.attention.plan.block import Part

CPU = torch.device("cpu")
# A list of KV rows is faster than a mask of all where fewer than one in this many are needed
SPARSE = 16
# Up to so many runs of rows a block, rows are marked run by run: a tensor operation takes as long as ten runs
FEW_RUNS = 10


@dataclass(frozen=True, eq=False)
class PeerBlocks:
    """The blocks of one rank's queries against the keys of another rank, which holds `tokens` tokens.

    `RankBlocks.blocks` returns it, one object for all pairs of ranks that have the same parts.  Its methods say which
    KV rows the first rank needs of the other.
    """

    parts: tuple[Part, ...]
    tokens: int
    kv_heads: int

    def mask(self, branches: Collection[int] | None = None, device: torch.device = CPU) -> Tensor:
        """Return a mask of the needed KV rows, (tokens * kv_heads,), for some branches or for all.

        `Round` finds the rows to send and to receive by it, and `kv_row_counts` counts them.
        """
        keys = [part.block.keys for part in self.parts if branches is None or part.branch in branches]
        if device == CPU and keys and sum(len(side.starts) * side.heads for side in keys) <= FEW_RUNS * len(keys):
            flags = bytearray(self.tokens * self.kv_heads)
            for side in keys:
                side.mark(flags, self.kv_heads)
            return torch.frombuffer(flags, dtype=torch.bool)
        needed = torch.zeros((1, self.tokens, self.kv_heads, 1), dtype=torch.bool, device=device)
        true = torch.ones((), dtype=torch.bool, device=device)
        for side in keys:
            side.write(needed, true)
        return needed.flatten()

    def kv_rows(self) -> Tensor:
        """Return the indices of the needed KV rows, (R,), ascending, int32.

        Tests call it; `Round` reads the mask itself.
        """
        return kv_rows_of(self.mask())

    @property
    def is_sparse(self) -> bool:
        """Whether so few KV rows are needed that a list of them is faster than a mask of all.

        `kv_row_counts` asks.
        """
        return SPARSE * sum(part.block.keys.size for part in self.parts) < self.tokens * self.kv_heads

    def kv_rows_without_mask(self, branches: Collection[int] | None = None) -> Tensor:
        """Return the indices of `kv_rows` as int64, without a mask of all KV rows; `branches` selects some branches.

        `kv_row_counts` counts rows with it where `is_sparse`.
        """
        indices = [torch.empty(0, dtype=torch.long)]
        for part in self.parts:
            if branches is None or part.branch in branches:
                rows, heads = part.block.keys.indices(torch.device("cpu"))
                indices.append((rows * self.kv_heads + heads).flatten())
        unique: Tensor = torch.cat(indices).unique()
        return unique

    def kv_row_count(self) -> int:
        """Return the number of needed KV rows, over all branches.

        `Round` asks where it computes indices on a GPU, and `RoundsPlan.work` for the tables of plans.  Each row is
        sent once in a round, though several blocks may need it.
        """
        return self.kv_row_counts([self._branches])[self._branches]

    def kv_row_counts(self, groups: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], int]:
        """Return how many KV rows the branches of each group need together; 0 for the group of no branch.

        `rounds_volumes` calls it for each pair of ranks, for what is received and for what is sent.  Most groups are a
        smaller group plus one branch, and their masks are made from that of it.
        """
        # of the branches of a group only those count that have parts between the two ranks: often one or two of them
        branches = set(self._branches)
        present = {group: tuple(branch for branch in group if branch in branches) for group in groups}
        missing = {group for group in present.values() if group not in self._counts}
        if self.is_sparse:
            self._counts.update((group, len(self.kv_rows_without_mask(group))) for group in missing)
        elif missing:
            masks: dict[tuple[int, ...], Tensor] = {(branch,): self.mask((branch,)) for branch in branches}
            for group in sorted(missing, key=len):
                smaller, other = (group[:-1], group[-1]) if group[:-1] in masks else (group[1:], group[0])
                if group not in masks:
                    masks[group] = masks[smaller] | masks[other,] if smaller in masks else self.mask(group)
                self._counts[group] = int(masks[group].sum())
        return {group: self._counts[members] for group, members in present.items()}

    @cached_property
    def pairs(self) -> int:
        """The number of (query, key) pairs over all heads, each as often as the weights of the blocks count it."""
        return sum(part.block.pairs * part.block.weight for part in self.parts)

    @cached_property
    def _branches(self) -> tuple[int, ...]:
        """The branches that have parts, ascending."""
        return tuple(sorted({part.branch for part in self.parts}))

    @cached_property
    def _counts(self) -> dict[tuple[int, ...], int]:
        """The numbers of needed KV rows that were counted, by branches that have parts."""
        return {(): 0}


def kv_rows_of(mask: Tensor, count: int | None = None) -> Tensor:
    """Return the indices of the True entries of a mask of KV rows (tokens * kv_heads,), ascending, on its device.

    `Round` calls it for each peer.  They are int32, half the size of int64: they lie in memory beside the rows of a
    round.  If the caller gives their `count`, it waits for no device, as nonzero() would.
    """
    if count is None:
        return mask.nonzero().flatten().int()
    rows = torch.arange(len(mask), dtype=torch.int32, device=mask.device)
    # where each row goes: those that are not needed all go behind the last, and are cut off
    target = torch.where(mask, mask.cumsum(0) - 1, count)
    return rows.new_empty(count + 1).scatter_(0, target, rows)[:count]
