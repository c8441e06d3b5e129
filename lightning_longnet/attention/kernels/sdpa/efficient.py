"""torch's memory-efficient attention: float32, and every block that flash attention does not take."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from lightning_longnet.attention.kernels.call import band, weights
from lightning_longnet.attention.kernels.rows import BATCHES, VECTOR, loadable, over_batches, repeated, summed

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.attention.kernels import Request
    from lightning_longnet.attention.kernels.call import Call

name = "memory-efficient"

_forward = torch.ops.aten._scaled_dot_product_efficient_attention.default
_backward = torch.ops.aten._scaled_dot_product_efficient_attention_backward.default
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LSE_ROWS = 32  # the operator's log-sum-exp has a multiple of these
_BIAS_KEYS = 16  # a bias must lie in rows of a multiple of these
_BIAS = 2**26  # elements of a bias that is another for each batch


def refusals(request: Request) -> list[str]:
    if request.dtype not in _DTYPES:
        return [f"serves float32, bfloat16 and float16, q is {request.dtype}"]
    width = VECTOR // request.dtype.itemsize
    if request.head_dim % width:
        return [f"needs a head_dim that {width} divides, got {request.head_dim}"]
    return []


def serves(q: Tensor, call: Call) -> bool:
    return True


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    heads, rows = q.shape[1:3]
    k, v = (_seen(x, q, call) for x in (k, v))
    q, k, v = (loadable(repeated(x, heads)) for x in (q, k, v))

    def run(q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        bias = _bias(q, k, padding, call)
        out, lse, _, _ = _forward(q, k, v, bias, True, 0.0, _is_causal(call), scale=call.scale)
        return out, lse[..., :rows]

    padding = call.padding_bias(heads, q.dtype)
    out, lse = over_batches(run, q, k, v, _cut(padding, k), limit=_limit(q, k, padding, call))
    empty = call.empty_rows(rows, heads)
    if empty is not None:  # the operator gives such a row an lse of 0
        out, lse = out.masked_fill(empty[..., None], 0), lse.masked_fill(empty, -inf)
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """A row that sees nothing at all has `lse = +inf`, which makes `exp(S - lse)` 0; so the operator fills its own."""
    heads, rows, key_heads, keys = *q.shape[1:3], *k.shape[1:3]
    k, v = (_seen(x, q, call) for x in (k, v))
    grad, out = (x.to(q.dtype) for x in (grad, out))
    grad, q, k, v = (loadable(repeated(x, heads)) for x in (grad, q, k, v))
    # the operator takes the stride between two rows of out for heads * D
    out = loadable(out.transpose(1, 2).contiguous()).transpose(1, 2)
    lse = F.pad(lse, (0, -rows % _LSE_ROWS), value=inf).contiguous()

    def run(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, padding: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        bias = _bias(q, k, padding, call)
        seed = offset = torch.zeros((), dtype=torch.int64, device=q.device)
        wanted = [True, True, True, False]
        dq, dk, dv, _ = _backward(
            grad, q, k, v, bias, out, lse, seed, offset, 0.0, wanted, _is_causal(call), scale=call.scale
        )
        return dq, dk, dv

    padding = call.padding_bias(heads, q.dtype)
    limit = _limit(q, k, padding, call)
    dq, dk, dv = over_batches(run, grad, q, k, v, out, lse, _cut(padding, k), limit=limit)
    dk, dv = (F.pad(summed(x, key_heads), (0, 0, 0, keys - x.shape[2])) for x in (dk, dv))
    return dq, dk, dv


def _is_causal(call: Call) -> bool:
    """The operator's own triangle is aligned to the top left corner."""
    return call.block.low == 0 and call.block.high is None


def _seen(x: Tensor, q: Tensor, call: Call) -> Tensor:
    """Without the keys that lie behind the last query."""
    return x[:, :, : q.shape[2]] if _is_causal(call) else x


def _cut(padding: Tensor | None, k: Tensor) -> Tensor | None:
    return None if padding is None else padding[..., : k.shape[2]]


def _is_banded(call: Call) -> bool:
    return not _is_causal(call) and (call.block.low, call.block.high) != (None, None)


def _limit(q: Tensor, k: Tensor, padding: Tensor | None, call: Call) -> int:
    if padding is None or not _is_banded(call):
        return BATCHES
    return min(BATCHES, max(1, _BIAS // (padding.shape[1] * q.shape[2] * k.shape[2])))


def _bias(q: Tensor, k: Tensor, padding: Tensor | None, call: Call) -> Tensor | None:
    """What is added to the scores, (batch, heads, queries, keys), with strides of 0 where it is the same for all."""
    assert call.dropout_mask is None, "refused before"
    block, bias = call.block, padding
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    if block.repeats:
        assert q.dtype == torch.float32, "a bias has the type of q, and the log of a weight must not be rounded"
        assert padding is None, "no plan gives weights to this operator, and padding besides"
        bias = weights(queries, keys, block.repeats, q.dtype, q.device)[None, None]
    elif _is_banded(call):
        seen = band(queries, keys, block.low, block.high, q.dtype, q.device)[None, None]
        bias = seen if padding is None else seen + padding
    if bias is None:
        return None
    # zeros, as torch pads: what lies behind the last key is read, and must be a number
    aligned = bias.new_zeros((*bias.shape[:3], -(-keys // _BIAS_KEYS) * _BIAS_KEYS))
    aligned[..., :keys] = bias
    return aligned[..., :keys].expand(batch, heads, queries, keys)
