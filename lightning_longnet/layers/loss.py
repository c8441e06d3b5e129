"""Cross entropy over a vocabulary, computed in chunks so that the logits of all tokens are never in memory."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lightning_longnet.attention.kernels.products import routed_products

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

CHUNK_TOKENS = 768
IGNORED = -100


class TokenLoss(NamedTuple):
    """A sum of losses and the number of tokens in it, the arguments of `SequenceContext.token_mean`."""

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
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> TokenLoss:
    """Return the cross entropy of the logits `hidden @ weight.T + bias`, summed, and the number of tokens that count.

    Gradients are computed in the forward, `chunk_tokens` tokens at a time.  Memory is of the size of `hidden` and
    `weight`, never tokens x vocabulary.

    Args:
        hidden: (..., width).
        weight: (vocabulary, width), the weight of the `nn.Linear` that would compute the logits.
        labels: (...), the target class of each token.
        bias: (vocabulary,).
        ignore_index: label of the tokens that are left out of the sum and of the count.
        chunk_tokens: number of tokens whose logits are in memory at a time.
        logit_scale: factor of the logits.
        softcap: bound of the logits, `softcap * tanh(logits / softcap)`, applied after `logit_scale`; None sets none.

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
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap!r}")
    device = hidden.device.type
    dtype = hidden.dtype
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    flat, targets = hidden.flatten(0, -2), labels.flatten()
    options = _Options(ignore_index, chunk_tokens, dtype, logit_scale, softcap)
    loss_sum = _ChunkedCrossEntropy.apply(flat, weight, bias, targets, options)  # type: ignore[no-untyped-call]
    return TokenLoss(loss_sum, (targets != ignore_index).sum())


def _products(hidden: Tensor, weight: Tensor, options: _Options) -> AbstractContextManager[Any]:
    """Return the context of the products of a chunk, which may choose the library that computes them."""
    if not hidden.is_cpu or options.dtype != torch.float32 or torch.compiler.is_compiling():
        return nullcontext()
    return routed_products(min(len(hidden), options.chunk_tokens) * weight.numel())


def chunk_starts(tokens: int, chunk_tokens: int) -> range:
    """Return where the chunks begin."""
    return range(0, tokens, chunk_tokens)


class _Options(NamedTuple):
    """The arguments of `chunked_cross_entropy` that are no tensors, and the dtype of products."""

    ignore_index: int
    chunk_tokens: int
    dtype: torch.dtype
    logit_scale: float
    softcap: float | None

    def apply_(self, logits: Tensor) -> Tensor | None:
        """Scale and bound logits in place, and return the derivative of the bound; None where there is no bound."""
        if self.logit_scale != 1.0:
            logits *= self.logit_scale
        if self.softcap is None:
            return None
        logits.div_(self.softcap).tanh_()
        slope = 1 - logits.square()
        logits *= self.softcap
        return slope


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The summed loss.  The forward also computes the gradients for a loss gradient of 1; the backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        options: _Options,
    ) -> Tensor:
        ignore_index, chunk_tokens, dtype = options.ignore_index, options.chunk_tokens, options.dtype
        wide = torch.promote_types(dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False), _products(hidden, weight, options):
            needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
            factor = weight.to(dtype)
            loss = torch.zeros((), dtype=torch.float64 if hidden.device.type != "mps" else wide, device=hidden.device)
            dhidden = torch.empty_like(hidden) if needs_hidden else None
            dweight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
            dbias = torch.zeros_like(bias, dtype=wide) if bias is not None and needs_bias else None
            for begin in chunk_starts(len(hidden), chunk_tokens):
                rows = slice(begin, begin + chunk_tokens)
                is_ignored = (labels[rows] == ignore_index)[:, None]
                # zero the ignored tokens here, where rows are narrower than the logits: whatever they held, NaN
                # included, they then add nothing to dweight
                chunk = hidden[rows].to(dtype).masked_fill(is_ignored, 0)
                targets = labels[rows, None].masked_fill(is_ignored, 0)
                logits = (chunk @ factor.T).to(wide)
                if bias is not None:
                    logits += bias
                slope = options.apply_(logits)
                log_probs = logits.log_softmax(-1)
                del logits
                loss -= log_probs.gather(1, targets).masked_fill(is_ignored, 0).sum()
                if dhidden is None and dweight is None and dbias is None:
                    continue
                # the gradient of the loss by the logits is softmax minus one-hot
                grad = log_probs.exp_()
                grad.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=wide))
                if slope is not None:
                    grad *= slope
                if options.logit_scale != 1.0:
                    grad *= options.logit_scale
                if dbias is not None:
                    dbias += (~is_ignored[:, 0]).to(wide) @ grad
                narrow = grad.to(dtype)
                if dhidden is not None:
                    dhidden[rows] = (narrow @ factor).masked_fill_(is_ignored, 0)
                if dweight is not None:
                    dweight += narrow.T @ chunk
        ctx.save_for_backward(dhidden, dweight, dbias)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return loss.to(wide)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        gradients = (
            None if x is None else (x * grad).to(dtype) for x, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *gradients, None, None
