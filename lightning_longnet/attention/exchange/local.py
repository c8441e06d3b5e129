"""No exchange: every key is here.  Runs a plan's blocks through a kernel and merges what they give."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

import torch

from lightning_longnet.attention.partial import Partial

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lightning_longnet.attention.kernels import BlockKernel
    from lightning_longnet.attention.lattice import Lattice
    from lightning_longnet.attention.plan import Block, Plan

# A call touches about this share of all rows: what a kernel returns is held beside the accumulators until merged
CALL_SHARE = 1 / 8


def forward(kernel: BlockKernel, plan: Plan, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Partial:
    """The whole attention of q (B, N, H, D), with lse (B, H, N)."""
    total = _empty_partial(q, v) if plan.is_partitioned else _no_keys(q, v)
    for i, blocks in enumerate(plan.branches):
        _merge_branch(kernel, blocks, q, k, v, scale, total, stores=i == 0 and plan.is_partitioned)
    return Partial(total.out.to(q.dtype), total.lse.squeeze(-1).transpose(1, 2).contiguous())


def backward(
    kernel: BlockKernel,
    plan: Plan,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    mix: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv: each block's own backward, given the lse of the one softmax that it is a part of.

    With `P = exp(S - lse)` the exact gradient of the scores is `P (g.v - g.out)`.  "detached" stops it at the branches'
    weights, which leaves `P (g.v - g.out_b)` with the branch's own out, computed again here.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    create = torch.empty_like if plan.is_partitioned else torch.zeros_like
    dq, dk, dv = (create(x, dtype=wide, memory_format=torch.contiguous_format) for x in (q, k, v))
    lse = lse.transpose(1, 2).unsqueeze(-1)  # finite wherever it is read: each query of a block sees a key of it
    for i, blocks in enumerate(plan.branches):
        if mix == "detached":
            own = _no_keys(q, v)
            _merge_branch(kernel, blocks, q, k, v, scale, own, stores=False)
            out = own.out
        stores = i == 0 and plan.is_partitioned
        for block, queries, keys in _calls(blocks, q):
            found = kernel.backward(
                _folded(queries, grad),
                _folded(queries, q),
                _folded(keys, k),
                _folded(keys, v),
                _folded(queries, out),
                _folded(queries, lse).squeeze(-1),
                block,
                scale,
            )
            for at, into, part in zip((queries, keys, keys), (dq, dk, dv), found, strict=True):
                _accumulate(at, into, part, block.weight, stores)
            del found, part  # before the next call makes its own
    wide_grads = [dq, dk, dv]
    del dq, dk, dv  # so that each is let go as soon as it is rounded
    dq, dk, dv = (wide_grads.pop(0).to(q.dtype) for _ in range(3))
    return dq, dk, dv


def _merge_branch(
    kernel: BlockKernel,
    blocks: tuple[Block, ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    into: Partial,
    stores: bool,
) -> None:
    for block, queries, keys in _calls(blocks, q):
        out, lse = kernel.forward(_folded(queries, q), _folded(keys, k), _folded(keys, v), block, scale)
        found = Partial(_unfolded(queries, out, q.shape[0]), _unfolded(queries, lse.unsqueeze(-1), q.shape[0]))
        if stores:
            queries.write(into.out, found.out)
            queries.write(into.lse, found.lse)
        else:
            here = Partial(queries.read(into.out), queries.read(into.lse))
            here.add_(*found, block.weight)
            if not queries.is_view:
                queries.write(into.out, here.out)
                queries.write(into.lse, here.lse)
        del out, lse, found  # before the next call makes its own


def _accumulate(at: Lattice, into: Tensor, part: Tensor, weight: int, stores: bool) -> None:
    part = _unfolded(at, part, into.shape[0])
    if stores:
        at.write(into, part)
    elif at.is_view:
        at.read(into).add_(part, alpha=weight)
    else:
        at.write(into, at.read(into).add_(part, alpha=weight))


def _calls(blocks: tuple[Block, ...], q: Tensor) -> Iterator[tuple[Block, Lattice, Lattice]]:
    """Blocks cut into calls of bounded size: by segments, and a large segment by heads."""
    limit = q.shape[1] * q.shape[2] * CALL_SHARE
    for block in blocks:
        queries, keys = block.queries, block.keys
        count, group = len(queries.starts), queries.heads // keys.heads
        segments, heads = max(1, int(limit // (queries.rows * queries.heads))), keys.heads
        if queries.rows * queries.heads > limit:
            # fewer heads than threads would leave some idle: the operator's backward runs in parallel over heads
            heads = max(int(limit // (queries.rows * group)), -(-torch.get_num_threads() // group))
        for s in range(0, count, segments):
            for a in range(0, keys.heads, heads):
                b = min(a + heads, keys.heads)
                yield (
                    block,
                    queries.segments(s, s + segments).diagonal(a * group, b * group),
                    keys.segments(s, s + segments).diagonal(a, b),
                )


def _folded(at: Lattice, t: Tensor) -> Tensor:
    """(B, N, H, D) -> (B * segments, heads, rows, D); a copy only where samples and segments have no common stride."""
    return at.read(t).flatten(0, 1)


def _unfolded(at: Lattice, t: Tensor, batch: int) -> Tensor:
    unfolded: Tensor = t.unflatten(0, (batch, len(at.starts)))
    return unfolded


def _empty_partial(q: Tensor, v: Tensor) -> Partial:
    wide = torch.promote_types(q.dtype, torch.float32)
    return Partial(q.new_empty((*q.shape[:3], v.shape[3]), dtype=wide), q.new_empty((*q.shape[:3], 1), dtype=wide))


def _no_keys(q: Tensor, v: Tensor) -> Partial:
    partial = _empty_partial(q, v)
    partial.out.zero_()
    partial.lse.fill_(-inf)
    return partial
