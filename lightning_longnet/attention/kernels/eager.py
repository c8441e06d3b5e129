"""Attention by plain matrix products, a tile of scores at a time: for every block, mask, width, type and device.

It is the only block kernel with dropout.  A tile holds the scores of some queries of one group of query heads against
the keys that they may see:

    chunk   some samples and key heads, with the query heads that these serve; its keys are converted once
    tile    some queries of a chunk: scores (samples * key heads, group * queries, keys)
"""

from __future__ import annotations

from functools import lru_cache
from math import inf
from typing import TYPE_CHECKING, NamedTuple

import torch

from lightning_longnet.attention.kernels.call import band
from lightning_longnet.attention.kernels.products import routed_products

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lightning_longnet.attention.kernels import Request
    from lightning_longnet.attention.kernels.call import Call

name = "eager"

# The scores in a tile: as many as the caches of a CPU hold beside the words of dropout, or as fill a GPU
_TILE = {"cpu": 2**19}
_LARGE_TILE = 2**25
_ROWS = 32  # the fewest queries in a tile: products of fewer are slow


def refusals(request: Request) -> list[str]:
    """Return the reasons why this kernel cannot compute a call."""
    if request.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        return [f"serves float64, float32, bfloat16 and float16, q is {request.dtype}"]
    return []


def note(request: Request) -> str:
    """Return what this kernel runs for a call that it does not refuse."""
    return "plain products in float32 or float64, a tile of scores at a time"


def takes_weights(device: str) -> bool:
    """Return False: the kernel cannot count a pair several times in one block."""
    return False


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Return out (batch, heads, rows, Dv) and lse (batch, heads, rows) of one block; see `BlockKernel`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty((*q.shape[:3], v.shape[3]), dtype=wide)
    lse = q.new_empty((*q.shape[:3], 1), dtype=wide)
    with routed_products():
        for chunk in _chunks(q, k):
            keys, values = chunk.read_keys(k), chunk.read_keys(v)
            for tile in chunk.tiles(call):
                scores = tile.mask(tile.scores(tile.read(q) * call.scale, keys, call), call)
                # a row without keys has a largest score of -inf, and -inf - -inf is NaN
                largest = scores.amax(-1, keepdim=True).clamp_min_(torch.finfo(wide).min)
                weights = scores.sub_(largest).exp_()
                total = weights.sum(-1, keepdim=True)
                tile.write(lse, largest + total.log())
                weighted = torch.bmm(tile.apply_dropout(weights, call), values[:, tile.keys])
                # the largest weight of a row is 1, so the bound changes only the total of a row without keys, from 0
                tile.write(out, weighted.div_(total.clamp_min_(1)))
    return out, lse.squeeze(-1)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv of one block from the `out` and `lse` of the whole softmax; see `BlockKernel`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (torch.empty_like(x, dtype=wide, memory_format=torch.contiguous_format) for x in (q, k, v))
    lse = lse.unsqueeze(-1)
    with routed_products():
        for chunk in _chunks(q, k):
            keys, values = chunk.read_keys(k), chunk.read_keys(v)
            dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
            for tile in chunk.tiles(call):
                queries, dout = tile.read(q) * call.scale, tile.read(grad)
                delta = (dout * tile.read(out)).sum(-1, keepdim=True)
                scores = tile.scores(queries, keys, call)
                slopes = None if call.softcap is None else 1 - (scores / call.softcap).square_()
                weights = tile.mask(scores, call).sub_(tile.read(lse)).exp_()
                # dS = P (g.v - g.out), where dropout masks g.v as it masked the weights
                dscores = tile.apply_dropout(torch.bmm(dout, values[:, tile.keys].mT), call)
                dscores = dscores.sub_(delta).mul_(weights)
                if slopes is not None:  # the derivative of softcap * tanh(score / softcap)
                    dscores.mul_(slopes)
                tile.write(dq, torch.bmm(dscores, keys[:, tile.keys]).mul_(call.scale))
                dkeys[:, tile.keys].baddbmm_(dscores.mT, queries)
                dvalues[:, tile.keys].baddbmm_(tile.apply_dropout(weights, call).mT, dout)
            chunk.write_keys(dk, dkeys)
            chunk.write_keys(dv, dvalues)
    return dq, dk, dv


