"""Blocks computed by flash attention's operators, whether torch's own or those of the flash-attn package."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Protocol

import torch

from lightning_longnet.attention.kernels.rows import as_aligned, over_batches
from lightning_longnet.attention.kernels.windows import Window, windows

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.attention.kernels import Request
    from lightning_longnet.attention.kernels.call import Call

HALF = (torch.bfloat16, torch.float16)
WIDEST = 256


class Operator(Protocol):
    """Flash attention with a window, of tensors (batch, rows, heads, D); k and v may have fewer heads.

    `Package` is one, of the package flash-attn, and sdpa/flash.py has torch's own.  The lse is (batch, heads, rows) in
    float32.  `left` and `right` are those of `Window`.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, right: int) -> tuple[Tensor, Tensor]:
        """Return out and lse of one window; the function `forward` calls it."""

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
        left: int,
        right: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk and dv of one window, from the out and lse of the whole softmax.

        The function `backward` calls it.
        """


def refusals(request: Request) -> list[str]:
    """Return the reasons why no build of flash attention can compute a call.

    The kernels "flash" and "hub" (`package_refusals`), "flash3", "flash4" and "cudnn" add their own reasons, and so
    does torch's operator for CUDA (sdpa/flash.py).
    """
    reasons = []
    if request.dtype not in HALF:
        reasons.append(f"serves bfloat16 and float16, q is {request.dtype}")
    if request.head_dim % 8 or request.head_dim > WIDEST:
        reasons.append(f"needs a head_dim that 8 divides, {WIDEST} at most, got {request.head_dim}")
    if request.value_dim != request.head_dim:
        reasons.append(f"needs v as wide as q and k, got {request.value_dim} and {request.head_dim}")
    if request.capability is not None and request.capability < (8, 0):
        reasons.append("needs compute capability 8.0, got {}.{}".format(*request.capability))
    return reasons


def forward(operator: Operator, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Return out (batch, heads, rows, D) and lse (batch, heads, rows) of one block, computed by `operator`.

    The kernels of flash attention call it with their operator: flash, hub and torch's own.  A block is one window or a
    few, and their results together are those of the block.
    """
    q, k, v = (as_aligned(x.transpose(1, 2)) for x in (q, k, v))

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return out and lse of as many batches as one launch takes; `over_batches` calls it."""
        parts = _windows(q, k, call)
        if _has_all_rows(parts, q):
            window = parts[0]
            return operator.forward(q, k[:, window.keys], v[:, window.keys], call.scale, window.left, window.right)
        # rows that see no key are in no window and keep 0 and -inf; the operators would give them an lse of +inf
        out, lse = torch.zeros_like(q), q.new_full((len(q), q.shape[2], q.shape[1]), -inf, dtype=torch.float32)
        for rows, keys, left, right in parts:
            out[:, rows], lse[..., rows] = operator.forward(q[:, rows], k[:, keys], v[:, keys], call.scale, left, right)
        return out, lse

    out, lse = over_batches(run, q, k, v)
    return out.transpose(1, 2), lse


def backward(
    operator: Operator, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv of one block from the `out` and `lse` of the whole softmax; see `BlockKernel`.

    A query that sees no key in the whole softmax has lse = +inf, as the operators write it themselves: their `exp2(S
    log2(e) - lse log2(e))` is then 0 for every score S, also for -inf.  The kernels of flash attention call it with
    their operator, as `forward`.
    """
    grad, q, k, v, out = (as_aligned(x.to(q.dtype).transpose(1, 2)) for x in (grad, q, k, v, out))

    def run(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk and dv of as many batches as one launch takes; `over_batches` calls it."""
        parts = _windows(q, k, call)
        if _has_all_rows(parts, q) and parts[0].keys == slice(0, k.shape[1]):
            _, _, left, right = parts[0]
            return operator.backward(grad, q, k, v, out, lse.contiguous(), call.scale, left, right)
        # a key may be in several windows, so its gradients are summed in float32
        dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
        for rows, keys, left, right in parts:
            operands = grad[:, rows], q[:, rows], k[:, keys], v[:, keys], out[:, rows], lse[..., rows].contiguous()
            dq[:, rows], more_k, more_v = operator.backward(*operands, call.scale, left, right)
            dk[:, keys] += more_k
            dv[:, keys] += more_v
        return dq, dk, dv

    gradients = over_batches(run, grad, q, k, v, out, lse)
    dq, dk, dv = (x.transpose(1, 2) for x in gradients)
    return dq, dk, dv


def _windows(q: Tensor, k: Tensor, call: Call) -> tuple[Window, ...]:
    """Return the windows of a block, for q and k (batch, rows, heads, D)."""
    assert call.key_padding_mask is None and call.dropout_mask is None, "refused before, or served by another"  # noqa: PT018
    assert not call.block.repeats, "flash attention takes no weights"
    return windows(q.shape[1], k.shape[1], call.block.low, call.block.high)


def _has_all_rows(parts: tuple[Window, ...], q: Tensor) -> bool:
    """Return whether one window holds every query, so that its result needs no copy."""
    return len(parts) == 1 and parts[0].queries == slice(0, q.shape[1])
