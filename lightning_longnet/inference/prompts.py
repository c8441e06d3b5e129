"""Prompts: rows of tokens that are to be continued, and which of their columns are padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.sequence.context import SequenceContext


_POSITIONS = ("positions", "position_ids")
_BY_TOKEN = ("attention_mask", "documents", *_POSITIONS)


def fault_of_prompts(batch: Any) -> str:
    """Return why the rows of a batch are no prompts that can be continued, or an empty string."""
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), torch.Tensor):
        return ""  # which the step refuses
    input_ids, mask = batch["input_ids"], batch.get("attention_mask")
    if mask is not None and (fault := fault_of_mask(input_ids, mask)):
        return fault
    is_token = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask != 0
    for name in ("documents", *_POSITIONS):
        x = batch.get(name)
        if x is not None and x.shape not in (input_ids.shape, input_ids.shape[1:], (1, *input_ids.shape[1:])):
            return f"{name} must be (B, N), {tuple(input_ids.shape)} as input_ids, got shape {tuple(x.shape)}"
    if (documents := batch.get("documents")) is not None:
        ids = documents.expand(input_ids.shape)
        first = ids.gather(1, is_token.byte().argmax(1, keepdim=True))
        if place := _first_place(is_token & (ids != first)):
            return (
                f"documents must be the same in all tokens of a row that is to be continued, got "
                f"{int(first[place[0]])} and {int(ids[place])} in row {place[0]}: give rows that hold one text each, "
                f"as of a data module with packed=False"
            )
    for name in _POSITIONS:
        if (positions := batch.get(name)) is not None:
            index = is_token.cumsum(1) - 1
            given = positions.expand(input_ids.shape)
            if place := _first_place(is_token & (given != index)):
                return (
                    f"{name} must count the tokens of a row that is to be continued from 0, as without them, got "
                    f"{int(given[place])} at token {int(index[place])} of row {place[0]}: give rows that hold one text "
                    f"each, without {name}"
                )
    return ""


def whole_prompts(batch: Mapping[str, Tensor], context: SequenceContext) -> tuple[Tensor, Tensor | None]:
    """Return the prompts of a batch and their attention_mask, whole on every rank; None where there is no padding."""
    whole = {name: x for name in ("input_ids", *_BY_TOKEN) if (x := batch.get(name)) is not None}
    if context.is_split:
        # a rank sees documents and padding of its part alone, and all ranks must refuse a row
        whole = {name: context.gather_sequence(x, x.dim() - 1) for name, x in whole.items()}
    if fault := fault_of_prompts(whole):
        raise ValueError(fault)
    mask = whole.get("attention_mask")
    return whole["input_ids"], None if mask is None or bool(mask.all()) else mask


def _first_place(where: Tensor) -> tuple[int, int] | None:
    """Return the row and the column of the first True of (B, N); None where there is none."""
    places = where.nonzero()
    return (int(places[0, 0]), int(places[0, 1])) if len(places) else None


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