class _Chunk(NamedTuple):
    """A set of key heads of some samples, and the query heads that they serve, `group` for each key head."""

    samples: slice
    key_heads: slice
    group: int
    queries: int
    keys: int
    rows: int  # the number of queries in a tile

    def read_keys(self, x: Tensor) -> Tensor:
        """Return the rows of k or v, (samples * key heads, keys, D), contiguous and in the type of the accumulators."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return x[self.samples, self.key_heads].to(wide).flatten(0, 1).contiguous()

    def write_keys(self, x: Tensor, values: Tensor) -> None:
        """Write the rows that `read_keys` would read."""
        rows = x[self.samples, self.key_heads]
        rows.copy_(values.view(rows.shape))

    def tiles(self, call: Call) -> Iterator[_Tile]:
        """Yield the tiles of this chunk, each with the keys that at least one of its queries may see.

        Under `low <= query - key <= high` these are the keys between two diagonals:

            tile 0    x x . . . .     keys 0 ... 2
                      x x x . . .
            tile 1    . x x x . .     keys 1 ... 4
                      . . x x x .
        """
        low, high = call.block.low, call.block.high
        for begin in range(0, self.queries, self.rows):
            end = min(begin + self.rows, self.queries)
            # a tile of queries without keys still has one key, which is masked
            first_key = 0 if high is None else min(max(begin - high, 0), self.keys - 1)
            end_key = self.keys if low is None else min(max(end - low, first_key + 1), self.keys)
            yield _Tile(self, slice(begin, end), slice(first_key, end_key))


class _Tile(NamedTuple):
    """The scores of some queries of a chunk against the keys that they may see."""

    chunk: _Chunk
    queries: slice
    keys: slice

    def read(self, x: Tensor) -> Tensor:
        """Return the rows of x, one of q, out, lse or their gradients: (samples * key heads, group * queries, D).

        The heads of a group follow one another, so that the query heads of a group share one product with the keys of
        their key head.
        """
        rows = x[self.chunk.samples, self._heads, self.queries].to(torch.promote_types(x.dtype, torch.float32))
        return rows.reshape(-1, self.chunk.group * rows.shape[2], rows.shape[3])

    def write(self, x: Tensor, values: Tensor) -> None:
        """Write the rows that `read` would read."""
        rows = x[self.chunk.samples, self._heads, self.queries]
        rows.copy_(values.view(rows.shape))

    def scores(self, queries: Tensor, keys: Tensor, call: Call) -> Tensor:
        """Return the scores, (samples * key heads, group * queries, keys), also of the pairs that are masked."""
        scores = torch.bmm(queries, keys[:, self.keys].mT)
        return scores if call.softcap is None else scores.div_(call.softcap).tanh_().mul_(call.softcap)

    def mask(self, scores: Tensor, call: Call) -> Tensor:
        """Set the scores of the pairs that are masked to -inf, in place."""
        per_head = scores.unflatten(1, (self.chunk.group, -1))
        (low, high), (first, last) = (call.block.low, call.block.high), (self.keys.start, self.keys.stop)
        top, rows = self.queries.start, per_head.shape[-2]
        if low is not None:  # every query of the tile sees the keys before `edge`: only the rest needs a mask
            edge = min(max(top - low + 1, first), last)
            bound = _mask_bound(rows, last - edge, low - top + edge, None, scores.dtype, scores.device)
            _mask_in_place(per_head[..., edge - first :], bound)
        if high is not None:  # no query of the tile is too far from the keys behind `edge`
            edge = min(max(self.queries.stop - 1 - high, first), last)
            bound = _mask_bound(rows, edge - first, None, high - top + first, scores.dtype, scores.device)
            _mask_in_place(per_head[..., : edge - first], bound)
        if call.key_padding_mask is not None:
            heads = self.chunk.key_heads if call.key_padding_mask.shape[1] > 1 else slice(None)
            padding = call.key_padding_mask[self.chunk.samples, heads, self.keys]
            bound = torch.full_like(padding, inf, dtype=scores.dtype).masked_fill_(padding, -inf)
            _mask_in_place(scores.unflatten(0, (padding.shape[0], -1)), bound.unsqueeze(2))
        if call.order_mask is not None:
            query_tokens, key_tokens = call.order_mask
            scores.masked_fill_(self._keys_of(key_tokens) > self._queries_of(query_tokens), -inf)
        return scores

    def apply_dropout(self, pairs: Tensor, call: Call) -> Tensor:
        """Set the pairs that dropout drops to 0 and scale the others, in place."""
        if call.dropout_mask is None:
            return pairs
        dropout, query_words, key_words = call.dropout_mask
        bits = pairs.view(torch.int64 if pairs.dtype == torch.float64 else torch.int32)
        bits &= dropout.keep_bits(self._queries_of(query_words), self._keys_of(key_words))
        return pairs.mul_(1 / (1 - dropout.probability))

    def _queries_of(self, x: Tensor) -> Tensor:
        """Return a number of each query, (samples * key heads, group * queries, 1), of x (batch, heads, queries)."""
        rows = x[self.chunk.samples, self._heads, self.queries]
        return rows.reshape(-1, self.chunk.group * rows.shape[2], 1)

    def _keys_of(self, x: Tensor) -> Tensor:
        """Return a number of each key, (samples * key heads, 1, keys), of x (batch, key heads, keys)."""
        rows = x[self.chunk.samples, self.chunk.key_heads, self.keys]
        return rows.reshape(-1, 1, rows.shape[2])

    @property
    def _heads(self) -> slice:
        """The query heads of this chunk."""
        key_heads, group = self.chunk.key_heads, self.chunk.group
        return slice(key_heads.start * group, key_heads.stop * group)


def _chunks(q: Tensor, k: Tensor) -> Iterator[_Chunk]:
    """Yield the chunks of a call: as many key heads in one tile as fit, and as many samples where all key heads fit."""
    (batch, heads, queries, _), (_, key_heads, keys, _) = q.shape, k.shape
    group, size = heads // key_heads, _TILE.get(q.device.type, _LARGE_TILE)
    rows = min(queries, max(_ROWS, size // (group * keys)))
    heads_each = max(1, min(key_heads, size // (group * rows * keys)))
    samples = max(1, size // (heads * rows * keys)) if heads_each == key_heads else 1
    for s in range(0, batch, samples):
        for h in range(0, key_heads, heads_each):
            chunk = slice(s, min(s + samples, batch)), slice(h, min(h + heads_each, key_heads))
            yield _Chunk(*chunk, group, queries, keys, rows)


def _mask_in_place(scores: Tensor, bound: Tensor) -> None:
    """Set masked scores to -inf: `bound`, which broadcasts, is -inf for masked pairs and +inf for others.

    Adding -inf instead would make NaN of a score that overflowed to +inf.
    """
    torch.minimum(scores, bound, out=scores)


@lru_cache(8)
def _mask_bound(
    rows: int, columns: int, low: int | None, high: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return (rows, columns): +inf where `low <= row - column <= high`, and -inf elsewhere."""
    return torch.where(band(rows, columns, low, high, dtype, device) == 0, inf, -inf)
