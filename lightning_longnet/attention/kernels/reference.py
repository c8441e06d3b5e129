"""The equation in its dense form: one softmax over all keys that the branches show, at N x N scores.

The tests compare the other kernels with it.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

import torch

from lightning_longnet.attention.plan.documents import document_cuts

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.attention.kernels import Request
    from lightning_longnet.attention.kernels.dropout import Dropout
    from lightning_longnet.attention.pattern.pattern import Pattern
    from lightning_longnet.attention.prepared import PreparedCall
    from lightning_longnet.attention.spec import AttentionSpec

name = "reference"

# The memory that the scores of one sample may take, in GiB: several tensors of this size are held at once
SCORES_GIB = 16


def note(request: Request) -> str:
    """Return what this kernel runs for a call that it does not refuse.

    `explain` shows it in its table of kernels.
    """
    return "holds all N x N scores; differentiable any number of times"


def refusals(request: Request) -> list[str]:
    """Return the reasons why this kernel cannot compute a call; an empty list if it can.

    `select` asks for a call of `attend` that may run the kernel, and `judge` for `explain`, the guard's preflight and
    `longnet plan`.
    """
    reasons = []
    if request.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        reasons.append(f"serves float64, float32, bfloat16 and float16, q is {request.dtype}")
    scores = request.heads * request.tokens**2 * 4 / 2**30
    if scores > SCORES_GIB:
        reasons.append(f"would hold {scores:,.0f} GiB of scores, more than the {SCORES_GIB} that it takes")
    return reasons


def attend(call: PreparedCall, dropout: Dropout | None) -> tuple[Tensor, Tensor]:
    """Return out (B, N, H, D) and lse (B, H, N), differentiable by autograd.

    `mix="detached"` stops the gradient at the weights of the branches.  `attend` of the package calls it for this
    kernel, outside of the operators; without dropout `dropout` is None.
    """
    q, k, v, spec = call.q, call.k, call.v, call.spec
    factors = _dropout_factors(dropout, spec.pattern, q)
    with torch.autocast(q.device.type, enabled=False):  # autocast would round the products
        rows = [
            _attend_sample(
                *(q[b], k[b], v[b], cuts),
                None if call.key_padding_mask is None else call.key_padding_mask[b],
                [x[b] for x in factors],
                spec,
                call.sinks,
            )
            for b, cuts in enumerate(document_cuts(call.documents, q.shape[0], q.shape[1]))
        ]
    out, lse = (torch.stack(parts) for parts in zip(*rows, strict=True))
    return out.to(q.dtype), lse.detach()


def _dropout_factors(dropout: Dropout | None, pattern: Pattern, q: Tensor) -> list[Tensor]:
    """Return the dropout mask of each branch, (B, H, N, N): 0 or 1 / (1 - p).  It is an empty list without dropout."""
    if dropout is None:
        return []
    rows, tokens, heads = (torch.arange(n, device=q.device) for n in q.shape[:3])
    factors = []
    for i in range(len(pattern.branches)):
        words = dropout.query_words(rows, tokens, heads, 0 if pattern.multiplicity == "set" else i)
        keeps = dropout.keep_bits(words.transpose(1, 2)[..., None], dropout.key_words(tokens))
        factors.append((keeps != 0).to(torch.promote_types(q.dtype, torch.float32)) / (1 - dropout.probability))
    return factors


def _attend_sample(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cuts: tuple[int, ...],
    padding: Tensor | None,
    factors: list[Tensor],
    spec: AttentionSpec,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return out (N, H, Dv) and lse (H, N) of one sample with the documents `cuts`.

    Shapes: q is (N, H, D), k and v are (N, Hkv, D), padding is (N,), and each of `factors` is (H, N, N).
    """
    _, heads, _ = q.shape
    kv_heads = k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(wide).repeat_interleave(heads // x.shape[1], dim=1) for x in (q, k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * spec.scale_of(q.shape[2])
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    lengths = torch.tensor(cuts, device=q.device).diff()
    document = torch.arange(len(lengths), device=q.device).repeat_interleave(lengths)
    index = torch.cat([torch.arange(n, device=q.device) for n in lengths.tolist()])
    masks = [mask.repeat_interleave(heads // kv_heads, dim=0) for mask in spec.pattern.visible(index, kv_heads)]
    masks = [mask & (document[:, None] == document) for mask in masks]
    if padding is not None:
        masks = [mask & ~padding for mask in masks]
    # A softmax for each branch, merged below by the branches' lse.  A row that sees no key would be NaN: its scores are
    # set to 0 here, and its weights and its lse to those of no key afterwards.
    outs, lses = [], []
    for i, (branch, mask) in enumerate(zip(spec.pattern.ordered(), masks, strict=True)):
        visible, has_keys = scores.masked_fill(~mask, -inf), mask.any(-1, keepdim=True)
        if branch.has_null_keys:  # one more column, which has no value
            counts = branch.null_keys(index, lengths[document], kv_heads).repeat_interleave(heads // kv_heads, dim=0)
            visible = torch.cat((visible, counts.to(wide).log()[..., None]), -1)
            has_keys = has_keys | (counts > 0)[..., None]
        visible = visible.masked_fill(~has_keys, 0)
        weights = visible.softmax(-1)[..., : len(index)].masked_fill(~mask, 0)
        if factors:
            weights = weights * factors[i]
        outs.append(torch.einsum("hij,jhd->ihd", weights, v))
        lses.append(visible.logsumexp(-1).masked_fill(~has_keys.squeeze(-1), -inf))
    logits = lses if sinks is None else [*lses, sinks.to(wide)[:, None].expand_as(lses[0])]
    lse = torch.stack(logits).logsumexp(0)
    finite = lse.masked_fill(lse == -inf, 0)  # -inf - -inf is NaN
    shares = [(branch_lse - finite).exp() for branch_lse in lses]
    if spec.mix == "detached":
        shares = [share.detach() for share in shares]
    out = torch.stack([share.T[..., None] * x for share, x in zip(shares, outs, strict=True)]).sum(0)
    return out, lse
