"""Attention of new queries to the keys of a cache, on one process: what `generate` computes token by token."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

import torch

from lightning_longnet.attention.attend import attend
from lightning_longnet.huggingface.tokens import unpadded_documents

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.attention.pattern.pattern import Pattern
    from lightning_longnet.attention.prepared import AttendOptions
    from lightning_longnet.huggingface.masks import RingMask


def attend_cached(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: RingMask,
    pattern: Pattern | None,
    *,
    dropout: float = 0.0,
    scale: float | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Return out (B, queries, H, Dv) of (B, H, queries, D), (B, Hkv, keys, D) and (B, Hkv, keys, Dv).

    `pattern` is that of a dilated layer, or None for the mask's own.
    """
    if dropout > 0:
        raise ValueError(
            "attention dropout must be 0 where keys come from a cache: set use_cache=False, or call eval()"
        )
    if pattern is not None:
        return _attend_pattern(query, key, value, mask, pattern, {"scale": scale, "sinks": sinks, "softcap": softcap})
    heads, width = query.shape[1], query.shape[3]
    wide = torch.promote_types(query.dtype, torch.float32)
    q = query.to(wide) * (width**-0.5 if scale is None else scale)
    k, v = (x.to(wide).repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    with torch.autocast(q.device.type, enabled=False):
        scores = q @ k.mT
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        visible = _visible(mask, scores)
        if visible is not None:
            scores = scores.masked_fill(~visible, -inf)
        lse = scores.logsumexp(-1, keepdim=True)
        if sinks is not None:
            lse = torch.logaddexp(lse, sinks.to(wide)[:, None, None])
        weights = (scores - lse.masked_fill(lse == -inf, 0)).exp()
        return (weights @ v).transpose(1, 2).to(query.dtype)


def _visible(mask: RingMask, scores: Tensor) -> Tensor | None:
    """Return which keys each query sees, (B, 1, queries, keys), or None where it sees all."""
    if mask.arguments:
        return mask.visible()
    queries, keys = scores.shape[-2:]
    if mask.pattern.is_causal and queries > 1:
        raise ValueError(
            f"a causal layer without a mask must have as many queries as keys, or one, got {queries} and {keys}"
        )
    return None


def _attend_pattern(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: RingMask,
    pattern: Pattern,
    terms: AttendOptions,
) -> Tensor:
    """Return out of a dilated layer, whose pattern counts from the first token: it needs all keys since then.

    The new queries are computed among zeros in place of the earlier ones.
    """
    get = mask.arguments.get
    queries = query.shape[2]
    end = int(get("q_offset", 0)) + queries
    if not mask.arguments or get("kv_offset", 0) or key.shape[2] < end:
        raise ValueError(
            "a dilated layer needs the keys of all earlier tokens: use a cache that keeps them, or use_cache=False"
        )
    key, value = key[:, :, :end], value[:, :, :end]
    all_queries = query.new_zeros((*query.shape[:2], end, query.shape[3]))
    all_queries[:, :, -queries:] = query
    padding = None if mask.key_padding_mask is None else mask.key_padding_mask[:, :end]
    documents = None if padding is None else unpadded_documents(padding)
    q, k, v = (x.transpose(1, 2) for x in (all_queries, key, value))
    options: AttendOptions = {**terms, "documents": documents, "key_padding_mask": padding}
    return attend(q, k, v, pattern, **options)[:, -queries:]
