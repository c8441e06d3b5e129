"""Cross entropy over a vocabulary whose logits are never held for more than some tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK_TOKENS = 768
IGNORED = -100


class TokenLoss(NamedTuple):
    """A sum over tokens and their number: what `token_mean` takes."""

    loss_sum: Tensor
    token_count: Tensor


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = IGNORED,
    chunk_tokens: int = CHUNK_TOKENS,
) -> TokenLoss:
    """Cross entropy of `hidden @ weight.T + bias`, summed over the labels that are not `ignore_index`.

    Gradients are computed in the forward, some tokens at a time, so that what is held is of the size of `hidden` and of
    `weight`, and never tokens x vocabulary.

    Args:
        hidden: (..., width).
        weight: (vocabulary, width), as of the `nn.Linear` that would give the logits.
        labels: (...), the right class of each.
        bias: (vocabulary,).
        ignore_index: the label of tokens that do not count.
        chunk_tokens: whose logits are held at a time.

    >>> hidden, head = torch.randn(2, 500, 16, requires_grad=True), torch.nn.Linear(16, 100)
    >>> loss_sum, count = chunked_cross_entropy(hidden, head.weight, torch.randint(100, (2, 500)), head.bias)
    >>> (loss_sum / count).backward()
    """
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels must have the shape {tuple(hidden.shape[:-1])} of hidden, got {tuple(labels.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight must be (vocabulary, {hidden.shape[-1]}), got shape {tuple(weight.shape)}")
    if not isinstance(chunk_tokens, int) or chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be a positive integer, got {chunk_tokens!r}")
    device = hidden.device.type
    dtype = hidden.dtype
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    flat, targets = hidden.flatten(0, -2), labels.flatten()
    loss_sum = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        flat, weight, bias, targets, ignore_index, chunk_tokens, dtype
    )
    return TokenLoss(loss_sum, (targets != ignore_index).sum())


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        ignore_index: int,
        chunk_tokens: int,
        dtype: torch.dtype,
    ) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
            factor = weight.to(dtype)
            loss = torch.zeros((), dtype=torch.float64 if hidden.device.type != "mps" else wide, device=hidden.device)
            dhidden = torch.empty_like(hidden) if needs_hidden else None
            dweight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
            dbias = torch.zeros_like(bias, dtype=wide) if bias is not None and needs_bias else None
            for begin in range(0, len(hidden), chunk_tokens):
                rows = slice(begin, begin + chunk_tokens)
                is_left_out = (labels[rows] == ignore_index)[:, None]
                # zeroed here, where rows are short, what does not count is nothing in both products below
                here = hidden[rows].to(dtype).masked_fill(is_left_out, 0)
                picked = labels[rows, None].masked_fill(is_left_out, 0)
                logits = (here @ factor.T).to(wide)
                if bias is not None:
                    logits += bias
                likely = logits.log_softmax(-1)
                del logits
                loss -= likely.gather(1, picked).masked_fill(is_left_out, 0).sum()
                if dhidden is None and dweight is None and dbias is None:
                    continue
                grad = likely.exp_()
                grad.scatter_add_(1, picked, torch.full_like(picked, -1, dtype=wide))
                if dbias is not None:
                    dbias += (~is_left_out[:, 0]).to(wide) @ grad
                narrow = grad.to(dtype)
                if dhidden is not None:
                    dhidden[rows] = (narrow @ factor).masked_fill_(is_left_out, 0)
                if dweight is not None:
                    dweight += narrow.T @ here
        ctx.save_for_backward(dhidden, dweight, dbias)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return loss.to(wide)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        found = (
            None if x is None else (x * grad).to(dtype) for x, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *found, None, None, None, None
