"""No exchange: every key is here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightning_longnet.attention.kernels.blocks import (
    empty_partial,
    merge,
    no_keys,
    readable_lse,
    rounded,
    spread,
)
from lightning_longnet.attention.kernels.keys import OwnKeys
from lightning_longnet.attention.parallel.routes import Part

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.attention.kernels import BlockKernel
    from lightning_longnet.attention.kernels.blocks import Terms
    from lightning_longnet.attention.kernels.partial import Partial
    from lightning_longnet.attention.plan.blocks import Plan


def forward(kernel: BlockKernel, plan: Plan, q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> Partial:
    """The whole attention of q (B, N, H, D), with lse (B, H, N)."""
    stores = plan.queries_once and terms.hidden is None  # calls that see nothing are left out
    total = empty_partial(q, v) if stores else no_keys(q, v)
    keys = OwnKeys(k, v, terms.hidden, terms.key_words())
    for branch in range(len(plan.branches)):
        merge(kernel, _parts(plan, branch), q, keys, terms, [total], stores)
    return rounded(total, q)


def backward(
    kernel: BlockKernel,
    plan: Plan,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    terms: Terms,
    mix: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv.  For "detached" a branch's own out is computed again."""
    wide = torch.promote_types(q.dtype, torch.float32)
    stores, stores_keys = (once and terms.hidden is None for once in (plan.queries_once, plan.is_partitioned))
    dq, dk, dv = (
        (torch.empty_like if stored else torch.zeros_like)(x, dtype=wide, memory_format=torch.contiguous_format)
        for x, stored in ((q, stores), (k, stores_keys), (v, stores_keys))
    )
    keys = OwnKeys(k, v, terms.hidden, terms.key_words(), (dk, dv))
    lse = readable_lse(lse)
    for branch in range(len(plan.branches)):
        if mix == "detached":
            own = no_keys(q, v)
            merge(kernel, _parts(plan, branch), q, keys, terms, [own])
            out = own.out
        spread(kernel, _parts(plan, branch), grad, q, keys, [out], lse, terms, dq, stores, stores_keys)
    wide_grads = [dq, dk, dv]
    del dq, dk, dv, keys  # so that each is let go as soon as it is rounded
    dq, dk, dv = (wide_grads.pop(0).to(q.dtype) for _ in range(3))
    return dq, dk, dv


def _parts(plan: Plan, branch: int) -> list[Part]:
    return [Part(branch, block) for block in plan.calls[branch]]
