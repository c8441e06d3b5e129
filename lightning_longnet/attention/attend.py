"""`attend`: exact dilated attention, one autograd.Function over two operators."""

from __future__ import annotations

from math import inf
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor

from lightning_longnet.attention import operators
from lightning_longnet.attention.kernels import Explanation, Request, judge, reference, select
from lightning_longnet.attention.pattern import Pattern

Mix = Literal["exact", "detached"]


@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    documents: Tensor | None = None,
    scale: float | None = None,
    mix: Mix = "exact",
    kernel: str = "auto",
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
    scale: float | None = None,
    mix: Mix = "exact",
    kernel: str = "auto",
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    documents: Tensor | None = None,
    scale: float | None = None,
    mix: Mix = "exact",
    kernel: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """One softmax over all that the pattern shows each query.

    Args:
        q: queries (B, N, H, D).
        k, v: keys and values (B, N, Hkv, D); each key head serves H / Hkv query heads that stand side by side.
        pattern: which keys a query sees, and how often each counts.
        documents: an integer id per token, (N,) or (B, N), not decreasing: each document is attended to alone, as if it
            stood in a batch of its own.
        scale: of the scores; 1 / sqrt(D) by default.
        mix: "exact" is the gradient of the one softmax; "detached" stops it at the branches' weights, as torchscale.
        kernel: "auto", or the name of one; `explain` tells which serve.
        return_lse: return also the log-sum-exp of the scores, (B, H, N), natural log.  It carries no gradient, and the
            backward reads it: change it only in a copy.

    Returns:
        out (B, N, H, D), 0 where a query sees no key; with `return_lse` the pair (out, lse), lse -inf there.

    >>> q, k, v = torch.randn(3, 1, 1000, 4, 16).unbind()
    >>> attend(q, k, v, Pattern.dilated((256, 1024), (1, 4), is_causal=True)).shape
    torch.Size([1, 1000, 4, 16])
    """
    q, k, v, documents = _checked(q, k, v, pattern, documents)
    if mix not in get_args(Mix):
        raise ValueError(f"mix must be one of {', '.join(map(repr, get_args(Mix)))}, got {mix!r}")
    if scale is None:
        scale = q.shape[3] ** -0.5
    if not isinstance(scale, (int, float)) or not 0 < scale < inf:
        raise ValueError(f"scale must be a positive, finite number, got {scale!r}")
    chosen = select(kernel, _request(q, v))
    if chosen == reference.name and q.numel():
        out, lse = reference.attend(q, k, v, documents, pattern, scale, mix)
    else:
        out, lse = _Attention.apply(  # type: ignore[no-untyped-call]
            q, k, v, documents, pattern.dumps(), float(scale), mix, chosen
        )
    return (out, lse) if return_lse else out


def explain(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, *, documents: Tensor | None = None, kernel: str = "auto"
) -> Explanation:
    """Which kernel `attend` would run on these tensors, which others could serve, and why the rest cannot.

    >>> q = torch.zeros(1, 8, 2, 4)
    >>> print(explain(q, q, torch.zeros(1, 8, 2, 6), Pattern.dense()))
    sdpa       refuses      needs v as wide as q and k, got 6 and 4
    reference  runs         holds all N x N scores; differentiable any number of times
    """
    q, k, v, _ = _checked(q, k, v, pattern, documents)
    return judge(kernel, _request(q, v))


def _request(q: Tensor, v: Tensor) -> Request:
    return Request(q.device.type, q.dtype, q.shape[1], q.shape[2], q.shape[3], v.shape[3])


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
    if documents.shape not in (q.shape[:2], q.shape[1:2]):
        raise ValueError(
            f"documents must be (tokens,) or (batch, tokens), {tuple(q.shape[1:2])} or {tuple(q.shape[:2])}, "
            f"got {tuple(documents.shape)}"
        )
    return documents.expand(q.shape[:2])


class _Attention(torch.autograd.Function):
    """Nothing flows through lse: the gradient of the softmax is that of its blocks, given the whole's out and lse."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        q, k, v, documents, pattern, scale, mix, kernel = args
        out, lse = operators.forward(q, k, v, documents, pattern, scale, kernel)
        ctx.save_for_backward(q, k, v, out, lse, documents)
        ctx.settings = pattern, scale, mix, kernel
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:
        q, k, v, out, lse, documents = ctx.saved_tensors
        grads = _Gradient.apply(  # type: ignore[no-untyped-call]
            grad, q, k, v, out, lse, documents, *ctx.settings
        )
        return *grads, None, None, None, None, None


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = operators.backward(*args)
        return dq, dk, dv

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("attend has no second derivative; kernel='reference' has")
