"""`attend`: exact dilated attention, one autograd.Function over one operator."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, get_args, overload

import torch
from torch import Tensor

from lightning_longnet.attention.documents import document_cuts
from lightning_longnet.attention.exchange import local
from lightning_longnet.attention.kernels import BLOCK_KERNELS, Explanation, Request, judge, reference, select
from lightning_longnet.attention.pattern import Pattern
from lightning_longnet.attention.plan import plan

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lightning_longnet.attention.plan import Plan

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
        return_lse: return also the log-sum-exp of the scores, (B, H, N), natural log; it carries no gradient.

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
    return Request(q.device.type, q.dtype, q.shape[3], v.shape[3])


def _checked(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, documents: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The arguments as the operator wants them, or a ValueError that names the one that is wrong."""
    if not isinstance(pattern, Pattern):
        raise ValueError(f"pattern must be a Pattern, got {type(pattern).__name__}: see Pattern.dilated, dense, window")
    for name, x in (("q", q), ("k", k), ("v", v)):
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
        out, lse = forward_op(q, k, v, documents, pattern, scale, kernel)
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
        dq, dk, dv = backward_op(*args)
        return dq, dk, dv

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("attend has no second derivative; kernel='reference' has")


@torch.library.custom_op("lightning_longnet::attend", mutates_args=())
def forward_op(
    q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, pattern: str, scale: float, kernel: str
) -> tuple[Tensor, Tensor]:
    """The local forward under one name, for selective checkpointing and torch.compile to see."""
    q, k, v = (_readable(x) for x in (q, k, v))
    found = [
        local.forward(BLOCK_KERNELS[kernel], planned, q[rows], k[rows], v[rows], scale)
        for rows, planned in _row_plans(q, k, documents, pattern)
    ]
    out, lse = _joined(found) if found else _results_like(q, k, v, documents, pattern, scale, kernel)
    return out, lse


@forward_op.register_fake
def _results_like(
    q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, pattern: str, scale: float, kernel: str
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=wide)


@torch.library.custom_op("lightning_longnet::attend_backward", mutates_args=())
def backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    documents: Tensor | None,
    pattern: str,
    scale: float,
    mix: str,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The local backward under one name."""
    grad, q, k, v, out = (_readable(x) for x in (grad, q, k, v, out))
    found = [
        local.backward(
            BLOCK_KERNELS[kernel], planned, grad[rows], q[rows], k[rows], v[rows], out[rows], lse[rows], scale, mix
        )
        for rows, planned in _row_plans(q, k, documents, pattern, mix)
    ]
    dq, dk, dv = _joined(found) if found else _gradients_like(grad, q, k, v)
    return dq, dk, dv


@backward_op.register_fake
def _gradients_like(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


def _row_plans(
    q: Tensor, k: Tensor, documents: Tensor | None, pattern: str, mix: str = "exact"
) -> Iterator[tuple[slice, Plan]]:
    """Samples that follow one another with the same documents, and their plan."""
    branches = Pattern.loads(pattern)
    # Pairs computed once go head by head, and the operator's backward runs in parallel over segments and heads: the
    # segments alone must keep the threads busy
    segments = q.shape[0] * q.shape[1] // (branches.ordered()[0].segment_length or max(1, q.shape[1]))
    distinct = mix == "exact" and segments >= torch.get_num_threads()
    first = 0
    for cuts, group in groupby(document_cuts(documents, q.shape[0], q.shape[1]) if q.numel() else ()):
        last = first + len(list(group))
        yield slice(first, last), plan(branches, q.shape[2], k.shape[2], cuts, distinct)
        first = last


def _joined(found: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The samples' results side by side."""
    return found[0] if len(found) == 1 else tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def _readable(x: Tensor) -> Tensor:
    """Kernels read the last dimension with stride 1: an expanded gradient, as sum() gives it, has stride 0."""
    return x if x.stride(-1) == 1 else x.contiguous()
