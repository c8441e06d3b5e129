"""torch's copy of flash attention, called below its public operator, which has no windows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightning_longnet.attention.kernels import fused

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.attention.kernels import Request
    from lightning_longnet.attention.kernels.call import Call

name = "flash"

# `_scaled_dot_product_flash_attention` calls these operators, but has no argument for windows
_forward = torch.ops.aten._flash_attention_forward.default
_backward = torch.ops.aten._flash_attention_backward.default


def refusals(request: Request) -> list[str]:
    """Return the reasons why the operator cannot compute any block of a call; `cuda.note` then leaves it out."""
    return fused.refusals(request) + (["takes no padding masks"] if request.is_padded else [])


def serves(q: Tensor, call: Call) -> bool:
    """Return whether the operator can compute a block; `cuda.forward` and `cuda.backward` ask."""
    return (
        q.dtype in fused.HALF
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= fused.WIDEST
        and call.key_padding_mask is None
        and not call.block.repeats
        and _capability(q.device) >= (8, 0)
    )


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Return out (batch, heads, rows, Dv) and lse (batch, heads, rows) of one block; see `BlockKernel`.

    `cuda.forward` calls it for blocks that `serves` accepts.  "flash3" and "flash4" call it without asking `serves`,
    while their implementation stands behind torch's flash operators.
    """
    return fused.forward(_operator, q, k, v, call)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv of one block from the `out` and `lse` of the whole softmax; see `BlockKernel`.

    `cuda.backward` calls it for blocks that `serves` accepts.  "flash3" and "flash4" call it without asking `serves`,
    while their implementation stands behind torch's flash operators.
    """
    return fused.backward(_operator, grad, q, k, v, out, lse, call)


def _capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a CUDA device, (major, minor)."""
    return torch.cuda.get_device_capability(device)


class _Operator:
    """torch's operators with the signatures of `fused.Operator`."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, right: int) -> tuple[Tensor, Tensor]:
        """Return out and lse of one `Window`, whose bounds are `left` and `right`; `fused.forward` calls it."""
        out, lse, _, _, _ = _forward(
            q,
            k,
            v,
            None,
            None,
            q.shape[1],
            k.shape[1],
            0.0,
            (left, right) == (-1, 0),
            False,
            scale=scale,
            window_size_left=left,
            window_size_right=right,
        )
        return out, lse

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
        """Return dq, dk and dv of one `Window`, whose bounds are `left` and `right`; `fused.backward` calls it."""
        dq, dk, dv = _backward(
            grad,
            q,
            k,
            v,
            out,
            lse,
            None,  # the documents of packed queries and of packed keys, which a block has not
            None,
            q.shape[1],
            k.shape[1],
            0.0,  # the probability of dropout
            (left, right) == (-1, 0),  # whether the mask is causal
            *_no_random_state(q),
            scale=scale,
            window_size_left=left,
            window_size_right=right,
        )
        return dq, dk, dv


def _no_random_state(q: Tensor) -> tuple[Tensor, Tensor]:
    """Return the random state that the backward takes where nothing is dropped, as torch's own attention passes it."""
    return torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)


_operator = _Operator()
