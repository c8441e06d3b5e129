"""Plain products, a tile of scores at a time: serves every block, mask, width, type and device, and dropout."""

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

# Scores in a tile: what a CPU's caches hold beside the words of dropout, and what fills a GPU
_TILE = {"cpu": 2**19}
_LARGE_TILE = 2**25
_ROWS = 32  # fewer make poor products


def refusals(request: Request) -> list[str]:
    if request.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        return [f"serves float64, float32, bfloat16 and float16, q is {request.dtype}"]
    return []


def note(request: Request) -> str:
    return "plain products in float32 or float64, a tile of scores at a time"


def takes_weights(device: str) -> bool:
    return False


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """(batch, heads, rows, D) -> out, lse (batch, heads, rows); k and v may have fewer heads."""
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty((*q.shape[:3], v.shape[3]), dtype=wide)
    lse = q.new_empty((*q.shape[:3], 1), dtype=wide)
    with routed_products():
        for part in _parts(q, k):
            keys, values = part.of_keys(k), part.of_keys(v)
            for tile in part.tiles(call):
                scores = tile.scores(tile.read(q) * call.scale, keys, call)
                largest = scores.amax(-1, keepdim=True).clamp_min_(torch.finfo(wide).min)  # -inf - -inf is NaN
                weights = scores.sub_(largest).exp_()
                total = weights.sum(-1, keepdim=True)
                tile.write(lse, largest + total.log())
                found = torch.bmm(tile.kept(weights, call), values[:, tile.keys])
                tile.write(out, found.div_(total.clamp_min_(1)))  # the largest weight is 1, if there is any
    return out, lse.squeeze(-1)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of one block of a larger softmax, whose `out` and `lse` are given: +inf where it shows no key."""
    wide = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (torch.empty_like(x, dtype=wide, memory_format=torch.contiguous_format) for x in (q, k, v))
    lse = lse.unsqueeze(-1)
    with routed_products():
        for part in _parts(q, k):
            keys, values = part.of_keys(k), part.of_keys(v)
            dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
            for tile in part.tiles(call):
                queries, incoming = tile.read(q) * call.scale, tile.read(grad)
                mean = (incoming * tile.read(out)).sum(-1, keepdim=True)
                weights = tile.scores(queries, keys, call).sub_(tile.read(lse)).exp_()
                slopes = tile.kept(torch.bmm(incoming, values[:, tile.keys].mT), call)
                slopes = slopes.sub_(mean).mul_(weights)
                tile.write(dq, torch.bmm(slopes, keys[:, tile.keys]).mul_(call.scale))
                dkeys[:, tile.keys].baddbmm_(slopes.mT, queries)
                dvalues[:, tile.keys].baddbmm_(tile.kept(weights, call).mT, incoming)
            part.into_keys(dk, dkeys)
            part.into_keys(dv, dvalues)
    return dq, dk, dv


class _Part(NamedTuple):
    """Some key heads of some samples, and the query heads that they serve."""

    samples: slice
    key_heads: slice
    group: int
    queries: int
    keys: int
    rows: int  # queries in a tile

    def of_keys(self, x: Tensor) -> Tensor:
        """(samples * key heads, keys, D), wide and dense: what each tile reads again."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return x[self.samples, self.key_heads].to(wide).flatten(0, 1).contiguous()

    def into_keys(self, x: Tensor, values: Tensor) -> None:
        at = x[self.samples, self.key_heads]
        at.copy_(values.view(at.shape))

    def tiles(self, call: Call) -> Iterator[_Tile]:
        low, high = call.block.low, call.block.high
        for a in range(0, self.queries, self.rows):
            b = min(a + self.rows, self.queries)
            first = 0 if high is None else min(max(a - high, 0), self.keys - 1)
            last = self.keys if low is None else min(max(b - low, first + 1), self.keys)
            yield _Tile(self, slice(a, b), slice(first, last))


