"""Prompts of unequal length, as `generate` of transformers continues them."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")
_BY_LENGTH = ("dynamic", "longrope")
# values of a generation config by which padding would change the tokens of a row
_OF_TEXTS = ("no_repeat_ngram_size", "bad_words_ids", "sequence_bias")


def left_padded(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return tokens and mask (B, longest prompt) with all padding on the left.

    Padding repeats the first token of its row: a penalty of repetition would count a token that the text has not.
    """
    is_token = attention_mask != 0
    order = is_token.byte().argsort(dim=1, stable=True)
    begin = input_ids.shape[1] - int(is_token.sum(1).max())
    tokens, mask = (x.gather(1, order)[:, begin:] for x in (input_ids, is_token))
    first = tokens.gather(1, mask.byte().argmax(1, keepdim=True))
    return torch.where(mask, tokens, first), mask.long()


def padding_refusal(model: Any) -> str:
    """Return why a model of transformers does not continue padded prompts as it does each alone, or an empty string."""
    config = model.config.get_text_config()
    reason = ""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        reason = f"{type(model).__name__} takes no position_ids, and counts the padding"
    kinds = [kind for kind in getattr(config, "layer_types", None) or () if kind not in _LAYER_TYPES]
    if kinds:
        reason = f"layers of the kind {kinds[0]!r} carry a state from token to token, padding included"
    if config._attn_implementation == "eager" and model.dtype == torch.float64:
        reason = "transformers' eager attention returns NaN for padding in float64; 'ring' and 'sdpa' do not"
    for name in _OF_TEXTS:
        if getattr(getattr(model, "generation_config", None), name, None):
            reason = f"{name} of the generation config would count padding"
    for name, module in model.named_modules():
        types = getattr(module, "rope_type", None)
        if set(types.values() if isinstance(types, dict) else (types,)) & set(_BY_LENGTH):
            reason = f"{name} chooses its frequencies by the longest row of a batch, which the shorter ones share"
        elif isinstance(module, (torch.nn.Conv1d, torch.nn.RNNBase)):
            reason = f"{name} ({type(module).__name__}) computes a token from its neighbours, padding among them"
        elif getattr(module, "attn_temperature_tuning", False) and not getattr(module, "use_rope", True):
            reason = f"{name} scales queries by their column, padding included"
    return reason and f"prompts must be of one length, without padding, in a batch of this model: {reason}"
