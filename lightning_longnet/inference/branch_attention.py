"""Attention of many new tokens to a cache, a branch at a time.

The new tokens of a branch are those that end the segment in which the cache stops, and those of whole later segments.
`attend` computes the latter.  The former see rows of the cache: of each residue, a rectangle of scores and a triangle
after it.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, NamedTuple

import torch

from lightning_longnet.attention import Pattern, attend
from lightning_longnet.attention.kernels.partial import Partial

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lightning_longnet.inference.branch_rows import BranchRows
    from lightning_longnet.inference.rows import RowStore

# The largest number of scores that are held at a time
SCORES = 2**23
# The largest number of keys that are read at a time, so that many queries share them while they are in a core's cache
KEYS = 2**13


class NewRows(NamedTuple):
    """The queries (B, n, H, D), keys and values (B, n, Hkv, D) of new tokens, and the position of the first."""

    q: Tensor
    k: Tensor
    v: Tensor
    begin: int


def attend_by_branches(
    new: NewRows, branches: Sequence[BranchRows], stores: Sequence[RowStore], scale: float, kernel: str
) -> Partial:
    """Return the partial (B, n, H, D) of all keys that the branches show, in float32 or float64."""
    compute = torch.promote_types(new.q.dtype, torch.float32)
    tokens, kv_heads = new.k.shape[1:3]
    grouped = new.q.to(compute).unflatten(2, (kv_heads, -1))
    out = torch.zeros_like(grouped)
    lse = grouped.new_full((*grouped.shape[:-1], 1), -inf)
    borders = [_border(new, branch.branch.segment_length) for branch in branches]
    for branch, store, border in zip(branches, stores, borders, strict=True):
        if border:
            for offset in set(branch.offsets):
                _end_segment(new, Partial(out[:, :border], lse[:, :border]), (branch, store, offset), scale)
    if last := max(borders):
        stores[0].ranks.merge_(Partial(out[:, :last], lse[:, :last]))
    for branch, border in zip(branches, borders, strict=True):
        if border < tokens:  # these see new tokens alone, which each rank has
            q, k, v = new.q[:, border:], new.k[:, border:], new.v[:, border:]
            own, own_lse = attend(q, k, v, Pattern((branch.branch,)), scale=scale, kernel=kernel, return_lse=True)
            parts = (x.unflatten(2, (kv_heads, -1)) for x in (own, own_lse.transpose(1, 2)[..., None]))
            Partial(out[:, border:], lse[:, border:]).add_(*parts)
    return Partial(out.flatten(2, 3), lse.flatten(2, 3))


def _border(new: NewRows, segment_length: int | None) -> int:
    """Return how many new tokens end the segment in which the cache stops."""
    tokens = new.k.shape[1]
    if new.begin == 0:
        return 0
    return tokens if segment_length is None else min(tokens, -new.begin % segment_length)


def _end_segment(new: NewRows, merged: Partial, kept: tuple[BranchRows, RowStore, int], scale: float) -> None:
    """Merge what the tokens of one residue, in the segment in which the cache stops, see of it and of each other."""
    branch, store, offset = kept
    r, window, border = branch.branch.dilation_rate, branch.branch.window, merged.out.shape[1]
    place = new.begin if branch.branch.segment_length is None else new.begin % branch.branch.segment_length
    first = (offset - place) % r
    heads = branch.heads_of(offset)
    if first >= border or heads is None:
        return
    count = (place + first) // r  # the number of earlier rows
    ring = None if window is None else (window - 1) // r + 1  # the rows that a query sees, itself among them
    seen = count if ring is None else min(count, ring - 1)
    compute, ranks = merged.out.dtype, store.ranks
    old = store.read(heads, store.slots if ring is not None else seen, compute)
    numbers = torch.arange(count - seen, count)
    if ring is None:
        numbers = numbers[ranks.share]
    else:
        slots = numbers % (branch.capacity or count)
        is_own = slots % ranks.size == ranks.rank
        numbers, places = numbers[is_own], (slots[is_own] // ranks.size).to(new.q.device)
        old = old[0][:, :, places], old[1][:, :, places]
    own = (x[:, first:border:r][:, ranks.share, heads].to(compute).transpose(1, 2) for x in (new.k, new.v))
    keys, values = (torch.cat(each, 2) for each in zip(old, own, strict=True))
    # the number of each key that this rank attends to among the rows of the segment and residue
    numbers = torch.cat([numbers, torch.arange(count, count + len(range(first, border, r)))[ranks.share]])
    queries = new.q.unflatten(2, (new.k.shape[2], -1))[:, first:border:r, heads].to(compute) * scale
    target = Partial(merged.out[:, first:border:r, heads], merged.lse[:, first:border:r, heads])
    batch, rows, some_heads, group, width = queries.shape
    tile = max(1, SCORES // (batch * some_heads * group * max(1, min(KEYS, keys.shape[2]))))
    if ring is not None:
        tile = min(tile, max(ring, 64))  # of more rows together, most scores would be outside of their windows
    for a in range(0, rows, tile):
        b = min(a + tile, rows)
        low = 0 if ring is None else int(torch.searchsorted(numbers, count + a - ring + 1))
        high = int(torch.searchsorted(numbers, count + b))
        part = queries[:, a:b].permute(0, 2, 3, 1, 4).flatten(2, 3)  # (B, heads, G rows, D)
        partial = Partial(target.out[:, a:b], target.lse[:, a:b])
        at = torch.arange(count + a, count + b, device=keys.device)[:, None]
        for c in range(low, high, KEYS):
            end = min(c + KEYS, high)
            scores = (part @ keys[:, :, c:end].transpose(-1, -2)).unflatten(2, (group, b - a))
            if ring is not None or int(numbers[end - 1]) > count + a:
                others = numbers[c:end].to(keys.device)
                hidden = others > at
                if ring is not None:
                    hidden |= at - others >= ring
                scores = scores.masked_fill_(hidden, -inf)
            lse = scores.logsumexp(-1, keepdim=True)
            weights = scores.sub_(lse.masked_fill(lse == -inf, 0)).exp_().flatten(2, 3)  # 0 of rows that see none
            found = (weights @ values[:, :, c:end]).view(batch, some_heads, group, b - a, width)
            partial.add_(found.permute(0, 3, 1, 2, 4), lse.permute(0, 3, 1, 2, 4))
