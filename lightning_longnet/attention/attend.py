"""`attend`: exact dilated attention, one autograd.Function over two operators."""

from __future__ import annotations

from math import inf
from typing import Any, Literal, NamedTuple, get_args, overload

import torch
from torch import Tensor

from lightning_longnet.attention import operators, sharded
from lightning_longnet.attention.dropout import Dropout
from lightning_longnet.attention.kernels import Explanation, Request, has_few_keys, judge, reference, select
from lightning_longnet.attention.pattern import Pattern
from lightning_longnet.attention.schedule import Exchange
from lightning_longnet.attention.shard import SequenceShard

Mix = Literal["exact", "detached"]


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
        call = _checked_call(q, k, v, *told, shard)
    except ValueError as error:
        if isinstance(shard, SequenceShard):
            shard.check({}, fault=str(error))  # the other ranks wait for this one
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


class _Call(NamedTuple):
    """The arguments of `attend`, as kernels take them."""

    q: Tensor
    k: Tensor
    v: Tensor
    documents: Tensor | None
    hidden: Tensor | None
    seed: Tensor | None
    scale: float
    kernel: str


def _checked_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    documents: Tensor | None,
    key_padding_mask: Tensor | None,
    dropout: float,
    dropout_seed: int | Tensor | None,
    dropout_samples: tuple[int, int],
    scale: float | None,
    mix: str,
    kernel: str,
    exchange: str,
    shard: SequenceShard | None,
) -> _Call:
    q, k, v, documents = _checked(q, k, v, pattern, documents)
    for name, value, allowed in (("mix", mix, get_args(Mix)), ("exchange", exchange, get_args(Exchange))):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    if scale is None:
        scale = q.shape[3] ** -0.5
    if not isinstance(scale, (int, float)) or not 0 < scale < inf:
        raise ValueError(f"scale must be a positive, finite number, got {scale!r}")
    hidden = _checked_padding(key_padding_mask, q)
    if shard is not None:
        _check_shard(shard, q, documents, hidden, kernel)
        hidden = shard.key_padding_mask
    seed = _checked_seed(dropout, dropout_seed)
    _check_samples(dropout_samples)
    chosen = select(kernel, _request(q, v, pattern, hidden, dropout))
    return _Call(q, k, v, documents, hidden, seed, float(scale), chosen)


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
    q, k, v, _ = _checked(q, k, v, pattern, documents)
    _checked_probability(dropout)
    return judge(kernel, _request(q, v, pattern, _checked_padding(key_padding_mask, q), dropout))


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
    call = _checked_call(q, k, v, *told, shard)
    return judge(kernel, _request(call.q, call.v, pattern, call.hidden, dropout))


