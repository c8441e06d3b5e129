"""Attention by plain matrix products, a tile of scores at a time: for every block, mask, width, type and device.

It is the only block kernel with dropout.  A tile holds the scores of some queries of one group of query heads against
the keys that they may see:

    chunk   some samples and key heads, with the query heads that these serve; its keys are converted once
    tile    some queries of some of these heads: scores (samples * key heads, group * queries, keys)

Scores are logarithms to the base 2, since torch computes `exp2` several times as fast as `exp` on some CPUs.
"""

from __future__ import annotations

from functools import lru_cache
from math import inf, log
from typing import TYPE_CHECKING, NamedTuple

import torch

from lightning_longnet.attention.kernels.call import band_bias, log_weights
from lightning_longnet.attention.kernels.products import routed_products

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lightning_longnet.attention.kernels import Request
    from lightning_longnet.attention.kernels.call import Call
    from lightning_longnet.attention.plan.block import Block
    from lightning_longnet.attention.plan.runs import Repeat

name = "eager"

# The scores in a tile: as many as the caches of a CPU hold, or as fill a GPU
_TILE = {"cpu": 2**20}
_LARGE_TILE = 2**25
# The fewest queries in a tile, as products of fewer are slow, and the most on a CPU: under a causal mask the queries of
# a tile compute all keys up to that of the last one
_ROWS = 32
_MOST_ROWS = 256
_MOST_THREADS = 16  # that the tile of a CPU grows with
LOG2 = log(2)


def refusals(request: Request) -> list[str]:
    """Return the reasons why this kernel cannot compute a call; an empty list if it can.

    `select` asks for a call of `attend` that may run the kernel, and `judge` for `explain`, the guard's preflight and
    `longnet plan`.
    """
    if request.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        return [f"serves float64, float32, bfloat16 and float16, q is {request.dtype}"]
    return []


def note(request: Request) -> str:
    """Return what this kernel runs for a call that it does not refuse.

    `judge` asks for it, and `explain` shows it in its table of kernels.
    """
    return "plain products in float32 or float64, a tile of scores at a time"


def takes_weights(device: str) -> bool:
    """Return False: a plan for this kernel counts no pair several times in one block, as dropout could not drop it.

    `AttentionSpec.weighted_segments` asks before a plan is made, and on a CPU `cut_parts`, which then joins no
    small blocks.  Blocks with weights still come from the kernel "sdpa".
    """
    return False


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Return out (batch, heads, rows, Dv) and lse (batch, heads, rows) of one block; see `BlockKernel`.

    `_forward` of blocks.py calls it, or `_forward_steps` where nothing is masked.  The kernel "sdpa" calls it on
    a CPU for blocks that tiles compute faster than torch's operator (`_is_tiled`).
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty((*q.shape[:3], v.shape[3]), dtype=wide)
    lse = q.new_empty((*q.shape[:3], 1), dtype=wide)
    with routed_products():
        for chunk in _chunks(q, k):
            keys, values = chunk.keys_of(k), chunk.keys_of(v)
            queries, result, logs = (chunk.queries_of(x) for x in (q, out, lse))
            buffer = out.new_empty(chunk.most_scores)
            for tile in chunk.tiles(call.block):
                scores = tile.products(buffer, tile.read(queries) * _scale(call), tile.read_keys(keys))
                scores = tile.mask(_capped(scores, call), call)
                # a row without keys has a largest score of -inf, and -inf - -inf is NaN
                largest = scores.amax(-1, keepdim=True).clamp_min_(torch.finfo(wide).min)
                shares = scores.sub_(largest).exp2_()
                total = shares.sum(-1, keepdim=True)
                tile.write(logs, largest.add_(total.log2()).mul_(LOG2))
                weighted = torch.bmm(tile.apply_dropout(shares, call), tile.read_keys(values))
                # the largest share of a row is 1, so the bound changes only the total of a row without keys, from 0
                tile.write(result, weighted.div_(total.clamp_min_(1)))
    return out, lse.squeeze(-1)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv of one block from the `out` and `lse` of the whole softmax; see `BlockKernel`.

    `_backward` of blocks.py calls it, or `_backward_steps` where nothing is masked, and the kernel "sdpa" for the
    blocks whose forward it gives to this module.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    dq = q.new_empty(q.shape, dtype=wide)
    dk, dv = (x.new_zeros(x.shape, dtype=wide) for x in (k, v))
    with routed_products():
        for chunk in _chunks(q, k):
            keys, values, dkeys, dvalues = (chunk.keys_of(x) for x in (k, v, dk, dv))
            queries, douts, outs, dqueries = (chunk.queries_of(x) for x in (q, grad, out, dq))
            logs = chunk.queries_of(lse.unsqueeze(-1)) / LOG2
            buffers = dq.new_empty(2, chunk.most_scores)
            for tile in chunk.tiles(call.block):
                some_keys, dout = tile.read_keys(keys), tile.read(douts)
                some_queries = tile.read(queries) * _scale(call)
                delta = (dout * tile.read(outs)).sum(-1, keepdim=True)
                scores = _capped(tile.products(buffers[0], some_queries, some_keys), call)
                slopes = None if call.softcap is None else 1 - (scores * (LOG2 / call.softcap)).square_()
                shares = tile.mask(scores, call).sub_(tile.read(logs)).exp2_()
                # dS = P (g.v - g.out), where dropout masks g.v as it masked the shares
                dscores = tile.apply_dropout(tile.products(buffers[1], dout, tile.read_keys(values)), call)
                dscores = dscores.sub_(delta).mul_(shares)
                if slopes is not None:  # the derivative of softcap * tanh(score / softcap)
                    dscores.mul_(slopes)
                tile.write(dqueries, torch.bmm(dscores, some_keys).mul_(call.scale))
                # the scale of the queries holds the base of the scores, which the gradient has not
                dkeys[tile.items, tile.keys].baddbmm_(dscores.mT, some_queries, alpha=call.scale / _scale(call))
                dvalues[tile.items, tile.keys].baddbmm_(tile.apply_dropout(shares, call).mT, dout)
    return dq, dk, dv


