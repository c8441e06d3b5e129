"""Conversion of the masks of `nn.MultiheadAttention`: a pattern takes padding and causality, and refuses others."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from lightning_longnet.layers.options import is_readable, require


def ignored_keys(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a key_padding_mask as bools, True where a key is ignored.

    `nn.TransformerEncoderLayer` converts bool masks to floats: 0, and -inf where a key is ignored.  Floats of any other
    value are refused.

    Args:
        mask: bools or floats of the given shape.
        shape: (B, N), or (N,) for one sequence.
    """
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
    """Return whether `mask` and `is_causal` together ask for causal attention.

    Args:
        mask: attn_mask (N, N), bools or floats; None, all visible, or causal.  Any other mask is refused.
        is_causal: the argument of the same name of `nn.MultiheadAttention.forward`.
        length: N.
    """
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
    positions = torch.arange(length, device=mask.device)
    hidden = mask if mask.dtype == torch.bool else mask == -inf
    is_hidden_or_zero = hidden | (mask == 0)
    matches_causal = hidden == (positions[:, None] < positions)
    if is_causal and not is_readable(mask):
        # the answer is known without the values, so the check of the mask can run on the device
        rule = f"attn_mask must be the causal mask, or hide nothing: {advice}"
        torch._assert_async(is_hidden_or_zero.all() & (matches_causal.all() | ~hidden.any()), rule)
        return True
    if is_hidden_or_zero.all() and not hidden.any():
        return bool(is_causal)
    if is_hidden_or_zero.all() and matches_causal.all():
        return True
    raise ValueError(f"attn_mask must be the causal mask, or hide nothing, got another one: {advice}")
