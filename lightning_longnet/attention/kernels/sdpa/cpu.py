"""torch's flash attention for CPU, an operator that returns the log-sum-exp; its backward takes it as an argument.

Blocks that the operator computes slowly are computed by tiles of plain products, as the kernel "eager" does.

The operator has pitfalls, for each of which there is a test: an empty dimension kills the process; a last stride other
than 1 is read wrongly without an error; boolean masks are refused; out and v must have the width of q and k.
"""

from __future__ import annotations

import os
from functools import lru_cache
from threading import Lock
from time import perf_counter
from typing import TYPE_CHECKING

import torch

from lightning_longnet.attention.kernels import eager, squares
from lightning_longnet.attention.kernels.call import band_bias, head_log_weights, log_weights
from lightning_longnet.attention.kernels.products import LEAST_BACKWARD, routed_products, uses_onednn
from lightning_longnet.attention.kernels.threads import shares_caches

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.attention.kernels import BlockKernel, Request
    from lightning_longnet.attention.kernels.call import Call

note = "torch's flash attention for CPU, and plain products for weighted and short causal blocks"

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# From so many rows on the operator multiplies 256 rows at a time, and 64 or fewer below
OPERATOR_ROWS = 768
# Tiles of fewer queries took up to half as long again as the operator on an EPYC with AVX-512; from 384 on, two thirds
TILED_ROWS = 320
# A call of fewer pairs is the operator's: the tens of operators of a tile would take longer
LEAST_TILED = 2**19
# From so many pairs of a head and segment on, squares are faster than tiles of rows
LEAST_SQUARED = 2**20
_measuring = Lock()  # threads that ask at once which type is faster get one answer


def _renew_lock() -> None:
    """Replace the lock in a forked process, where nobody would release it."""
    global _measuring
    _measuring = Lock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_renew_lock)


def refusals(request: Request) -> list[str]:
    """Return the reasons why the operator cannot compute a call; `refusals` of the kernel "sdpa" adds its own."""
    if request.dtype not in _DTYPES:
        return [f"serves float64, float32, bfloat16 and float16, q is {request.dtype}"]
    return []


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Return out (batch, heads, rows, Dv) and lse (batch, heads, rows) of one block; see `BlockKernel`.

    The kernel "sdpa" calls it for tensors on a CPU.
    """
    q, k, v = map(_operand, (q, k, v))
    if _is_tiled(q, k, call):
        return _tiles(q, k, call).forward(q, k, v, call)
    is_causal, mask = _mask(q, k, call)
    with routed_products(q.shape[2] * k.shape[2] * q.shape[3]):
        out, lse = _forward(q, k, v, 0.0, is_causal, attn_mask=mask, scale=call.scale)
    empty = call.empty_rows(q.shape[2], q.shape[1])
    return out, lse if empty is None else lse.masked_fill(empty, -torch.inf)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv of one block from the `out` and `lse` of the whole softmax; see `BlockKernel`.

    The kernel "sdpa" calls it for tensors on a CPU.
    """
    grad, q, k, v = map(_operand, (grad, q, k, v))
    out = out.to(q.dtype)  # which a single branch leaves in the type of its accumulators
    if _is_tiled(q, k, call):
        return _tiles(q, k, call).backward(grad, q, k, v, out, lse, call)
    is_causal, mask = _mask(q, k, call)
    with routed_products(q.shape[2] * k.shape[2] * q.shape[3], LEAST_BACKWARD):
        dq, dk, dv = _backward(grad, q, k, v, out, lse, 0.0, is_causal, attn_mask=mask, scale=call.scale)
    return dq, dk, dv


