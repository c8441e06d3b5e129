"""Generation by transformers' own `generate`, with padding on either side and a seed of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_longnet.huggingface.prompts import left_padded, padding_refusal
from lightning_longnet.inference.prompts import fault_of_mask


@torch.no_grad()
def generated(
    model: Any,
    input_ids: Tensor,
    tokens: int,
    *,
    attention_mask: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    use_cache: bool = True,
) -> Tensor:
    """Return input_ids (B, N) continued by `tokens` tokens; see `CausalLMModule.generate`, which calls it."""
    given = input_ids
    if attention_mask is not None:
        if fault := fault_of_mask(input_ids, attention_mask):
            raise ValueError(fault)
        given, attention_mask = left_padded(input_ids, attention_mask)
        if not attention_mask.all() and (refusal := padding_refusal(model)):
            raise ValueError(refusal)
    options: dict[str, Any] = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": temperature > 0}
    if temperature > 0:
        options |= {"temperature": temperature, "top_k": top_k}
    is_training = model.training
    model.eval()
    devices = [input_ids.device] if input_ids.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            mask = torch.ones_like(given) if attention_mask is None else attention_mask
            result: Tensor = model.generate(given, attention_mask=mask, use_cache=use_cache, **options)
    finally:
        model.train(is_training)
    return torch.cat([input_ids, result[:, given.shape[1] :]], 1)