class _Tile(NamedTuple):
    """Some queries of a part, and the keys that they may see."""

    part: _Part
    queries: slice
    keys: slice

    def read(self, x: Tensor) -> Tensor:
        """(samples * key heads, group * queries, D), wide: a group's heads stand below one another."""
        rows = x[self.part.samples, self._heads, self.queries].to(torch.promote_types(x.dtype, torch.float32))
        return rows.reshape(-1, self.part.group * rows.shape[2], rows.shape[3])

    def write(self, x: Tensor, values: Tensor) -> None:
        at = x[self.part.samples, self._heads, self.queries]
        at.copy_(values.view(at.shape))

    def scores(self, queries: Tensor, keys: Tensor, call: Call) -> Tensor:
        """With -inf for what is not seen."""
        scores = torch.bmm(queries, keys[:, self.keys].mT)
        apart = scores.unflatten(1, (self.part.group, -1))
        (low, high), (first, last) = (call.block.low, call.block.high), (self.keys.start, self.keys.stop)
        top, rows = self.queries.start, apart.shape[-2]
        if low is not None:  # beyond this key the first query sees no more
            edge = min(max(top - low + 1, first), last)
            cap = _cap(rows, last - edge, low - top + edge, None, scores.dtype, scores.device)
            _lower(apart[..., edge - first :], cap)
        if high is not None:  # from this key on the last query sees all
            edge = min(max(self.queries.stop - 1 - high, first), last)
            cap = _cap(rows, edge - first, None, high - top + first, scores.dtype, scores.device)
            _lower(apart[..., : edge - first], cap)
        if call.key_padding_mask is not None:
            heads = self.part.key_heads if call.key_padding_mask.shape[1] > 1 else slice(None)
            hidden = call.key_padding_mask[self.part.samples, heads, self.keys]
            cap = torch.full_like(hidden, inf, dtype=scores.dtype).masked_fill_(hidden, -inf)
            _lower(scores.unflatten(0, (hidden.shape[0], -1)), cap.unsqueeze(2))
        return scores

    def kept(self, pairs: Tensor, call: Call) -> Tensor:
        """The pairs that dropout leaves, in place."""
        if call.dropout_mask is None:
            return pairs
        dropout, query_words, key_words = call.dropout_mask
        words = query_words[self.part.samples, self._heads, self.queries].reshape(*pairs.shape[:2], 1)
        keys = key_words[self.part.samples, self.part.key_heads, self.keys].reshape(pairs.shape[0], 1, -1)
        bits = pairs.view(torch.int64 if pairs.dtype == torch.float64 else torch.int32)
        bits &= dropout.keeps(words, keys)
        return pairs.mul_(1 / (1 - dropout.probability))

    @property
    def _heads(self) -> slice:
        key_heads, group = self.part.key_heads, self.part.group
        return slice(key_heads.start * group, key_heads.stop * group)


def _parts(q: Tensor, k: Tensor) -> Iterator[_Part]:
    (batch, heads, queries, _), (_, key_heads, keys, _) = q.shape, k.shape
    group, size = heads // key_heads, _TILE.get(q.device.type, _LARGE_TILE)
    rows = min(queries, max(_ROWS, size // (group * keys)))
    many = max(1, min(key_heads, size // (group * rows * keys)))
    samples = max(1, size // (heads * rows * keys)) if many == key_heads else 1
    for s in range(0, batch, samples):
        for h in range(0, key_heads, many):
            part = slice(s, min(s + samples, batch)), slice(h, min(h + many, key_heads))
            yield _Part(*part, group, queries, keys, rows)


def _lower(scores: Tensor, cap: Tensor) -> None:
    """Set what is not seen to -inf.  To add -inf would make NaN of a score that overflowed."""
    torch.minimum(scores, cap, out=scores)


@lru_cache(8)
def _cap(
    rows: int, columns: int, low: int | None, high: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    return torch.where(band(rows, columns, low, high, dtype, device) == 0, inf, -inf)
