"""Generation of tokens.  There is no key cache: the whole prefix is computed again for each token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from lightning_longnet.layers.options import positive_integer
from lightning_longnet.sequence.context import SequenceContext

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.models.longnet import LongNet


@torch.no_grad()
def generate(
    model: LongNet,
    input_ids: Tensor,
    tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    context: SequenceContext | None = None,
) -> Tensor:
    """Return `input_ids` continued by `tokens` sampled tokens, (B, N + tokens).

    Args:
        model: a causal model.
        input_ids: (B, N), whole sequences, the same on all ranks that share sequences.
        tokens: number of tokens to add.
        temperature: divisor of the logits; 0 takes the most likely token.
        top_k: samples from this many of the most likely tokens only.
        seed: seed of the sampling.  The same seed gives the same tokens on any number of ranks.
        context: the context where sequences are split over ranks: all ranks of its group call this together, and each
            computes its part.
    """
    positive_integer("tokens", tokens)
    if input_ids.dim() != 2 or input_ids.shape[1] < 1:
        raise ValueError(f"input_ids must be (B, N) with at least one token, got shape {tuple(input_ids.shape)}")
    if not temperature >= 0:
        raise ValueError(f"temperature must be 0 or more, got {temperature!r}")
    if top_k is not None:
        positive_integer("top_k", top_k)
    if not model.config.is_causal:
        raise ValueError("model must be causal in every layer to go on with a sequence")
    context = context or SequenceContext()
    generator = torch.Generator().manual_seed(seed)
    output_ids = input_ids
    was_training = model.training
    model.eval()
    try:
        for _ in range(tokens):
            logits = _last_logits(model, output_ids, context).float().cpu()
            token = _sample(logits, temperature, top_k, generator)
            output_ids = torch.cat([output_ids, token.to(output_ids.device)], 1)
    finally:
        model.train(was_training)
    return output_ids


def _last_logits(model: LongNet, input_ids: Tensor, context: SequenceContext) -> Tensor:
    """Return the logits (B, vocabulary) of the last token of each sequence, on all ranks that share them."""
    if context.sequence_parallel_size == 1:
        hidden = model.encode(model.embed(input_ids))[:, -1]
    else:
        length = input_ids.shape[1]
        with context.parts_of(length):
            positions = context.positions
            assert positions is not None
            places = positions.to(input_ids.device)
            hidden = model.encode(model.embed(input_ids[:, places]))
            hidden = hidden[:, places == length - 1].sum(1)  # zeros on all ranks but the one that holds the last token
            dist.all_reduce(hidden, group=context.sequence_group)
    logits: Tensor = model.head(hidden)
    return logits


def _sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> Tensor:
    """Return one sampled token for each row of logits (B, vocabulary), as (B, 1)."""
    if temperature == 0:
        return logits.argmax(1, keepdim=True)
    if top_k is not None and top_k < logits.shape[1]:
        threshold = logits.topk(top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    return torch.multinomial((logits / temperature).softmax(1), 1, generator=generator)
