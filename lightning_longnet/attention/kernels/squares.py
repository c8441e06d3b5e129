"""Attention by plain matrix products of squares of scores, on one thread of a CPU.

It serves blocks without a mask, or with a causal one alone.

A causal run of rows is cut into squares that need no mask, and triangles along its diagonal:

    T . . .     T   a triangle of `SIDE` rows, of which half is computed in vain
    S T . .     S   a square of as many rows
    L L T .     L   a square of twice as many, and so on
    L L S T

Equal squares of a run are one batch.  Scores are logarithms to the base 2, as in eager.py.  The scores of the backward
are transposed, (keys, queries): then only one of its five products reads a transposed matrix.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from math import inf, log
from typing import TYPE_CHECKING, NamedTuple

import torch

from lightning_longnet.attention.kernels.call import band_bias, log_weights
from lightning_longnet.attention.kernels.products import routed_products
from lightning_longnet.attention.plan.runs import Repeat

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lightning_longnet.attention.kernels.call import Call
    from lightning_longnet.attention.plan.block import Block

# The rows of the smallest squares, and the most rows of any
SIDE, MOST_ROWS = 128, 1024
# The most scores in a tile: fewer fit the nearest cache better, but each operator takes its time for a call
MOST_SCORES, LEAST_SCORES = 2**19, 2**17
# Scores up to this, as logarithms to the base 2, need no largest score of a row: no power and no sum of powers is
# beyond the numbers of float32
BOUND = 30.0
LOG2 = log(2)


def serves(q: Tensor, k: Tensor, call: Call) -> bool:
    """Return whether this module computes a call: one in which every query sees all keys, or all up to its own.

    `_tiles` of sdpa/cpu.py asks for calls of many pairs.
    """
    block = call.block
    if call.key_padding_mask is not None or call.dropout_mask is not None or call.order_mask is not None:
        return False
    if call.softcap is not None or block.high is not None or q.dtype not in (torch.float32, torch.float64):
        return False
    return block.low is None or (block.low == 0 and q.shape[2] == k.shape[2])


def takes_weights(device: str) -> bool:
    """Return whether the module can count a pair several times in one block: on CPU alone.

    Each `BlockKernel` has this function; here nothing calls it, as the kernel "sdpa" answers for its modules.
    """
    return device == "cpu"


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Return out (batch, heads, rows, Dv) and lse (batch, heads, rows) of one block; see `BlockKernel`.

    `forward` of sdpa/cpu.py calls it for blocks of many pairs that this module `serves`; see `_is_tiled` there.
    """
    out, lse = q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3])
    group, tiles = q.shape[1] // k.shape[1], _tiles_of(q, k, call.block)
    buffer = q.new_empty(max(tile.scores for tile in tiles))
    with routed_products():
        for sample, head in product(range(k.shape[0]), range(k.shape[1])):
            keys, values = k[sample, head].contiguous(), v[sample, head].contiguous()
            repeats = _repeats(call.block, head)
            for own in range(head * group, (head + 1) * group):
                queries = q[sample, own] * (call.scale / LOG2)
                result = _Softmax(out[sample, own], lse[sample, own].unsqueeze(-1))
                if not _are_bounded(queries, keys):
                    result = result._replace(largest=torch.empty_like(result.total))
                for tile in tiles:
                    scores = tile.products(buffer, tile.queries_of(queries), tile.keys_of(keys))
                    _add_weights(scores, repeats, tile.first_query, tile.first_key)
                    result.add(tile, scores, tile.keys_of(values))
                result.finish()
    return out, lse.mul_(LOG2)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv of one block from the `out` and `lse` of the whole softmax; see `BlockKernel`.

    `backward` of sdpa/cpu.py calls it for blocks of many pairs that this module `serves`; see `_is_tiled` there.
    """
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    group, tiles = q.shape[1] // k.shape[1], _tiles_of(q, k, call.block)
    buffers = q.new_empty(2, max(tile.scores for tile in tiles))
    with routed_products():
        for sample, head in product(range(k.shape[0]), range(k.shape[1])):
            keys, values = k[sample, head].contiguous(), v[sample, head].contiguous()
            repeats = tuple(Repeat(every, key, query) for every, query, key in _repeats(call.block, head))
            for i, own in enumerate(range(head * group, (head + 1) * group)):
                queries, dout = q[sample, own] * (call.scale / LOG2), grad[sample, own].contiguous()
                delta, logs = (dout * out[sample, own]).sum(-1), lse[sample, own] / LOG2
                for tile in tiles:
                    some_queries, some_keys = tile.queries_of(queries), tile.keys_of(keys)
                    some_dout = tile.queries_of(dout)
                    scores = tile.products(buffers[0], some_keys, some_queries)
                    _add_weights(scores, repeats, tile.first_key, tile.first_query)
                    shares = scores.sub_(tile.numbers_of(logs)).exp2_()
                    if tile.is_triangle:
                        shares.triu_()
                    # the gradient of the scores is P (g.v - g.out)
                    dscores = tile.products(buffers[1], tile.keys_of(values), some_dout)
                    dscores.sub_(tile.numbers_of(delta)).mul_(shares)
                    is_first = tile.has_first_query and i == 0
                    _add_product(tile.keys_of(dk[sample, head]), dscores, some_queries, is_first)
                    _add_product(tile.keys_of(dv[sample, head]), shares, some_dout, is_first)
                    _add_product(tile.queries_of(dq[sample, own]), dscores.mT, some_keys, tile.has_first_key)
    # the scale of the queries holds the base of the scores, which the gradient has not
    return dq.mul_(call.scale), dk.mul_(LOG2), dv


def _add_product(total: Tensor, a: Tensor, b: Tensor, is_first: bool) -> None:
    """Add the product of two batches of matrices to `total`; where `is_first`, this is uninitialized."""
    total.baddbmm_(a, b, beta=0 if is_first else 1)


def _are_bounded(queries: Tensor, keys: Tensor) -> bool:
    """Return whether no score of scaled queries and keys is beyond `BOUND`: the lengths of two vectors bound it."""
    squares = queries.square().sum(-1).amax() * keys.square().sum(-1).amax()
    return squares.item() <= BOUND**2  # False where it is NaN


class _Softmax(NamedTuple):
    """The softmax of the rows of a run over the keys so far.

    Attributes:
        out: (rows, Dv), the sum of the values, each with the power of its score.
        total: (rows, 1), the sum of these powers.
        largest: (rows, 1), what was subtracted from the scores: the largest one so far; None where scores are bounded.
    """

    out: Tensor
    total: Tensor
    largest: Tensor | None = None

    def add(self, tile: _Tile, scores: Tensor, values: Tensor) -> None:
        """Add the keys of a tile; its scores are overwritten."""
        out, total, is_first = tile.queries_of(self.out), tile.queries_of(self.total), tile.has_first_key
        if self.largest is None:
            shares = scores.exp2_()
            if tile.is_triangle:
                shares.tril_()
        else:
            if tile.is_triangle:
                ceiling = _mask_ceiling(tile.queries, scores.dtype)
                torch.minimum(scores, ceiling, out=scores)  # adding -inf would make NaN of +inf
            before, largest = tile.queries_of(self.largest), scores.amax(-1, keepdim=True)
            if not is_first:
                largest = torch.maximum(largest, before)
            # a row without keys has a largest score of -inf, and -inf - -inf is NaN
            largest.clamp_min_(torch.finfo(scores.dtype).min)
            if not is_first:
                kept = before.sub_(largest).exp2_()
                out.mul_(kept)
                total.mul_(kept)
            before.copy_(largest)
            shares = scores.sub_(largest).exp2_()
        if is_first:
            total.copy_(shares.sum(-1, keepdim=True))
        else:
            total.add_(shares.sum(-1, keepdim=True))
        _add_product(out, shares, values, is_first)

    def finish(self) -> None:
        """Turn the sums into the weighted mean `out`, and `total` into the log-sum-exp to the base 2."""
        if self.largest is None:
            self.out.div_(self.total)
            self.total.log2_()
        else:
            # the largest share of a row is 1, so the bound changes only the total of a row without keys, from 0
            self.out.div_(self.total.clamp_min(1))
            self.total.log2_().add_(self.largest)


class _Tile(NamedTuple):
    """Equal squares of scores of a run, at equal distances along the diagonal.

    Attributes:
        first_query, first_key: the first row of the first square.
        queries, keys: the rows of each square.
        many, step: how many squares there are, and at which distance.
        is_triangle: whether pairs above the diagonal of each square are masked.
        has_first_key: whether no earlier tile has its queries, so that sums of a query begin here.
        has_first_query: whether no earlier tile has its keys, so that gradients of a key begin here.
    """

    first_query: int
    first_key: int
    queries: int
    keys: int
    many: int
    step: int
    is_triangle: bool
    has_first_key: bool
    has_first_query: bool

    @property
    def scores(self) -> int:
        """The number of scores of all squares."""
        return self.many * self.queries * self.keys

    def queries_of(self, x: Tensor) -> Tensor:
        """Return the rows of this tile, (many, queries, D), of x (rows, D), which is contiguous."""
        return self._rows(x, self.first_query, self.queries)

    def keys_of(self, x: Tensor) -> Tensor:
        """Return the rows of this tile, (many, keys, D), of x (rows, D), which is contiguous."""
        return self._rows(x, self.first_key, self.keys)

    def _rows(self, x: Tensor, first: int, rows: int) -> Tensor:
        """Return the rows of all squares, (many, rows, D), as a view of x (rows, D), which is contiguous.

        Those of the first square begin at row `first`.
        """
        width = x.shape[1]
        strides = self.step * width, width, 1
        return x.as_strided((self.many, rows, width), strides, x.storage_offset() + first * width)

    def numbers_of(self, x: Tensor) -> Tensor:
        """Return a number of each query, (many, 1, queries), of x (rows,)."""
        step = x.stride(0)
        first = x.storage_offset() + self.first_query * step
        return x.as_strided((self.many, 1, self.queries), (self.step * step, 0, step), first)

    def products(self, buffer: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return a b^T for the rows of each square, (many, rows of a, rows of b), written to `buffer`.

        a and b are (many, rows, D).  `forward` calls it for scores, and `backward` for transposed scores and for the
        products of v and the gradient of out.  The result is a view of `buffer`, which has `scores` elements or more;
        the next call overwrites it.
        """
        return torch.bmm(a, b.mT, out=buffer[: self.scores].view(self.many, a.shape[1], b.shape[1]))


