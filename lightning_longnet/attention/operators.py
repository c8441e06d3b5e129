"""The local attention under two names, `lightning_longnet::attend` and `attend_backward`.

Selective checkpointing and torch.compile see these operators and nothing of what is in them; a pattern travels through
their schema as text.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_longnet.attention.documents import document_cuts
from lightning_longnet.attention.exchange import local
from lightning_longnet.attention.kernels import BLOCK_KERNELS
from lightning_longnet.attention.pattern import Pattern
from lightning_longnet.attention.plan import plan

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lightning_longnet.attention.plan import Plan


@torch.library.custom_op("lightning_longnet::attend", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, pattern: str, scale: float, kernel: str
) -> tuple[Tensor, Tensor]:
    """The outputs out (B, N, H, Dv) and lse (B, H, N)."""
    q, k, v = (_readable(x) for x in (q, k, v))
    found = [
        local.forward(BLOCK_KERNELS[kernel], planned, q[rows], k[rows], v[rows], scale)
        for rows, planned in _row_plans(q, k, documents, pattern)
    ]
    out, lse = _joined(found) if found else _results_like(q, k, v, documents, pattern, scale, kernel)
    return out, lse


@forward.register_fake
def _results_like(
    q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, pattern: str, scale: float, kernel: str
) -> tuple[Tensor, Tensor]:
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
    pattern: str,
    scale: float,
    mix: str,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients dq, dk, dv, for the incoming one of out."""
    grad, q, k, v, out = (_readable(x) for x in (grad, q, k, v, out))
    found = [
        local.backward(
            BLOCK_KERNELS[kernel], planned, grad[rows], q[rows], k[rows], v[rows], out[rows], lse[rows], scale, mix
        )
        for rows, planned in _row_plans(q, k, documents, pattern, mix)
    ]
    dq, dk, dv = _joined(found) if found else _gradients_like(grad, q, k, v)
    return dq, dk, dv


@backward.register_fake
def _gradients_like(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


def _row_plans(
    q: Tensor, k: Tensor, documents: Tensor | None, pattern: str, mix: str = "exact"
) -> Iterator[tuple[slice, Plan]]:
    """Samples that follow one another with the same documents, and their plan."""
    first = 0
    for cuts, group in groupby(document_cuts(documents, q.shape[0], q.shape[1]) if q.numel() else ()):
        last = first + len(list(group))
        distinct = -(-torch.get_num_threads() // (last - first)) if mix == "exact" else 0
        yield slice(first, last), plan(Pattern.loads(pattern), q.shape[2], k.shape[2], cuts, distinct)
        first = last


def _joined(found: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The samples' results side by side."""
    return found[0] if len(found) == 1 else tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def _readable(x: Tensor) -> Tensor:
    """As kernels read it: stride 1 in the last dimension (a gradient of sum() has 0), and no vector across another."""
    crossed = any(0 < stride < x.shape[-1] for stride, size in zip(x.stride()[:-1], x.shape, strict=False) if size > 1)
    return x.contiguous() if crossed or x.stride(-1) != 1 else x