def _scale(call: Call) -> float:
    """Return the factor of the products: scores with a softcap get the base 2 only after it."""
    return call.scale / LOG2 if call.softcap is None else call.scale


def _capped(scores: Tensor, call: Call) -> Tensor:
    """Return the bounded scores, in place, to the base 2."""
    return scores if call.softcap is None else scores.div_(call.softcap).tanh_().mul_(call.softcap / LOG2)


class _Chunk(NamedTuple):
    """A set of key heads of some samples, and the query heads that they serve, `group` for each key head.

    A tile has `rows` queries, and at most `scores` scores.
    """

    samples: range
    key_heads: range
    group: int
    queries: int
    keys: int
    rows: int
    scores: int

    @property
    def most_scores(self) -> int:
        """The number of scores of the largest tile."""
        pairs = len(self.samples) * len(self.key_heads) * self.group * self.rows * self.keys
        return min(self.scores, pairs)

    def keys_of(self, x: Tensor) -> Tensor:
        """Return the rows of k, v or their gradients, (samples * key heads, keys, D).

        They are contiguous and in the type of the accumulators: a view if x is so, else a copy.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        return x[_slice(self.samples), _slice(self.key_heads)].to(wide).flatten(0, 1).contiguous()

    def queries_of(self, x: Tensor) -> Tensor:
        """Return the rows of q, out, lse or their gradients, (samples * key heads, group, queries, D).

        They are in the type of the accumulators, and a view if x is contiguous and of that type.
        """
        heads = slice(self.key_heads.start * self.group, self.key_heads.stop * self.group)
        wide = torch.promote_types(x.dtype, torch.float32)
        rows: Tensor = x[_slice(self.samples), heads].to(wide).unflatten(1, (-1, self.group))
        return rows.flatten(0, 1)

    def tiles(self, block: Block) -> Iterator[_Tile]:
        """Yield the tiles of this chunk, each with the keys that at least one of its queries may see.

        Under `low <= query - key <= high` these are the keys between two diagonals:

            tile 0    x x . . . .     keys 0 ... 2
                      x x x . . .
            tile 1    . x x x . .     keys 1 ... 4
                      . . x x x .
        """
        low, high = block.low, block.high
        for begin in range(0, self.queries, self.rows):
            end = min(begin + self.rows, self.queries)
            # a tile of queries without keys still has one key, which is masked
            first_key = 0 if high is None else min(max(begin - high, 0), self.keys - 1)
            end_key = self.keys if low is None else min(max(end - low, first_key + 1), self.keys)
            most = self.scores // (self.group * (end - begin) * (end_key - first_key))
            for samples, key_heads in _split(self.samples, self.key_heads, most):
                yield _Tile(self, samples, key_heads, slice(begin, end), slice(first_key, end_key))


class _Tile(NamedTuple):
    """The scores of some queries of some heads of a chunk against the keys that they may see."""

    chunk: _Chunk
    samples: range
    key_heads: range
    queries: slice
    keys: slice

    @property
    def items(self) -> slice:
        """The slice of dim 0 of what `_Chunk.queries_of` and `_Chunk.keys_of` return that belongs to this tile."""
        each = len(self.chunk.key_heads)
        first = (self.samples.start - self.chunk.samples.start) * each
        first += self.key_heads.start - self.chunk.key_heads.start
        return slice(first, first + len(self.samples) * len(self.key_heads))

    def read(self, rows: Tensor) -> Tensor:
        """Return the rows of this tile, (samples * key heads, group * queries, D), of `_Chunk.queries_of`.

        The heads of a group follow one another, so that the query heads of a group share one product with the keys of
        their key head.
        """
        return rows[self.items, :, self.queries].flatten(1, 2)

    def write(self, rows: Tensor, values: Tensor) -> None:
        """Write the rows that `read` would read."""
        target = rows[self.items, :, self.queries]
        target.copy_(values.view(target.shape))

    def read_keys(self, rows: Tensor) -> Tensor:
        """Return the rows of this tile, (samples * key heads, keys, D), of `_Chunk.keys_of`, contiguous.

        The product with a transposed matrix that is not contiguous takes half as long again.
        """
        return rows[self.items, self.keys].contiguous()

    def products(self, buffer: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return the products of each row of a with each row of b, (samples * key heads, rows of a, rows of b).

        They are written to `buffer`, which has `_Chunk.most_scores` elements.
        """
        shape = len(a), a.shape[1], b.shape[1]
        return torch.bmm(a, b.mT, out=buffer[: shape[0] * shape[1] * shape[2]].view(shape))

    def mask(self, scores: Tensor, call: Call) -> Tensor:
        """Set masked scores to -inf and add the log of how often each pair counts, in place; return the scores.

        The masks are the bounds of the block, padding, and the order of tokens.  `scores`, (samples * key heads, group
        * queries, keys), are logarithms to the base 2, and so is what is added.
        """
        per_head = scores.unflatten(1, (self.chunk.group, -1))
        (low, high), (first, last) = (call.block.low, call.block.high), (self.keys.start, self.keys.stop)
        first_query, rows = self.queries.start, per_head.shape[-2]
        if call.block.repeats or call.block.head_repeats:
            self._add_weights(scores, call.block)
        if low is not None:  # every query of the tile sees the keys before `edge`: only the rest needs a mask
            edge = min(max(first_query - low + 1, first), last)
            ceiling = _mask_ceiling(rows, last - edge, low - first_query + edge, None, scores.dtype, scores.device)
            _mask_in_place(per_head[..., edge - first :], ceiling)
        if high is not None:  # no query of the tile is too far from the keys behind `edge`
            edge = min(max(self.queries.stop - 1 - high, first), last)
            ceiling = _mask_ceiling(rows, edge - first, None, high - first_query + first, scores.dtype, scores.device)
            _mask_in_place(per_head[..., : edge - first], ceiling)
        if call.key_padding_mask is not None:
            heads = _slice(self.key_heads) if call.key_padding_mask.shape[1] > 1 else slice(None)
            padding = call.key_padding_mask[_slice(self.samples), heads, self.keys]
            ceiling = torch.full_like(padding, inf, dtype=scores.dtype).masked_fill_(padding, -inf)
            _mask_in_place(scores.unflatten(0, (padding.shape[0], -1)), ceiling.unsqueeze(2))
        if call.order_mask is not None:
            query_tokens, key_tokens = call.order_mask
            scores.masked_fill_(self._keys_of(key_tokens) > self._queries_of(query_tokens), -inf)
        return scores

    def _add_weights(self, scores: Tensor, block: Block) -> None:
        """Add the log of how often each pair counts, in place."""
        rows, keys = self.queries.stop - self.queries.start, self.keys.stop - self.keys.start
        heads = block.head_repeats[_slice(self.key_heads)] or (block.repeats,)
        # the rows of the table recur, so that it stays in the cache
        every = heads[0][-1].every
        period = every if rows % every == 0 else rows
        table = torch.stack(
            [log_weights(period, keys, self._moved(repeats), scores.dtype, scores.device) for repeats in heads]
        ).div_(LOG2)
        shape = len(self.samples), len(self.key_heads), self.chunk.group, -1, period, keys
        scores.view(shape).add_(table[:, None, None])

    def _moved(self, repeats: tuple[Repeat, ...]) -> tuple[Repeat, ...]:
        """Return the repeats of a block as they are counted from the first query and key of this tile."""
        return tuple(
            repeat._replace(
                queries=(repeat.queries - self.queries.start) % repeat.every,
                keys=(repeat.keys - self.keys.start) % repeat.every,
            )
            for repeat in repeats
        )

    def apply_dropout(self, pairs: Tensor, call: Call) -> Tensor:
        """Set the pairs that dropout drops to 0 and scale the others, in place."""
        if call.dropout_mask is None:
            return pairs
        dropout, query_words, key_words = call.dropout_mask
        bits = pairs.view(torch.int64 if pairs.dtype == torch.float64 else torch.int32)
        bits &= dropout.keep_bits(self._queries_of(query_words), self._keys_of(key_words))
        return pairs.mul_(1 / (1 - dropout.probability))

    def _queries_of(self, x: Tensor) -> Tensor:
        """Return the part of x (batch, heads, queries), a number for each query, that is of the queries of this tile.

        The shape is (samples * key heads, group * queries, 1).
        """
        heads = slice(self.key_heads.start * self.chunk.group, self.key_heads.stop * self.chunk.group)
        rows = x[_slice(self.samples), heads, self.queries]
        return rows.reshape(-1, self.chunk.group * rows.shape[2], 1)

    def _keys_of(self, x: Tensor) -> Tensor:
        """Return the part of x (batch, key heads, keys), a number for each key, that is of the keys of this tile.

        The shape is (samples * key heads, 1, keys).
        """
        rows = x[_slice(self.samples), _slice(self.key_heads), self.keys]
        return rows.reshape(-1, 1, rows.shape[2])


