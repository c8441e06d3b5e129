"""The plan of a step: which rows of a cache the new tokens see, and where their own are written.

All layers with one pattern share the plan of a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import TYPE_CHECKING, NamedTuple

import torch

from lightning_longnet.inference.branch_rows import rows_of

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.attention.pattern.pattern import Pattern
    from lightning_longnet.inference.branch_rows import BranchRows
    from lightning_longnet.inference.ranks import CacheRanks
    from lightning_longnet.inference.shares import TokenShares


@dataclass(frozen=True)
class NewTokens:
    """The tokens of a step, by rows of the batch.

    Attributes:
        positions: (B, n) the position of each new token in its document.
        begins: the position of the first new token of each row, if it went on with the document before it.
        ends: the position of the token that follows the new ones of each row.
        is_token: (B, n), False where a row has padding, which follows its tokens; None where no row has any.
        documents: (B, n) the number of documents that begin within the step up to each token; None where none begins.
        uniform: the position of the first token where all rows have the same, and neither padding nor another document.
    """

    positions: Tensor
    begins: tuple[int, ...]
    ends: tuple[int, ...]
    is_token: Tensor | None = None
    documents: Tensor | None = None
    uniform: int | None = None

    @property
    def longest(self) -> int:
        """The number of tokens of the longest row."""
        return self.positions.shape[1]


class BranchStep(NamedTuple):
    """One branch in a step of one token at the same position in all rows of a batch.

    Attributes:
        branch: the number of the branch.
        heads: the key/value heads that have the token in this branch.
        has_all: whether these are all heads.
        slot: where the token's row is written.
        filled: the number of slots that are then filled, all of which the token sees.
    """

    branch: int
    heads: slice
    has_all: bool
    slot: int
    filled: int


class Write(NamedTuple):
    """The rows of a step that one branch keeps on this rank, each given by four indices (rows,); slots are its own."""

    batch: Tensor
    heads: Tensor
    slots: Tensor
    tokens: Tensor

    def those(self, mask: Tensor) -> Write:
        """Return the rows of which a mask (rows,) is True."""
        return Write(*(x[mask] for x in self))


class StepPlan:
    """What a step does in the layers of one pattern.

    Args:
        pattern: the pattern.
        kv_heads: the number of key/value heads.
        tokens: the new tokens.
        slots: the number of slots that the cache has for each branch before the step, on all ranks.
        ranks: the ranks that share the cache.
        shares: the tokens of each rank where they share those of the step, too; None where each computes all.

    Attributes:
        is_plain: whether all rows are at one position, and each branch counts its keys by itself.
        single: the branches of a step of one token, where it is plain; None for other steps.
    """

    def __init__(
        self,
        pattern: Pattern,
        kv_heads: int,
        tokens: NewTokens,
        slots: tuple[int, ...],
        ranks: CacheRanks,
        shares: TokenShares | None = None,
    ) -> None:
        self.pattern, self.kv_heads, self.tokens, self.ranks, self.shares = pattern, kv_heads, tokens, ranks, shares
        self.branches = rows_of(pattern, kv_heads)
        self.slots = slots
        self.is_plain = tokens.uniform is not None and is_plain(pattern)
        self.single: list[BranchStep] | None = None
        if tokens.uniform is not None and tokens.longest == 1 and self.is_plain:
            self.single = _single(self.branches, tokens.uniform)
        self.all_see_keys = True
        self._bias: Tensor | None = None

    @cached_property
    def sees_new_alone(self) -> bool:
        """Whether the new tokens see no row of the cache, since they begin a segment of each branch, or the text."""
        return sees_new_alone(self.pattern, self.tokens)

    @cached_property
    def needed(self) -> list[int]:
        """How many slots all ranks need for each branch."""
        return [int(write.slots.max()) + 1 if len(write.slots) else 0 for write in self._rows]

    @cached_property
    def writes(self) -> list[Write]:
        """Which new rows of each branch this rank keeps, and where."""
        return [self.ranks.own_rows(write) for write in self._rows]

    @cached_property
    def routes(self) -> list[list[tuple[Write, Write]]]:
        """Which rows of each branch go to other ranks and come from them; see `TokenShares.routes`."""
        assert self.shares is not None
        return self.shares.routes(self._rows)

    @cached_property
    def _rows(self) -> list[Write]:
        """Which new rows each branch keeps, and where among the slots of all ranks."""
        positions = self.tokens.positions
        ends = torch.tensor(self.tokens.ends, device=positions.device)
        rows = []
        for branch in self.branches:
            slots, is_kept = branch.written(positions, ends)
            if self.tokens.is_token is not None:
                is_kept &= self.tokens.is_token[:, None]
            if self.tokens.documents is not None:
                is_kept &= (self.tokens.documents == self.tokens.documents[:, -1:])[:, None]
            batch, heads, places = is_kept.nonzero().unbind(1)
            rows.append(Write(batch, heads, slots[batch, places], places))
        return rows

    def bias(self, dtype: torch.dtype) -> Tensor:
        """Return the logarithm of how often each query counts each key, (B, Hkv, n, keys).

        The keys are those of this rank: of its slots of all branches, and then of its share of the new tokens.
        """
        if self._bias is None:
            counts = self._counts()
            self.all_see_keys = bool((counts > 0).any(-1).all())
            self._bias = counts.to(dtype).log()  # -inf of a key that is not seen
        return self._bias

    def _counts(self) -> Tensor:
        """Return how often each query counts each row of the cache, and then each new one, as an int8."""
        positions, documents = self.tokens.positions, self.tokens.documents
        queries, new = positions[:, None, :, None], positions[:, None, None, self.ranks.share]
        begins = torch.tensor(self.tokens.begins, device=positions.device)
        own, kept = torch.zeros((), dtype=torch.int8, device=positions.device), []
        for number, (branch, slots) in enumerate(zip(self.branches, self.slots, strict=True)):
            numbers = torch.arange(slots, device=positions.device)[self.ranks.share]
            keys, is_row = (x[:, :, None] for x in branch.kept(begins, numbers))
            if documents is not None:
                is_row = is_row & (documents == 0)[:, None, :, None]
            kept.append(self._shown(number, queries, keys.clamp(min=0)) & is_row)
            own = own + self._shown(number, queries, new)
        if documents is not None:
            own = own * (documents[:, :, None] == documents[:, None, self.ranks.share])[:, None]
        return torch.cat([*(x.to(torch.int8) for x in kept), own], -1)

    def _shown(self, number: int, queries: Tensor, keys: Tensor) -> Tensor:
        """Return whether a branch shows pairs; in a "set" only those that no earlier branch shows."""
        shown = self.branches[number].shows(queries, keys)
        if self.pattern.multiplicity == "set":
            for earlier in self.branches[:number]:
                shown = shown & ~earlier.shows(queries, keys)
        return shown


def sees_new_alone(pattern: Pattern, tokens: NewTokens) -> bool:
    """Return whether tokens see no row of a cache, since they begin a segment of each branch, or the text."""
    lengths = [branch.segment_length for branch in pattern.branches]
    return all(begin == 0 or all(w is not None and begin % w == 0 for w in lengths) for begin in tokens.begins)


def is_plain(pattern: Pattern) -> bool:
    """Return whether each branch counts its keys by itself, in whole segments and residues."""
    return pattern.multiplicity == "multiset" and all(branch.sparsity is None for branch in pattern.branches)


def _single(branches: tuple[BranchRows, ...], position: int) -> list[BranchStep]:
    """Return the branches that some head has the token at a position in."""
    steps = []
    for number, branch in enumerate(branches):
        heads, row = branch.heads_at(position), branch.row(position)
        if heads is not None:
            around = branch.capacity or inf
            has_all = len(range(branch.kv_heads)[heads]) == branch.kv_heads
            steps.append(BranchStep(number, heads, has_all, int(row % around), int(min(row + 1, around))))
    return steps
