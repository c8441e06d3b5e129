"""One kernel call: a block, and what its pairs are subject to."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import inf
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.attention.kernels.dropout import Dropout
    from lightning_longnet.attention.plan.blocks import Block
    from lightning_longnet.attention.plan.runs import Repeat


class Draw(NamedTuple):
    """Dropout, and the words of a call's rows: (batch, heads, queries), (batch, key heads, keys)."""

    dropout: Dropout
    query_words: Tensor
    key_words: Tensor


@dataclass(frozen=True)
class Call:
    """What a kernel is told beside its tensors, which are (batch, heads, rows, D) and hold the block's rows alone."""

    block: Block
    scale: float
    hidden: Tensor | None = None  # (batch, 1 or key heads, keys), True where padding hides a key
    draw: Draw | None = None

    def hidden_bias(self, heads: int, dtype: torch.dtype) -> Tensor | None:
        """-inf where padding hides a key, (batch, 1 or heads, 1, keys)."""
        if self.hidden is None:
            return None
        bias = torch.zeros_like(self.hidden, dtype=dtype).masked_fill_(self.hidden, -inf)
        return self._spread(bias, heads).unsqueeze(2)

    def blind(self, queries: int, heads: int) -> Tensor | None:
        """(batch, 1 or heads, queries), True where padding hides all that the block shows; None where it hides nothing.

        Judged by counting, since an operator's log-sum-exp may be 0 for no key as well as for one.
        """
        if self.hidden is None:
            return None
        keys = self.hidden.shape[-1]
        seen = torch.nn.functional.pad((~self.hidden).cumsum(-1), (1, 0))
        row = torch.arange(queries, device=seen.device)
        first = row * 0 if self.block.high is None else (row - self.block.high).clamp(0, keys)
        last = row * 0 + keys if self.block.low is None else (row - self.block.low + 1).clamp(0, keys)
        return self._spread(seen[..., last] == seen[..., first], heads)

    @staticmethod
    def _spread(per_key_head: Tensor, heads: int) -> Tensor:
        """To the query heads, where the key heads differ."""
        own = per_key_head.shape[1]
        return per_key_head if own == 1 else per_key_head.repeat_interleave(heads // own, 1)


@lru_cache(8)
def band(
    queries: int, keys: int, low: int | None, high: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """-inf wherever not `low <= query - key <= high`."""
    distance = torch.arange(queries, device=device)[:, None] - torch.arange(keys, device=device)
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if low is not None:
        hidden |= distance < low
    if high is not None:
        hidden |= distance > high
    return torch.zeros(queries, keys, dtype=dtype, device=device).masked_fill_(hidden, -inf)


def weights(queries: int, keys: int, repeats: tuple[Repeat, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The log of how often each pair counts, (queries, keys).

    The rates divide one another, and so do the places: heads with other offsets see one table, moved.
    """
    every, query, key = repeats[-1]
    assert all(query % r.every == r.queries and key % r.every == r.keys for r in repeats)
    table = _weight_table(queries, keys, tuple(repeat.every for repeat in repeats), dtype, device)
    row, column = -query % every, -key % every
    return table[row : row + queries, column : column + keys]


@lru_cache(8)
def _weight_table(queries: int, keys: int, moduli: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    counts = torch.ones(queries + moduli[-1], keys + moduli[-1], dtype=dtype, device=device)
    for every in moduli:
        counts[::every, ::every] += 1
    return counts.log_()