def _chunks(q: Tensor, k: Tensor) -> Iterator[_Chunk]:
    """Yield the chunks of a call, which together have all samples and key heads.

    Each has so many of them that the scores of their first queries fill one tile where the mask is causal.
    """
    (batch, heads, queries, _), (_, key_heads, keys, _) = q.shape, k.shape
    group, size, most_rows = heads // key_heads, _TILE.get(q.device.type, _LARGE_TILE), queries
    if q.device.type == "cpu":
        most_rows = min(queries, _MOST_ROWS)
        # each thread computes a share of a tile, which is to be worth its start
        size *= max(1, min(torch.get_num_threads(), _MOST_THREADS) // 2)
    rows = min(most_rows, max(_ROWS, size // (group * keys)))
    scores = max(size, group * rows * keys)
    for samples, some_heads in _split(range(batch), range(key_heads), size // (group * rows * min(rows, keys))):
        yield _Chunk(samples, some_heads, group, queries, keys, rows, scores)


def _split(samples: range, key_heads: range, most: int) -> Iterator[tuple[range, range]]:
    """Yield (samples, key heads) at a time: at most `most` pairs of both, or one; of several samples, all key heads."""
    parts = -(-len(key_heads) // max(1, most))
    each, together = -(-len(key_heads) // parts), max(1, most // len(key_heads))
    for s in range(0, len(samples), together):
        for h in range(0, len(key_heads), each):
            yield samples[s : s + together], key_heads[h : h + each]


def _slice(run: range) -> slice:
    """Return a range as a slice."""
    return slice(run.start, run.stop)


def _mask_in_place(scores: Tensor, ceiling: Tensor) -> None:
    """Set the scores of masked pairs to -inf, where `ceiling`, which broadcasts, is -inf; elsewhere it is +inf.

    `_Tile.mask` calls it for the bounds of a block and for padding.  Adding -inf instead would make NaN of a score that
    overflowed to +inf.  A NaN stays.
    """
    torch.minimum(scores, ceiling, out=scores)


@lru_cache(8)
def _mask_ceiling(
    rows: int, columns: int, low: int | None, high: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return (rows, columns): +inf where `low <= row - column <= high`, and -inf elsewhere."""
    return torch.where(band_bias(rows, columns, low, high, dtype, device) == 0, inf, -inf)
