"""Prompts: rows of tokens that are to be continued, and which of their columns are padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.sequence.context import SequenceContext


def fault_of_prompts(batch: Any) -> str:
    """Return why the rows of a batch are no prompts that can be continued, or an empty string."""
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), torch.Tensor):
        return ""  # which the step refuses
    mask = batch.get("attention_mask")
    return "" if mask is None else fault_of_mask(batch["input_ids"], mask)


def whole_prompts(batch: dict[str, Tensor], context: SequenceContext) -> tuple[Tensor, Tensor | None]:
    """Return the prompts of a batch and their attention_mask, whole on every rank; None where there is no padding."""
    if not context.is_split and (fault := fault_of_prompts(batch)):  # of split batches the strategy asks before
        raise ValueError(fault)
    input_ids, mask = context.gather_sequence(batch["input_ids"]), batch.get("attention_mask")
    if mask is not None:
        mask = context.gather_sequence(mask)
    return input_ids, None if mask is None or bool(mask.all()) else mask


def fault_of_mask(input_ids: Tensor, attention_mask: Tensor) -> str:
    """Return why a mask says not which columns of prompts (B, N) are padding, or an empty string."""
    if attention_mask.shape != input_ids.shape:
        return f"attention_mask must be {tuple(input_ids.shape)} as input_ids, got shape {tuple(attention_mask.shape)}"
    if not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
        return "attention_mask must be 1 where a token is and 0 where padding is, and holds other values"
    if not bool(attention_mask.any(1).all()):
        row = int((~attention_mask.any(1)).nonzero()[0])
        return f"attention_mask must leave at least one token in each row, got none in row {row}"
    return ""
