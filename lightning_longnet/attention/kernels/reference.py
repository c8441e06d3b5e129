"""The equation, dense: one softmax over all that the branches show.  Slow, plain, and the truth of all others."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

import torch

from lightning_longnet.attention.documents import document_cuts

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.attention.kernels import Request
    from lightning_longnet.attention.pattern import Pattern

name = "reference"
note = "holds all N x N scores; differentiable any number of times"


def refusals(request: Request) -> list[str]:
    return []


def attend(
    q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, pattern: Pattern, scale: float, mix: str
) -> tuple[Tensor, Tensor]:
    """(out, lse), through autograd: `mix="detached"` stops the gradient at the branches' weights."""
    rows = [
        _attend_row(q[b], k[b], v[b], cuts, pattern, scale, mix)
        for b, cuts in enumerate(document_cuts(documents, q.shape[0], q.shape[1]))
    ]
    out, lse = (torch.stack(parts) for parts in zip(*rows, strict=True))
    return out.to(q.dtype), lse.detach()


def _attend_row(
    q: Tensor, k: Tensor, v: Tensor, cuts: tuple[int, ...], pattern: Pattern, scale: float, mix: str
) -> tuple[Tensor, Tensor]:
    _, heads, _ = q.shape
    kv_heads = k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(wide).repeat_interleave(heads // x.shape[1], dim=1) for x in (q, k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    lengths = torch.tensor(cuts, device=q.device).diff()
    document = torch.arange(len(lengths), device=q.device).repeat_interleave(lengths)
    index = torch.cat([torch.arange(n, device=q.device) for n in lengths.tolist()])
    shown = [seen.repeat_interleave(heads // kv_heads, dim=0) for seen in pattern.visible(index, kv_heads)]
    shown = [seen & (document[:, None] == document) for seen in shown]
    # the largest visible score, which cancels, so that exp overflows nowhere
    seen = torch.stack(shown).any(0)
    top = scores.detach().masked_fill(~seen, -inf).amax(-1, keepdim=True)
    top = top.masked_fill(top == -inf, 0)
    weights = [(scores - top).masked_fill(~seen, -inf).exp() for seen in shown]
    sums = [weight.sum(-1, keepdim=True) for weight in weights]
    total = torch.stack(sums).sum(0)
    lse = (top + total.log()).squeeze(-1)
    out = scores.new_zeros(())
    for weight, own in zip(weights, sums, strict=True):
        if mix == "exact":
            share = weight / total.masked_fill(total == 0, 1)
        else:
            share = weight / own.masked_fill(own == 0, 1) * (own / total.masked_fill(total == 0, 1)).detach()
        out = out + torch.einsum("hij,jhd->ihd", share, v)
    return out, lse
