"""The equation, dense: one softmax over all that the branches show.  Slow, plain, and the truth of all others."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

import torch

from lightning_longnet.attention.plan.documents import document_cuts

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.attention.checks import PreparedCall
    from lightning_longnet.attention.kernels import Request
    from lightning_longnet.attention.kernels.dropout import Dropout
    from lightning_longnet.attention.pattern.pattern import Pattern
    from lightning_longnet.attention.spec import AttentionSpec

name = "reference"

# What the scores of one sample may take, in GiB: several tensors of their size are held at once
SCORES_GIB = 16


def note(request: Request) -> str:
    return "holds all N x N scores; differentiable any number of times"


def refusals(request: Request) -> list[str]:
    reasons = []
    if request.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        reasons.append(f"serves float64, float32, bfloat16 and float16, q is {request.dtype}")
    scores = request.heads * request.tokens**2 * 4 / 2**30
    if scores > SCORES_GIB:
        reasons.append(f"would hold {scores:,.0f} GiB of scores, more than the {SCORES_GIB} that it takes")
    return reasons


def attend(call: PreparedCall, dropout: Dropout | None) -> tuple[Tensor, Tensor]:
    """Return (out, lse) through autograd; `mix="detached"` stops the gradient at the branches' weights."""
    q, k, v, spec = call.q, call.k, call.v, call.spec
    kept = _kept(dropout, spec.pattern, q)
    with torch.autocast(q.device.type, enabled=False):  # which would round the products
        rows = [
            _attend_sample(
                *(q[b], k[b], v[b], cuts),
                None if call.key_padding_mask is None else call.key_padding_mask[b],
                [x[b] for x in kept],
                spec,
                call.sinks,
            )
            for b, cuts in enumerate(document_cuts(call.documents, q.shape[0], q.shape[1]))
        ]
    out, lse = (torch.stack(parts) for parts in zip(*rows, strict=True))
    return out.to(q.dtype), lse.detach()


def _kept(dropout: Dropout | None, pattern: Pattern, q: Tensor) -> list[Tensor]:
    """Return the factors of each branch's weights, (B, H, N, N); an empty list without dropout."""
    if dropout is None:
        return []
    rows, tokens, heads = (torch.arange(n, device=q.device) for n in q.shape[:3])
    kept = []
    for i in range(len(pattern.branches)):
        words = dropout.query_words(rows, tokens, heads, 0 if pattern.multiplicity == "set" else i)
        keeps = dropout.keeps(words.transpose(1, 2)[..., None], dropout.key_words(tokens))
        kept.append((keeps != 0).to(torch.promote_types(q.dtype, torch.float32)) / (1 - dropout.probability))
    return kept


def _attend_sample(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cuts: tuple[int, ...],
    padding: Tensor | None,
    kept: list[Tensor],
    spec: AttentionSpec,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    _, heads, _ = q.shape
    kv_heads = k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(wide).repeat_interleave(heads // x.shape[1], dim=1) for x in (q, k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * spec.scale_of(q.shape[2])
    lengths = torch.tensor(cuts, device=q.device).diff()
    document = torch.arange(len(lengths), device=q.device).repeat_interleave(lengths)
    index = torch.cat([torch.arange(n, device=q.device) for n in lengths.tolist()])
    shown = [seen.repeat_interleave(heads // kv_heads, dim=0) for seen in spec.pattern.visible(index, kv_heads)]
    shown = [seen & (document[:, None] == document) for seen in shown]
    if padding is not None:
        shown = [seen & ~padding for seen in shown]
    # each branch is a softmax of its own, whose largest score cancels; empty rows are given a score, and no weight
    outs, lses = [], []
    for i, seen in enumerate(shown):
        some = seen.any(-1, keepdim=True)
        own = scores.masked_fill(~seen, -inf).masked_fill(~some, 0)
        weights = own.softmax(-1).masked_fill(~seen, 0)
        if kept:
            weights = weights * kept[i]
        outs.append(torch.einsum("hij,jhd->ihd", weights, v))
        lses.append(own.logsumexp(-1).masked_fill(~some.squeeze(-1), -inf))
    logits = lses if sinks is None else [*lses, sinks.to(wide)[:, None].expand_as(lses[0])]
    lse = torch.stack(logits).logsumexp(0)
    finite = lse.masked_fill(lse == -inf, 0)
    shares = [(each - finite).exp() for each in lses]
    if spec.mix == "detached":
        shares = [share.detach() for share in shares]
    out = torch.stack([share.T[..., None] * each for share, each in zip(shares, outs, strict=True)]).sum(0)
    return out, lse
