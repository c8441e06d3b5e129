"""What the masks of `nn.MultiheadAttention` say to a pattern, which takes padding and causality and nothing else."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from lightning_longnet.layers.options import is_readable, require


def ignored_keys(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The padding as booleans.  nn.TransformerEncoderLayer makes floats of them: 0, and -inf where a key is ignored."""
    if mask.shape != shape:
        raise ValueError(f"key_padding_mask must have the shape {tuple(shape)}, got {tuple(mask.shape)}")
    if mask.dtype == torch.bool:
        return mask
    if not mask.dtype.is_floating_point:
        raise ValueError(f"key_padding_mask must be boolean, or floats of 0 and -inf, got {mask.dtype}")
    hidden = mask == -inf
    require(hidden | (mask == 0), mask, "key_padding_mask must be boolean, or hold nothing but 0 and -inf")
    return hidden


def masked_causally(mask: Tensor | None, is_causal: bool | None, length: int) -> bool:
    if mask is None:
        return bool(is_causal)
    advice = (
        "a Pattern says which keys a query sees, documents and key_padding_mask serve what differs between samples; "
        "is_causal=True, or the causal mask, makes the pattern causal"
    )
    if mask.shape != (length, length) or not (mask.dtype == torch.bool or mask.dtype.is_floating_point):
        raise ValueError(
            f"attn_mask must be causal, boolean or floats, of shape {(length, length)}, got {mask.dtype} of shape "
            f"{tuple(mask.shape)}: {advice}"
        )
    places = torch.arange(length, device=mask.device)
    hidden = mask if mask.dtype == torch.bool else mask == -inf
    plain = hidden | (mask == 0)
    ahead = hidden == (places[:, None] < places)
    if is_causal and not is_readable(mask):
        rule = f"attn_mask must be the causal mask, or hide nothing: {advice}"
        torch._assert_async(plain.all() & (ahead.all() | ~hidden.any()), rule)
        return True
    if plain.all() and not hidden.any():
        return bool(is_causal)
    if plain.all() and ahead.all():
        return True
    raise ValueError(f"attn_mask must be the causal mask, or hide nothing, got another one: {advice}")