def _request(q: Tensor, v: Tensor, pattern: Pattern, hidden: Tensor | None, dropout: float) -> Request:
    return Request(
        q.device.type,
        q.dtype,
        q.shape[1],
        q.shape[2],
        q.shape[3],
        v.shape[3],
        hidden is not None,
        dropout > 0,
        _capability(q.device.index) if q.device.type == "cuda" else None,
        has_few_keys(pattern),
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _checked(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, documents: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The arguments as the operator wants them, or a ValueError that names the one that is wrong."""
    if not isinstance(pattern, Pattern):
        raise ValueError(f"pattern must be a Pattern, got {type(pattern).__name__}: see Pattern.dilated, dense, window")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(f"{name} must be (batch, tokens, heads, head_dim), got shape {tuple(x.shape)}")
        if not x.dtype.is_floating_point:
            raise ValueError(f"{name} must have a floating-point dtype, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}")
    device = q.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name} must have the dtype of q, {q.dtype}, got {x.dtype}")
        if x.shape[:2] != q.shape[:2]:
            raise ValueError(
                f"{name} must have the batch and tokens of q, {tuple(q.shape[:2])}, got {tuple(x.shape[:2])}"
            )
    if q.shape[3] < 1 or v.shape[3] < 1 or k.shape[3] != q.shape[3]:
        raise ValueError(f"k must have the head_dim of q, {q.shape[3]}, at least 1, got {k.shape[3]} (v: {v.shape[3]})")
    if v.shape[2] != k.shape[2]:
        raise ValueError(f"v must have the heads of k, {k.shape[2]}, got {v.shape[2]}")
    if k.shape[2] < 1 or q.shape[2] < 1 or q.shape[2] % k.shape[2]:
        raise ValueError(f"q must have a multiple of the {k.shape[2]} heads of k and v, got {q.shape[2]}")
    return q, k, v, _checked_documents(documents, q)


def _checked_documents(documents: Tensor | None, q: Tensor) -> Tensor | None:
    if documents is None:
        return None
    if not isinstance(documents, Tensor):
        raise ValueError(f"documents must be a tensor of integer ids, got {type(documents).__name__}")
    if documents.dtype.is_floating_point or documents.dtype.is_complex or documents.dtype == torch.bool:
        raise ValueError(f"documents must be integer ids, got {documents.dtype}")
    if documents.device != q.device:
        raise ValueError(f"documents must be on the device of q, {q.device}, got {documents.device}")
    if documents.dim() not in (1, 2) or documents.shape != q.shape[2 - documents.dim() : 2]:
        raise ValueError(
            f"documents must be (tokens,) or (batch, tokens), {tuple(q.shape[1:2])} or {tuple(q.shape[:2])}, "
            f"got {tuple(documents.shape)}"
        )
    return documents.expand(q.shape[:2])


def _check_shard(shard: SequenceShard, q: Tensor, documents: Tensor | None, hidden: Tensor | None, kernel: str) -> None:
    if not isinstance(shard, SequenceShard):
        raise ValueError(f"shard must be a SequenceShard, got {type(shard).__name__}")
    if kernel == reference.name:
        raise ValueError("kernel must serve blocks where a shard is given, got 'reference'")
    for name, x in (("documents", documents), ("key_padding_mask", hidden)):
        if x is not None:
            raise ValueError(f"{name} must be None where a shard is given, which was made with its own")
    here = shard.placement.lengths[shard.rank]
    if q.shape[1] != here:
        raise ValueError(f"q must have the shard's {here} tokens of rank {shard.rank}, got {q.shape[1]}")
    if len(shard.cuts) not in (1, q.shape[0]):
        raise ValueError(f"q must have the batch of the shard's documents, {len(shard.cuts)}, got {q.shape[0]}")
    if shard.key_padding_mask is not None and len(shard.key_padding_mask) != q.shape[0]:
        expected = len(shard.key_padding_mask)
        raise ValueError(f"q must have the batch of the shard's key_padding_mask, {expected}, got {q.shape[0]}")


def _checked_padding(mask: Tensor | None, q: Tensor) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"key_padding_mask must be a tensor of bools, True where a key is ignored, got {got}")
    if mask.shape != q.shape[:2]:
        raise ValueError(f"key_padding_mask must be (batch, tokens), {tuple(q.shape[:2])}, got {tuple(mask.shape)}")
    if mask.device != q.device:
        raise ValueError(f"key_padding_mask must be on the device of q, {q.device}, got {mask.device}")
    return mask


def _checked_probability(dropout: float) -> None:
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(f"dropout must be a probability, at least 0 and less than 1, got {dropout!r}")


def _checked_seed(dropout: float, seed: int | Tensor | None) -> Tensor | None:
    """None where nothing is dropped."""
    _checked_probability(dropout)
    if isinstance(seed, Tensor):
        if seed.dtype.is_floating_point or seed.dtype.is_complex or seed.numel() != 1 or seed.device.type != "cpu":
            raise ValueError(
                f"dropout_seed must be one integer, as a tensor on the CPU, got {tuple(seed.shape)} {seed.dtype} on "
                f"{seed.device}"
            )
    elif seed is not None and (not isinstance(seed, int) or not -(2**63) <= seed < 2**63):
        raise ValueError(f"dropout_seed must be an integer of 64 bits, got {seed!r}")
    if dropout == 0:
        return None
    if isinstance(seed, Tensor):
        return seed.long().reshape(())
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (), device="cpu")
    return torch.tensor(seed, device="cpu")


def _check_samples(samples: tuple[int, int]) -> None:
    if not isinstance(samples, tuple) or len(samples) != 2 or not all(isinstance(n, int) for n in samples):
        raise ValueError(f"dropout_samples must be two integers, (first, step), got {samples!r}")


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
