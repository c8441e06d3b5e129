"""torch's memory-efficient attention: for float32, and for the blocks that flash attention cannot compute."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from lightning_longnet.attention.kernels.call import band_bias, log_weights
from lightning_longnet.attention.kernels.rows import BATCHES, VECTOR, as_aligned, over_batches, repeat_heads, sum_groups

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.attention.kernels import Request
    from lightning_longnet.attention.kernels.call import Call

name = "memory-efficient"

_forward = torch.ops.aten._scaled_dot_product_efficient_attention.default
_backward = torch.ops.aten._scaled_dot_product_efficient_attention_backward.default
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LSE_ROWS = 32  # the operator pads its log-sum-exp to a multiple of this many rows
_BIAS_KEYS = 16  # the rows of a bias must lie a multiple of this many elements from one another
_BIAS = 2**26  # the most elements of a bias that differs between the batches


def refusals(request: Request) -> list[str]:
    """Return the reasons why the operator cannot compute a call; `cuda.refusals` returns these."""
    if request.dtype not in _DTYPES:
        return [f"serves float32, bfloat16 and float16, q is {request.dtype}"]
    width = VECTOR // request.dtype.itemsize
    if request.head_dim % width:
        return [f"needs a head_dim that {width} divides, got {request.head_dim}"]
    return []


def serves(q: Tensor, call: Call) -> bool:
    """Return whether the operator can compute a block: it can compute every one.  `cuda.forward` asks it last."""
    return True


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Return out (batch, heads, rows, Dv) and lse (batch, heads, rows) of one block; see `BlockKernel`.

    `cuda.forward` calls it for blocks that `flash.serves` refuses: in float32, with padding, with a head_dim that flash
    attention does not take, or on a GPU below compute capability 8.0.  They are blocks of the kernel "sdpa", or of
    others that leave them to it, such as padded ones of "cudnn".
    """
    heads, rows = q.shape[1:3]
    k, v = (_visible_keys(x, q, call) for x in (k, v))
    q, k, v = (as_aligned(repeat_heads(x, heads)) for x in (q, k, v))

    def run(q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return out and lse of as many batches as one launch takes; `over_batches` calls it."""
        bias = _bias(q, k, padding, call)
        out, lse, _, _ = _forward(q, k, v, bias, True, 0.0, _is_causal(call), scale=call.scale)
        return out, lse[..., :rows]

    padding = call.padding_bias(heads, q.dtype)
    out, lse = over_batches(run, q, k, v, _cut_padding(padding, k), limit=_limit(q, k, padding, call))
    empty = call.empty_rows(rows, heads)
    if empty is not None:  # the operator gives a row without keys an lse of 0
        out, lse = out.masked_fill(empty[..., None], 0), lse.masked_fill(empty, -inf)
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv of one block from the `out` and `lse` of the whole softmax; see `BlockKernel`.

    The operator itself pads its lse with +inf, as `BlockKernel` gives it for a query without keys: exp(S - lse) is 0.
    `cuda.backward` calls it for blocks that torch's flash attention does not serve.
    """
    heads, rows, key_heads, keys = *q.shape[1:3], *k.shape[1:3]
    k, v = (_visible_keys(x, q, call) for x in (k, v))
    grad, out = (x.to(q.dtype) for x in (grad, out))
    grad, q, k, v = (as_aligned(repeat_heads(x, heads)) for x in (grad, q, k, v))
    # the operator assumes that two rows of out lie heads * D elements from one another
    out = as_aligned(out.transpose(1, 2).contiguous()).transpose(1, 2)
    lse = F.pad(lse, (0, -rows % _LSE_ROWS), value=inf).contiguous()

    def batch_gradients(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, padding: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk and dv of as many batches as one launch takes; `over_batches` calls it."""
        bias = _bias(q, k, padding, call)
        seed = offset = torch.zeros((), dtype=torch.int64, device=q.device)
        needs_gradients = [True, True, True, False]  # of q, k, v and the bias
        dq, dk, dv, _ = _backward(
            grad, q, k, v, bias, out, lse, seed, offset, 0.0, needs_gradients, _is_causal(call), scale=call.scale
        )
        return dq, dk, dv

    padding = call.padding_bias(heads, q.dtype)
    limit = _limit(q, k, padding, call)
    dq, dk, dv = over_batches(batch_gradients, grad, q, k, v, out, lse, _cut_padding(padding, k), limit=limit)
    # keys that no query sees were cut off: their gradients are 0
    dk, dv = (F.pad(sum_groups(x, key_heads), (0, 0, 0, keys - x.shape[2])) for x in (dk, dv))
    return dq, dk, dv


def _is_causal(call: Call) -> bool:
    """Return whether the operator's own causal mask applies, which is aligned to the top left corner."""
    return call.block.low == 0 and call.block.high is None


def _visible_keys(x: Tensor, q: Tensor, call: Call) -> Tensor:
    """Return k or v without the keys that the causal mask excludes from every query, those behind the last one."""
    return x[:, :, : q.shape[2]] if _is_causal(call) else x


def _cut_padding(padding: Tensor | None, k: Tensor) -> Tensor | None:
    """Return the bias of the padding for the keys that `_visible_keys` leaves."""
    return None if padding is None else padding[..., : k.shape[2]]


def _is_banded(call: Call) -> bool:
    """Return whether a block's mask must be a bias."""
    return not _is_causal(call) and (call.block.low, call.block.high) != (None, None)


def _limit(q: Tensor, k: Tensor, padding: Tensor | None, call: Call) -> int:
    """Return the most batches (samples times segments) of one launch of the operator.

    They are fewer where each needs a separate bias (heads, queries, keys).  `forward` and `backward` ask.
    """
    if padding is None or not _is_banded(call):
        return BATCHES
    return min(BATCHES, max(1, _BIAS // (padding.shape[1] * q.shape[2] * k.shape[2])))


def _bias(q: Tensor, k: Tensor, padding: Tensor | None, call: Call) -> Tensor | None:
    """Return the bias that the operator adds to the scores, (batch, heads, queries, keys); None if there is none.

    `forward` and `backward` call it for the samples of each call of the operator.  It holds the mask of the block and
    `padding`, which is a bias too, or the weights of the block, which only tests give: no plan has any on CUDA.  Its
    stride is 0 along batches or heads that have the same bias.
    """
    assert call.dropout_mask is None, "refused before"
    block, bias = call.block, padding
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    if block.repeats:
        assert q.dtype == torch.float32, "a bias has the type of q, and the log of a weight must not be rounded"
        assert padding is None, "no plan gives weights to this operator, and padding besides"
        bias = log_weights(queries, keys, block.repeats, q.dtype, q.device)[None, None]
    elif _is_banded(call):
        mask = band_bias(queries, keys, block.low, block.high, q.dtype, q.device)[None, None]
        bias = mask if padding is None else mask + padding
    if bias is None:
        return None
    # padded with zeros, as torch does: the operator reads past the last key, and must find a number there
    aligned = bias.new_zeros((*bias.shape[:3], -(-keys // _BIAS_KEYS) * _BIAS_KEYS))
    aligned[..., :keys] = bias
    return aligned[..., :keys].expand(batch, heads, queries, keys)
