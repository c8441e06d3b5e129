"""The local attention under two names, `lightning_longnet::attend` and `attend_backward`.

Selective checkpointing and torch.compile see these operators and nothing of what is in them; a pattern travels through
their schema as text.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lightning_longnet.attention.kernels import BLOCK_KERNELS
from lightning_longnet.attention.kernels.blocks import Terms
from lightning_longnet.attention.kernels.dropout import Dropout
from lightning_longnet.attention.parallel import local
from lightning_longnet.attention.pattern.pattern import Pattern
from lightning_longnet.attention.plan.blocks import plan
from lightning_longnet.attention.plan.documents import document_cuts
from lightning_longnet.attention.plan.lattice import joined, readable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning_longnet.attention.kernels import BlockKernel
    from lightning_longnet.attention.plan.blocks import Plan


@torch.library.custom_op("lightning_longnet::attend", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor | None,
    hidden: Tensor | None,
    seed: Tensor | None,
    pattern: str,
    scale: float,
    dropout: float,
    first_sample: int,
    sample_step: int,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """The outputs out (B, N, H, Dv) and lse (B, H, N)."""
    if not q.numel():
        out, lse = _results_like(q, k, v)
        return out, lse
    serving = BLOCK_KERNELS[kernel]
    q, k, v = (readable(x) for x in (q, k, v))
    drops = _dropout(dropout, seed, first_sample, sample_step)
    with torch.autocast(q.device.type, enabled=False):  # which would round the products
        found = [
            local.forward(serving, planned, q[rows], k[rows], v[rows], terms)
            for rows, planned, terms in _parts(serving, q, k, documents, hidden, drops, pattern, scale)
        ]
    out, lse = joined(found)
    return out, lse


@forward.register_fake
def _results_like(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=wide)


@torch.library.custom_op("lightning_longnet::attend_backward", mutates_args=())
def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    documents: Tensor | None,
    hidden: Tensor | None,
    seed: Tensor | None,
    pattern: str,
    scale: float,
    dropout: float,
    first_sample: int,
    sample_step: int,
    kernel: str,
    mix: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients dq, dk, dv, for the incoming one of out."""
    if not q.numel():
        dq, dk, dv = _gradients_like(grad, q, k, v)
        return dq, dk, dv
    serving = BLOCK_KERNELS[kernel]
    grad, q, k, v, out = (readable(x) for x in (grad, q, k, v, out))
    drops = _dropout(dropout, seed, first_sample, sample_step)
    with torch.autocast(q.device.type, enabled=False):
        found = [
            local.backward(serving, planned, grad[rows], q[rows], k[rows], v[rows], out[rows], lse[rows], terms, mix)
            for rows, planned, terms in _parts(
                serving, q, k, documents, hidden, drops, pattern, scale, apart=mix == "detached"
            )
        ]
    dq, dk, dv = joined(found)
    return dq, dk, dv


@backward.register_fake
def _gradients_like(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


def _dropout(probability: float, seed: Tensor | None, first_sample: int, sample_step: int) -> Dropout | None:
    return None if seed is None else Dropout(probability, int(seed), first_sample, sample_step)


class _Part(NamedTuple):
    """Samples that follow one another with the same documents."""

    rows: slice
    plan: Plan
    terms: Terms


def _parts(
    kernel: BlockKernel,
    q: Tensor,
    k: Tensor,
    documents: Tensor | None,
    hidden: Tensor | None,
    drops: Dropout | None,
    pattern: str,
    scale: float,
    apart: bool = False,
) -> Iterator[_Part]:
    """With `apart` each branch is computed on its own, and no pair once for several."""
    if hidden is not None and hidden.device.type == "cpu" and not hidden.any():
        hidden = None
    # the copies of a pair in several branches are dropped one by one
    apart = apart or not kernel.takes_weights(q) or drops is not None
    first = 0
    for cuts, group in groupby(document_cuts(documents, q.shape[0], q.shape[1])):
        last = first + len(list(group))
        rows = slice(first, last)
        distinct = 0 if apart else -(-torch.get_num_threads() // (last - first))
        planned = plan(Pattern.loads(pattern), q.shape[2], k.shape[2], cuts, distinct)
        terms = Terms(
            scale,
            None if hidden is None else hidden[rows],
            drops,
            rows=torch.arange(first, last, device=q.device),
            tokens=torch.arange(q.shape[1], device=q.device),
            counts_once=planned.counts_once,
        )
        yield _Part(rows, planned, terms)
        first = last
