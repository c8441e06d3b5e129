"""`attend`: exact dilated attention, one autograd.Function over two operators."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from lightning_longnet.attention import operators
from lightning_longnet.attention.checks import (
    Mix,
    checked_call,
    checked_padding,
    checked_probability,
    checked_tensors,
    request_of,
)
from lightning_longnet.attention.kernels import Explanation, judge, reference
from lightning_longnet.attention.kernels.dropout import Dropout
from lightning_longnet.attention.parallel import sharded
from lightning_longnet.attention.parallel.shard import SequenceShard
from lightning_longnet.attention.pattern.pattern import Pattern  # noqa: TC001  for the examples below

if TYPE_CHECKING:
    from lightning_longnet.attention.parallel.schedule import Exchange


@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    documents: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    dropout: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    dropout_samples: tuple[int, int] = (0, 1),
    scale: float | None = None,
    mix: Mix = "exact",
    kernel: str = "auto",
    shard: SequenceShard | None = None,
    exchange: Exchange = "auto",
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    documents: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    dropout: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    dropout_samples: tuple[int, int] = (0, 1),
    scale: float | None = None,
    mix: Mix = "exact",
    kernel: str = "auto",
    shard: SequenceShard | None = None,
    exchange: Exchange = "auto",
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    documents: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    dropout: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    dropout_samples: tuple[int, int] = (0, 1),
    scale: float | None = None,
    mix: Mix = "exact",
    kernel: str = "auto",
    shard: SequenceShard | None = None,
    exchange: Exchange = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """One softmax over all that the pattern shows each query.

    Args:
        q: queries (B, N, H, D).
        k, v: keys and values (B, N, Hkv, D); each key head serves H / Hkv query heads that stand side by side.
        pattern: which keys a query sees, and how often each counts.
        documents: an integer id per token, (N,) or (B, N), not decreasing: each document is attended to alone, as if it
            stood in a batch of its own.
        key_padding_mask: (B, N), True where a key is hidden from all queries.  Padded queries are computed like others,
            and what stands in padding must be finite: 0 times infinity is no number.
        dropout: the probability that a pair is dropped from the softmax's weights; the rest grow by 1 / (1 - dropout).
            There is no training mode here: hand in 0 to evaluate.
        dropout_seed: an integer, or one in a CPU tensor.  What is dropped depends on it and on where a pair stands,
            never on how the work is split.  By default torch's CPU generator draws one, so that `torch.manual_seed`
            and activation checkpointing repeat it.
        dropout_samples: (first, step): to that rule sample b is number first + step b.  Of a batch whose samples are
            dealt out to n ranks, rank r drops what one process would with (r, n).
        scale: of the scores; 1 / sqrt(D) by default.
        mix: "exact" is the gradient of the one softmax; "detached" stops it at the branches' weights, as torchscale.
        kernel: "auto", or the name of one; `explain` tells which serve.
        shard: where q, k and v are one rank's part of sequences that are split over ranks.  All ranks of it call
            together; documents and padding are the shard's.  To drop the same pairs whatever the split, hand in one
            `dropout_seed` on all ranks.
        exchange: how keys reach the queries of other ranks: "gather", "ring", "swap", "local" where none has to, or
            "auto", the cheapest.
        return_lse: return also the log-sum-exp of the scores, (B, H, N), natural log.  It carries no gradient, and the
            backward reads it: change it only in a copy.

    Returns:
        out (B, N, H, D), 0 where a query sees no key; with `return_lse` the pair (out, lse), lse -inf there.

    >>> q, k, v = torch.randn(3, 1, 1000, 4, 16).unbind()
    >>> attend(q, k, v, Pattern.dilated((256, 1024), (1, 4), is_causal=True)).shape
    torch.Size([1, 1000, 4, 16])
    """
    told = pattern, documents, key_padding_mask, dropout, dropout_seed, dropout_samples, scale, mix, kernel, exchange
    try:
        call = checked_call(q, k, v, *told, shard)
    except (ValueError, RuntimeError, MemoryError) as error:
        if isinstance(shard, SequenceShard):
            shard.check({}, fault=str(error) or repr(error))  # the other ranks wait for this one
        raise
    q, k, v, documents, hidden, seed, scale, chosen = call
    if shard is not None:
        settings = sharded.Settings(
            shard, pattern, scale, float(dropout), seed, *dropout_samples, chosen, mix, exchange, bool(return_lse)
        )
        out, lse = sharded.attend(q, k, v, settings, dropout_seed is not None)
    elif chosen == reference.name and q.numel():
        drops = None if seed is None else Dropout(dropout, int(seed), *dropout_samples)
        out, lse = reference.attend(q, k, v, documents, hidden, drops, pattern, scale, mix)
    else:
        out, lse = _Attention.apply(  # type: ignore[no-untyped-call]
            q, k, v, documents, hidden, seed, pattern.dumps(), scale, float(dropout), *dropout_samples, chosen, mix
        )
    return (out, lse) if return_lse else out


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    documents: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    dropout: float = 0.0,
    kernel: str = "auto",
) -> Explanation:
    """Which kernel `attend` would run on these tensors, which others could serve, and why the rest cannot.

    >>> q = torch.zeros(1, 8, 2, 4)
    >>> print(explain(q, q, torch.zeros(1, 8, 2, 6), Pattern.dense()))
    cpu, float32, accumulates in float32
    flash      refuses      serves CUDA tensors, q is on cpu
    sdpa       refuses      needs v as wide as q and k, got 6 and 4
    cudnn      refuses      serves CUDA tensors, q is on cpu
    eager      runs         plain products in float32 or float64, a tile of scores at a time
    reference  could serve  holds all N x N scores; differentiable any number of times
    """
    q, k, v, _ = checked_tensors(q, k, v, pattern, documents)
    checked_probability(dropout)
    return judge(kernel, request_of(q, v, pattern, checked_padding(key_padding_mask, q), dropout))


def explain_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    documents: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    dropout: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    dropout_samples: tuple[int, int] = (0, 1),
    scale: float | None = None,
    mix: Mix = "exact",
    kernel: str = "auto",
    shard: SequenceShard | None = None,
    exchange: Exchange = "auto",
    return_lse: bool = False,
) -> Explanation:
    """As `explain`, of all that `attend` is told: a ValueError is the one that it would raise.  No seed is drawn."""
    seed = 0 if dropout_seed is None else dropout_seed
    told = pattern, documents, key_padding_mask, dropout, seed, dropout_samples, scale, mix, kernel, exchange
    call = checked_call(q, k, v, *told, shard)
    return judge(kernel, request_of(call.q, call.v, pattern, call.hidden, dropout))


class _Attention(torch.autograd.Function):
    """Nothing flows through lse: the gradient of the softmax is that of its blocks, given the whole's out and lse."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        *tensors, pattern, scale, dropout, first, step, kernel, mix = args
        out, lse = operators.forward(*tensors, pattern, scale, dropout, first, step, kernel)
        q, k, v, *conditions = tensors
        ctx.save_for_backward(q, k, v, out, lse, *conditions)
        ctx.settings = pattern, scale, dropout, first, step, kernel, mix
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:
        grads = _Gradient.apply(grad, *ctx.saved_tensors, *ctx.settings)  # type: ignore[no-untyped-call]
        return *grads, *(None for _ in range(10))


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = operators.backward(*args)
        return dq, dk, dv

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("attend has no second derivative; kernel='reference' has")
