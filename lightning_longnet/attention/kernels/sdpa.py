"""torch's own flash attention, which returns the log-sum-exp and whose backward takes it.

The pitfalls of the CPU operator, each held by a test: an empty dimension kills the process; a last stride other than 1
is misread in silence; boolean masks are refused; out and v must have the width of q and k.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lightning_longnet.attention.kernels import Request

name = "sdpa"
note = "torch's flash attention for CPU; half types are computed in float32"

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def refusals(request: Request) -> list[str]:
    reasons = []
    if request.device != "cpu":
        reasons.append(f"serves CPU tensors, q is on {request.device}")
    if request.dtype not in _DTYPES:
        reasons.append(f"serves float64, float32, bfloat16 and float16, q is {request.dtype}")
    if request.value_dim != request.head_dim:
        reasons.append(f"needs v as wide as q and k, got {request.value_dim} and {request.head_dim}")
    return reasons


def forward(q: Tensor, k: Tensor, v: Tensor, low: int | None, high: int | None, scale: float) -> tuple[Tensor, Tensor]:
    """(batch, heads, rows, D) -> out, lse (batch, heads, rows); k and v may have fewer heads."""
    q, k, v = (_wide(x) for x in (q, k, v))
    is_causal, mask = _visibility(q, k, low, high)
    with routed_products():
        out, lse = _forward(q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale)
    return out, lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    low: int | None,
    high: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of one block of a larger softmax, whose `out` and `lse` are given."""
    grad, q, k, v, out = (_wide(x) for x in (grad, q, k, v, out))
    is_causal, mask = _visibility(q, k, low, high)
    with routed_products():
        dq, dk, dv = _backward(grad, q, k, v, out, lse, 0.0, is_causal, attn_mask=mask, scale=scale)
    return dq, dk, dv


def _wide(x: Tensor) -> Tensor:
    # The operator's bf16 products are slower than its float32 ones on CPUs without bf16 tiles
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _visibility(q: Tensor, k: Tensor, low: int | None, high: int | None) -> tuple[bool, Tensor | None]:
    """The operator's own triangle is aligned to the top left corner, `low == 0`.  Other bounds need a mask."""
    assert 0 not in (*q.shape, *k.shape), "an empty dimension kills the process"
    if high is None and low in (None, 0):
        return low == 0, None
    return False, _band(q.shape[2], k.shape[2], low, high, q.dtype)


@lru_cache(8)
def _band(queries: int, keys: int, low: int | None, high: int | None, dtype: torch.dtype) -> Tensor:
    distance = torch.arange(queries)[:, None] - torch.arange(keys)
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if low is not None:
        hidden |= distance < low
    if high is not None:
        hidden |= distance > high
    return torch.zeros(1, 1, queries, keys, dtype=dtype).masked_fill_(hidden, -torch.inf)


@contextmanager
def routed_products() -> Iterator[None]:
    """float32 products by oneDNN, where that is still float32.

    MKL runs at half speed or less on some CPUs that are not its maker's.  Asking for bf16 products sends them to
    oneDNN, which rounds only where the CPU has tiles for it; there the setting stays as it was.
    """
    products: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = products.fp32_precision
    if before != "none" or not _routing_is_exact():
        yield
        return
    products.fp32_precision = "bf16"
    try:
        yield
    finally:
        products.fp32_precision = before


@lru_cache(1)
def _routing_is_exact() -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    products: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    a = torch.rand(256, 256, generator=torch.Generator().manual_seed(0)) - 0.5
    truth = a.double() @ a.double()
    before = products.fp32_precision
    products.fp32_precision = "bf16"
    try:
        return bool(((a @ a) - truth).abs().max() < 1e-5 * truth.abs().max())
    finally:
        products.fp32_precision = before
