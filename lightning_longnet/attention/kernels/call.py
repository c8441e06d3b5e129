"""One kernel call: a block of pairs, and the padding and dropout of its rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import inf
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.attention.kernels.dropout import Dropout
    from lightning_longnet.attention.plan.block import Block
    from lightning_longnet.attention.plan.runs import Repeat


class DropoutMask(NamedTuple):
    """The dropout mask of a call, as a rule and one word for each row, so that no tensor of all pairs is held.

    `kernel_calls` makes it for each block where pairs are dropped.  `query_words` are (batch, heads, queries),
    `key_words` (batch, key heads, keys).
    """

    dropout: Dropout
    query_words: Tensor
    key_words: Tensor


class OrderMask(NamedTuple):
    """The tokens of the rows of a call: keys that come later in the sequence than the query are masked.

    `kernel_calls` makes it for each block of a line that needs such a mask; see lines.py in `pattern`.  `query_tokens`
    are (batch, heads, queries), `key_tokens` (batch, key heads, keys).
    """

    query_tokens: Tensor
    key_tokens: Tensor


@dataclass(frozen=True)
class Call:
    """The arguments of a kernel besides q, k and v.  These are (batch, heads, rows, D), the rows of the block.

    `kernel_calls` makes one for each block that it runs.
    """

    block: Block
    scale: float
    key_padding_mask: Tensor | None = None  # (batch, 1 or key heads, keys), True where padding masks a key
    dropout_mask: DropoutMask | None = None
    order_mask: OrderMask | None = None
    softcap: float | None = None  # the bound of the scores

    def padding_bias(self, heads: int, dtype: torch.dtype) -> Tensor | None:
        """Return a bias of -inf where padding masks a key, (batch, 1 or heads, 1, keys).

        torch's operator for CPU (`_mask`) and memory-efficient attention (`forward` and `backward`) take it.
        """
        if self.key_padding_mask is None:
            return None
        bias = torch.zeros_like(self.key_padding_mask, dtype=dtype).masked_fill_(self.key_padding_mask, -inf)
        return self._per_query_head(bias, heads).unsqueeze(2)

    def empty_rows(self, queries: int, heads: int) -> Tensor | None:
        """Return (batch, 1 or heads, queries), True where padding masks all keys of a query; None without padding.

        All keys are those that the block shows the query.  The forward of torch's operator for CPU and of
        memory-efficient attention asks, to give such rows the lse of no key.  The keys are counted, since an operator's
        log-sum-exp may be 0 for no key as well as for one.
        """
        if self.key_padding_mask is None:
            return None
        keys = self.key_padding_mask.shape[-1]
        visible = torch.nn.functional.pad((~self.key_padding_mask).cumsum(-1), (1, 0))
        row = torch.arange(queries, device=visible.device)
        first = row * 0 if self.block.high is None else (row - self.block.high).clamp(0, keys)
        last = row * 0 + keys if self.block.low is None else (row - self.block.low + 1).clamp(0, keys)
        return self._per_query_head(visible[..., last] == visible[..., first], heads)

    @staticmethod
    def _per_query_head(per_key_head: Tensor, heads: int) -> Tensor:
        """Return x (batch, 1 or key heads, ...) as (batch, 1 or heads, ...).

        Each key head is repeated for the query heads that it serves.
        """
        key_heads = per_key_head.shape[1]
        return per_key_head if key_heads == 1 else per_key_head.repeat_interleave(heads // key_heads, 1)


@lru_cache(8)
def band_bias(
    queries: int, keys: int, low: int | None, high: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return a bias (queries, keys) of -inf wherever `low <= query - key <= high` does not hold.

    The modules eager and squares (`_mask_ceiling`), torch's operator for CPU (`_mask`) and memory-efficient attention
    (`_bias`) call it, to mask a block.
    """
    distance = torch.arange(queries, device=device)[:, None] - torch.arange(keys, device=device)
    masked = torch.zeros_like(distance, dtype=torch.bool)
    if low is not None:
        masked |= distance < low
    if high is not None:
        masked |= distance > high
    return torch.zeros(queries, keys, dtype=dtype, device=device).masked_fill_(masked, -inf)


def log_weights(
    queries: int, keys: int, repeats: tuple[Repeat, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return the log of how often each pair counts, (queries, keys), to add to the scores.

    `repeats` are those of a `Block`, and not empty.  Each rate divides the next, so heads with other offsets read one
    shared table at another place.  The modules eager and squares (`_add_weights`), torch's operator for CPU (`_mask`)
    and memory-efficient attention (`_bias`) call it.
    """
    every, query, key = repeats[-1]
    assert all(query % r.every == r.queries and key % r.every == r.keys for r in repeats)
    # one table serves all calls of about this size
    rows, columns = (1 << (count - 1).bit_length() for count in (queries, keys))
    table = _weight_table(rows, columns, tuple(repeat.every for repeat in repeats), dtype, device)
    row, column = -query % every, -key % every
    return table[row : row + queries, column : column + keys]


@lru_cache(16)
def head_log_weights(
    queries: int, keys: int, head_repeats: tuple[tuple[Repeat, ...], ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return `log_weights` of each key head, (heads, queries, keys), for blocks whose heads have other repeats.

    `_mask` of the kernel "sdpa" calls it on a CPU, for blocks of joined heads (see `Block`).
    """
    with torch.inference_mode(False):
        return torch.stack([log_weights(queries, keys, repeats, dtype, device) for repeats in head_repeats])


@lru_cache(8)
def _weight_table(queries: int, keys: int, moduli: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the table that `log_weights` reads.

    It holds the log of 1 + the number of moduli that divide both indices of a pair, (queries + last modulus, keys +
    last modulus).
    """
    counts = torch.ones(queries + moduli[-1], keys + moduli[-1], dtype=dtype, device=device)
    for every in moduli:
        counts[::every, ::every] += 1
    return counts.log_()