def _tiles_of(q: Tensor, k: Tensor, block: Block) -> tuple[_Tile, ...]:
    """Return the tiles of each run of a call, whose scores take little memory beside the call's queries."""
    most = min(max(1 << (2 * q.numel()).bit_length() - 1, LEAST_SCORES), MOST_SCORES)
    repeats = _repeats(block, 0)
    return _tiles(q.shape[2], k.shape[2], block.low is not None, most, repeats[-1].every if repeats else 1)


@lru_cache(64)
def _tiles(queries: int, keys: int, is_causal: bool, most: int, every: int) -> tuple[_Tile, ...]:
    """Return the tiles of a run, of at most `most` scores; `every` is the period of the weights of its pairs."""
    # squares in one batch have the same weights
    side = every * -(-SIDE // every) if every <= SIDE else SIDE
    groups = dict[tuple[int, ...], list[_Tile]]()
    for tile in _triangle(0, queries, side) if is_causal else [_Tile(0, 0, queries, keys, 1, 0, False, True, True)]:
        columns = min(tile.keys, MOST_ROWS)
        rows = min(tile.queries, max(most // columns, 1), MOST_ROWS)
        if tile.is_triangle:
            rows = columns = tile.queries
        for i, j in product(range(0, tile.queries, rows), range(0, tile.keys, columns)):
            part = tile._replace(
                first_query=tile.first_query + i,
                first_key=tile.first_key + j,
                queries=min(rows, tile.queries - i),
                keys=min(columns, tile.keys - j),
                has_first_key=tile.has_first_key and j == 0,
                has_first_query=tile.has_first_query and i == 0,
            )
            kind = part.first_query - part.first_key, part.queries, part.keys, i, j
            groups.setdefault(kind, []).append(part)
    batches = [batch for group in groups.values() for batch in _batches(group, most, every)]
    return tuple(sorted(batches, key=lambda tile: (not tile.is_triangle, tile.first_query, tile.first_key)))


def _triangle(first: int, last: int, side: int) -> Iterator[_Tile]:
    """Yield the squares below the diagonal of the rows `first` to `last`, and the triangles along it."""
    rows, size = last - first, side
    if rows <= side:
        yield _Tile(first, first, rows, rows, 1, 0, True, True, True)
        return
    while 2 * size < rows:
        size *= 2
    yield _Tile(first + size, first, rows - size, size, 1, 0, False, False, False)
    yield from _triangle(first, first + size, side)
    yield from _triangle(first + size, last, side)


def _batches(tiles: list[_Tile], most: int, every: int) -> Iterator[_Tile]:
    """Yield equal tiles, joined where they follow one another evenly and have equal weights."""
    batch, step = tiles[0], 0
    for tile in tiles[1:]:
        last = batch.first_query + (batch.many - 1) * batch.step
        step = tile.first_query - last
        is_even = batch.many == 1 or step == batch.step
        if is_even and step % every == 0 and (batch.many + 1) * tile.scores <= most:
            batch = batch._replace(many=batch.many + 1, step=step)
        else:
            yield batch
            batch = tile
    yield batch


def _repeats(block: Block, head: int) -> tuple[Repeat, ...]:
    """Return which pairs of a key head count more than once."""
    return block.head_repeats[head] if block.head_repeats else block.repeats


def _add_weights(scores: Tensor, repeats: tuple[Repeat, ...], row: int, column: int) -> None:
    """Add the log of how often each pair counts to scores (many, rows, columns), in place.

    Only every n-th row has pairs that count more than once, n the first `every` of `repeats`; others are left as they
    are.

    Args:
        scores: those of the rows from `row` on, and the columns from `column` on.
        repeats: the rules, with the rows as queries and the columns as keys.
    """
    if not repeats:
        return
    moved = tuple(Repeat(every, (a - row) % every, (b - column) % every) for every, a, b in repeats)
    least, first, every = moved[0].every, moved[0].queries, moved[-1].every
    some = scores[:, first::least]
    period = every // least
    if some.shape[1] and some.shape[1] % period == 0:  # the rows of the table recur, so that it stays in the cache
        some = some.unflatten(1, (-1, period))
        rows = every
    else:
        rows = scores.shape[1]
    table = log_weights(rows, MOST_ROWS, moved, scores.dtype, scores.device)[first::least, : scores.shape[2]]
    some.add_(table, alpha=1 / LOG2)


@lru_cache(4)
def _mask_ceiling(rows: int, dtype: torch.dtype) -> Tensor:
    """Return (rows, rows): +inf on and below the diagonal, and -inf above it."""
    return torch.where(band_bias(rows, rows, 0, None, dtype, torch.device("cpu")) == 0, inf, -inf)
