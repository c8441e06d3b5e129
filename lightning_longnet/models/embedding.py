"""Embedding of sequences: the states of a LongNet before its head, of each token, of the last, or their mean."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch
import torch.distributed as dist

from lightning_longnet.sequence.context import SequenceContext

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.models.longnet import LongNet

Pooling = Literal["mean", "last", "tokens"]


@torch.no_grad()
def embed(
    model: LongNet,
    input_ids: Tensor,
    pooling: Pooling = "mean",
    *,
    attention_mask: Tensor | None = None,
    context: SequenceContext | None = None,
) -> Tensor:
    """Return the embedding of each sequence, (B, dim), or the states of its tokens.

    The states are the input of the head.  Means are computed in float32 at least.

    Args:
        model: an encoder or a decoder.
        input_ids: (B, N), whole sequences, the same on all ranks that share sequences.
        pooling: "mean", the mean of the states of all tokens; "last", the state of the last token; or "tokens", the
            states (B, N, dim) of all.
        attention_mask: (B, N), 1 where a token is and 0 where padding is, which follows the tokens of its row.
        context: the context where sequences are split over ranks: all ranks of its group call this together, and each
            computes its part.  All get the embeddings; with "tokens" each gets the states of its own tokens, whose
            indices are `context.placement_of(N)`'s.
    """
    check_pooling(pooling)
    if input_ids.dim() != 2 or input_ids.shape[1] < 1:
        raise ValueError(f"input_ids must be (B, N) with at least one token, got shape {tuple(input_ids.shape)}")
    counts = torch.full((len(input_ids),), input_ids.shape[1], device=input_ids.device)
    if attention_mask is not None:
        counts = _checked_counts(attention_mask, input_ids)
    context = context or SequenceContext()
    was_training = model.training
    model.eval()
    try:
        if context.sequence_parallel_size == 1:
            places = torch.arange(input_ids.shape[1], device=input_ids.device)
            states = model.encode(model.embed(input_ids), attention_mask=attention_mask)
            return _pooled(states, places, counts, pooling)
        with context.parts_of(input_ids.shape[1]):
            positions = context.positions
            assert positions is not None
            places = positions.to(input_ids.device)
            mask = None if attention_mask is None else attention_mask[:, places]
            states = model.encode(model.embed(input_ids[:, places]), attention_mask=mask)
            pooled = _pooled(states, places, counts, pooling)
            if pooling != "tokens":
                dist.all_reduce(pooled, group=context.sequence_group)
            return pooled
    finally:
        model.train(was_training)


def check_pooling(pooling: str) -> None:
    """Raise a ValueError where there is no such pooling."""
    if pooling not in get_args(Pooling):
        raise ValueError(f"pooling must be one of {', '.join(map(repr, get_args(Pooling)))}, got {pooling!r}")


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which states of a dtype are summed."""
    return torch.promote_types(dtype, torch.float32)


def _pooled(states: Tensor, places: Tensor, counts: Tensor, pooling: Pooling) -> Tensor:
    """Return what the states (B, L, dim) of the tokens at `places` (L,) add to embeddings of `counts` (B,) tokens."""
    if pooling == "tokens":
        return states
    if pooling == "last":  # zeros on all ranks but the one that holds the last token
        rows, columns = (places == counts[:, None] - 1).nonzero(as_tuple=True)
        last = states.new_zeros(len(states), states.shape[2], dtype=wide(states.dtype))
        last[rows] = states[rows, columns].to(last.dtype)
        return last
    is_padding = places >= counts[:, None]
    if is_padding.any():
        states = states.masked_fill(is_padding[..., None], 0)
    return states.sum(1, dtype=wide(states.dtype)) / counts[:, None]


def _checked_counts(attention_mask: Tensor, input_ids: Tensor) -> Tensor:
    """Return the number of tokens (B,) of each row."""
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have the shape {tuple(input_ids.shape)} of input_ids, got "
            f"{tuple(attention_mask.shape)}"
        )
    counts = (attention_mask != 0).sum(1)
    expected = torch.arange(input_ids.shape[1], device=input_ids.device) < counts[:, None]
    if not torch.equal(attention_mask != 0, expected.to(attention_mask.device)):
        raise ValueError("attention_mask must be 1 for the first tokens of each row and 0 for the padding after them")
    if not bool((counts > 0).all()):
        raise ValueError("attention_mask must be 1 for at least one token of each row")
    return counts.to(input_ids.device)
