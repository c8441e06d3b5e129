"""cuDNN's attention, as torch calls it: blocks without a mask, and causal squares.

Other blocks of the same call run in the CUDA operators of "sdpa".
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from lightning_longnet.attention.kernels import fused
from lightning_longnet.attention.kernels.compiling import constant_result
from lightning_longnet.attention.kernels.rows import as_aligned, over_batches, repeat_heads, sum_groups
from lightning_longnet.attention.kernels.sdpa import cuda

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.attention.kernels import Request
    from lightning_longnet.attention.kernels.call import Call

name = "cudnn"
WIDEST = 128

_forward = torch.ops.aten._scaled_dot_product_cudnn_attention.default
_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default


def note(request: Request) -> str:
    """Return what this kernel runs for a call that it does not refuse.

    `judge` asks for it, and `explain` shows it in its table of kernels.
    """
    rest = "; all of this call's are padded, and go where sdpa sends them" if request.is_padded else ""
    return f"cuDNN's attention for blocks without windows{rest}; its speed has not been measured"


def refusals(request: Request) -> list[str]:
    """Return the reasons why cuDNN cannot compute a call; an empty list if it can.

    `select` asks for a call of `attend` that may run the kernel, and `judge` for `explain`, the guard's preflight and
    `longnet plan`.
    """
    if request.device != "cuda":
        return [f"serves CUDA tensors, these are on {request.device}"]
    reasons = fused.refusals(request)
    if request.head_dim > WIDEST:
        reasons.append(f"needs a head_dim of {WIDEST} at most, got {request.head_dim}")
    reasons += request.lacks("has_dropout", "masks_later", "has_softcap")
    reasons += _missing_reasons()
    return reasons


@constant_result
def _missing_reasons() -> tuple[str, ...]:
    """Return the reasons in torch's build and settings why cuDNN cannot be used.

    torch.compile traces the choice of a kernel; it takes this result for a constant, and guards the settings itself.
    """
    reasons = []
    if torch.are_deterministic_algorithms_enabled():
        reasons.append("has no deterministic backward, which torch.use_deterministic_algorithms asks for")
    if torch.version.hip is not None or not torch.backends.cudnn.is_available():
        reasons.append("this torch is built without cuDNN")
    return tuple(reasons)


def takes_weights(device: str) -> bool:
    """Return False: the kernel takes no weights of pairs (`Block.repeats`).

    So a plan computes a pair in each branch that shows it; `AttentionSpec.weighted_segments` asks before it is made.
    """
    return False


def serves(q: Tensor, k: Tensor, call: Call) -> bool:
    """Return whether cuDNN can compute a block: one without padding that is unmasked, or causal and square.

    cuDNN's causal mask is unambiguous only for a square block, where the top left and the bottom right alignment are
    the same.  Some releases of cuDNN refuse a single row.  `forward` and `backward` leave other blocks to the CUDA
    operators of "sdpa".
    """
    queries, keys, block = q.shape[2], k.shape[2], call.block
    is_plain = call.key_padding_mask is None and block.high is None and min(queries, keys) > 1
    return is_plain and (block.low is None or (block.low == 0 and queries == keys))


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Return out (batch, heads, queries, Dv) and lse (batch, heads, queries) of one block; see `BlockKernel`.

    Blocks that cuDNN does not serve go to the CUDA operators of "sdpa".  `forward_blocks` calls it for each block of a
    plan, through `_forward` of blocks.py.
    """
    if not serves(q, k, call):
        return cuda.forward(q, k, v, call)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return out and lse of as many batches as one launch takes; `over_batches` calls it."""
        # the positions are those of attn_bias, compute_log_sumexp, dropout_p, is_causal and return_debug_mask
        out, lse, *_ = _forward(q, k, v, None, True, 0.0, call.block.low == 0, False, scale=call.scale)
        return out, lse.reshape(q.shape[:3])  # some releases return (batch, heads, rows, 1)

    out, lse = over_batches(run, *(as_aligned(repeat_heads(x, q.shape[1])) for x in (q, k, v)))
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv of one block from the `out` and `lse` of the whole softmax; see `BlockKernel`.

    `_backward` of blocks.py calls it, or `_backward_steps` where nothing is masked.
    """
    if not serves(q, k, call):
        return cuda.backward(grad, q, k, v, out, lse, call)
    heads, key_heads = q.shape[1], k.shape[1]
    # out and its gradient get equal strides: some releases of cuDNN read one with the strides of the other
    grad, out = (x.to(q.dtype).clone(memory_format=torch.contiguous_format) for x in (grad, out))
    q, k, v = (as_aligned(repeat_heads(x, heads)) for x in (q, k, v))
    lse = lse.contiguous()
    lse = lse.unsqueeze(-1) if _lse_dims(q.device, q.dtype) == 4 else lse

    def run(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk and dv of as many batches as one launch takes; `over_batches` calls it."""
        # without dropout the state of the random generator is not read
        seed = offset = torch.zeros((), dtype=torch.int64, device=q.device)
        lengths = None, None, q.shape[2], k.shape[2]
        dq, dk, dv = _backward(
            grad, q, k, v, out, lse, seed, offset, None, *lengths, 0.0, call.block.low == 0, scale=call.scale
        )
        return dq, dk, dv

    dq, dk, dv = over_batches(run, grad, q, k, v, out, lse)
    return dq, sum_groups(dk, key_heads), sum_groups(dv, key_heads)


@lru_cache(4)
def _lse_dims(device: torch.device, dtype: torch.dtype) -> int:
    """Return the number of dimensions of the log-sum-exp, which the backward takes in the same form.

    Releases of torch differ in whether it ends in a dimension of 1.
    """
    x = torch.zeros(1, 1, 64, 64, device=device, dtype=dtype)
    lse: Tensor = _forward(x, x, x, None, True, 0.0, False, False, scale=1.0)[1]
    return lse.dim()
