"""One operator of attention by itself, and torchscale's scheme on it: a call for each branch, and a merge."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from lightning_longnet.attention.kernels import BLOCK_KERNELS
from lightning_longnet.attention.kernels.call import Call
from lightning_longnet.attention.plan.block import Block
from lightning_longnet.attention.plan.lattice import Lattice

if TYPE_CHECKING:
    from collections.abc import Sequence

    import peers
    from torch import Tensor

_ROWS = Lattice(range(1), rows=1, step=1, head=0, heads=1)  # kernels are given rows, and do not look at these


class _Causal(torch.autograd.Function):
    """Causal attention of whole rows (batch, rows, heads, D) by the operators of a kernel; lse has no gradient."""

    @staticmethod
    def forward(ctx: Any, name: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        call = Call(Block(_ROWS, _ROWS, low=0), q.shape[3] ** -0.5)
        kernel: Any = BLOCK_KERNELS[name]  # one of those that compute a block
        out, lse = kernel.forward(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), call)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.name, ctx.call = name, call
        ctx.mark_non_differentiable(lse)
        return out.transpose(1, 2), lse

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        grad, q, k, v = (x.transpose(1, 2) for x in (grads[0], q, k, v))
        kernel: Any = BLOCK_KERNELS[ctx.name]
        found = kernel.backward(grad, q, k, v, out, lse, ctx.call)
        return None, *(x.transpose(1, 2) for x in found)


def _causal(name: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    results: tuple[Tensor, Tensor] = _Causal.apply(name, q, k, v)  # type: ignore[no-untyped-call]
    return results


def dense(name: str) -> peers.Call:
    """Return dense causal attention by the operators of the kernel `name`, and nothing around them."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _causal(name, q, k, v)[0]

    return call


def torchscale(name: str, segment_lengths: Sequence[int], dilation_rates: Sequence[int]) -> peers.Call:
    """Return causal dilated attention by torchscale's scheme, whose calls run in the operators of the kernel `name`.

    Each branch copies its rows, runs one call and writes the result into rows of the whole length; the branches are
    merged by the softmax of their lse, through which no gradient flows.
    """

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs, lses = [], []
        for length, rate in zip(segment_lengths, dilation_rates, strict=True):
            rows = [_copied(x, min(length, x.shape[1]), rate) for x in (q, k, v)]
            out, lse = _causal(name, *rows)
            outs.append(_written(out, q, length, rate, 0.0))
            lses.append(_written(lse.transpose(1, 2).unsqueeze(-1), q, length, rate, -inf))
        weights = torch.stack(lses).softmax(0).to(q.dtype)
        mixed: Tensor = sum(out * weight for out, weight in zip(outs, weights, strict=True))
        return mixed

    return call


def _copied(x: Tensor, length: int, rate: int) -> Tensor:
    """Return the rows of a branch, (batch x segments, rows, heads, D): heads in groups begin at rows of their own."""
    heads = x.shape[2]
    x = F.pad(x, (0, 0, 0, -heads % rate, 0, -x.shape[1] % length)).unflatten(1, (-1, length)).flatten(0, 1)
    x = F.pad(x, (0, 0, 0, 0, 0, -length % rate))
    grid = x.unflatten(1, (-1, rate)).unflatten(3, (rate, -1))  # (segments, rows, offsets, groups, heads, D)
    rows: Tensor = grid.diagonal(dim1=2, dim2=3).movedim(-1, 2).flatten(2, 3)[:, :, :heads].contiguous()
    return rows


def _written(rows: Tensor, q: Tensor, length: int, rate: int, empty: float) -> Tensor:
    """Return the rows of a branch in their places of the whole sequence, with `empty` in all others."""
    batch, tokens, heads, _ = q.shape
    length = min(length, tokens)
    rows = F.pad(rows, (0, 0, 0, -heads % rate), value=empty)
    groups = rows.unflatten(2, (rate, -1)).movedim(2, -1)
    whole = rows.new_full((*rows.shape[:2], rate, rate, *groups.shape[2:4]), empty)
    whole.diagonal(dim1=2, dim2=3).copy_(groups)
    segments = whole.flatten(3, 4).flatten(1, 2)[:, :length]
    written: Tensor = segments.unflatten(0, (batch, -1)).flatten(1, 2)[:, :tokens, :heads]
    return written