def _is_tiled(q: Tensor, k: Tensor, call: Call) -> bool:
    """Return whether tiles of plain products compute a block faster than the operator does.

    `forward` and `backward` ask for each block.  Tiles are faster for causal blocks of fewer rows than `OPERATOR_ROWS`,
    of which the operator computes whole squares of 512 rows by small products, and for blocks with weights of pairs,
    whose mask costs it two more passes over the scores; for blocks with weights and no causal mask they are so on some
    CPUs only (`_tiles_are_fast`).

    Half types, blocks with a bound `high` and calls of few queries (`TILED_ROWS`) or few pairs (`LEAST_TILED`) stay
    with the operator, and where several threads compute, all blocks do.  The threads of the operator meet once in a
    call, but those of tiles in each of their operators, where they wait for a thread whose core is busy with another
    process.  Threads that compute tasks side by side share caches, which the tile of each would fill.
    """
    if torch.get_num_threads() > 1:
        return False
    block, pairs = call.block, q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    if q.dtype not in (torch.float32, torch.float64) or block.high is not None or pairs < LEAST_TILED:
        return False
    if shares_caches() or q.shape[2] < TILED_ROWS:
        return False
    if block.repeats or block.head_repeats:
        return block.low == 0 or _tiles_are_fast()
    return block.low == 0 and q.shape[2] < OPERATOR_ROWS


def _tiles(q: Tensor, k: Tensor, call: Call) -> BlockKernel:
    """Return the module that computes a call by plain products.

    Squares are computed one head after the other, which takes longer for short runs.
    """
    is_long = q.shape[2] * k.shape[2] >= LEAST_SQUARED
    return squares if is_long and squares.serves(q, k, call) else eager


@lru_cache(1)
def _tiles_are_fast() -> bool:
    """Return whether tiles are as fast as the operator where nothing is masked.

    They are so with the vectors of AVX-512 and oneDNN's products; with AVX2 or with MKL's products the operator is
    faster by 5 to 15 %.
    """
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and uses_onednn()


def _operand(x: Tensor) -> Tensor:
    """Return x in the type in which the operator computes: half types in float32, unless half is faster on this CPU."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        return x
    with _measuring:
        is_faster = _half_is_faster(x.dtype)
    return x if is_faster else x.float()


@lru_cache(2)
def _half_is_faster(dtype: torch.dtype) -> bool:
    """Return whether the operator is faster in a half type than in float32, from one measurement.

    It takes a tenth of a second.  No flag of a CPU says which of its products are the faster ones.
    """
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(2, 4, 512, 64, generator=generator).to(dtype)

    def seconds(cast: torch.dtype) -> float:
        """Return the time of one forward and backward in this type, the cast included."""
        begin = perf_counter()
        x = half.to(cast)
        out, lse = _forward(x, x, x)
        _backward(x, x, x, x, out, lse, 0.0, False)
        return perf_counter() - begin

    with routed_products():
        rounds = [(seconds(dtype), seconds(torch.float32)) for _ in range(4)]
    # the first round is a warm-up
    fastest, fastest_wide = (min(times) for times in zip(*rounds[1:], strict=True))
    return bool(fastest < 0.95 * fastest_wide)


def _mask(q: Tensor, k: Tensor, call: Call) -> tuple[bool, Tensor | None]:
    """Return the operator's arguments `is_causal` and `attn_mask`, a bias of floats or None, for the mask of a block.

    The operator's own causal mask is aligned to the top left corner (`low == 0`); any other mask is a bias, which
    broadcasts to (batch, heads, queries, keys).
    """
    assert 0 not in (*q.shape, *k.shape), "an empty dimension kills the process"
    assert call.dropout_mask is None, "refused before"
    block, wide = call.block, torch.promote_types(q.dtype, torch.float32)
    padding = call.padding_bias(q.shape[1], wide)
    is_causal, mask = block.low == 0 and block.high is None, None
    if block.repeats:
        assert block.high is None, "a plan gives no weights to bands"
        assert block.low in (None, 0), "a plan gives no weights to bands"
        mask = log_weights(q.shape[2], k.shape[2], block.repeats, wide, q.device)[None, None]
    elif block.head_repeats:
        mask = head_log_weights(q.shape[2], k.shape[2], block.head_repeats, wide, q.device)
        mask = mask.repeat_interleave(q.shape[1] // k.shape[1], 0)[None]
    elif not is_causal and (block.low, block.high) != (None, None):
        mask = band_bias(q.shape[2], k.shape[2], block.low, block.high, wide, q.device)[None, None]
    if padding is not None:
        mask = padding if mask is None else mask + padding
    return is_causal, mask
