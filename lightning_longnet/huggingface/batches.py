"""Batches for a model of transformers: their names, and what is wrong in them though nothing would fail."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_longnet.sequence.parts import SequencePart

_NAMES = {"position_ids": "positions", "shift_labels": "labels"}
_LEAST = 4  # labels, below which equal tokens are no evidence
_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def named_as_ours(batch: Any) -> Any:
    """Return a batch with transformers' names `position_ids` and `shift_labels` as `positions` and `labels`."""
    if not isinstance(batch, Mapping) or not any(name in batch for name in _NAMES):
        return batch
    kept = {name: x for name, x in batch.items() if name not in _NAMES}
    return kept | {ours: batch[theirs] for theirs, ours in _NAMES.items() if theirs in batch}


def fault_of_batch(batch: Any) -> str:
    """Return why a batch would train something else than what its owner means, or an empty string."""
    tensors: Any = batch.tensors if isinstance(batch, SequencePart) else batch
    if not isinstance(tensors, Mapping):
        return ""  # which the step refuses
    if fault := fault_of_packing(tensors):
        return fault
    ids, labels = tensors.get("input_ids"), tensors.get("labels")
    if "shift_labels" not in tensors and _are_unshifted(ids, labels):
        return (
            "labels must be shifted by the data: labels[:, t] is the token after input_ids[:, t], and these labels are "
            "the input_ids themselves, which transformers' own Trainer shifts inside of the model. Give labels = "
            "input_ids[:, 1:] with -100 at the end of each row and document"
        )
    mask = tensors.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and not isinstance(batch, SequencePart):
        if bool((mask[:, 1:].bool() & ~mask[:, :-1].bool()).any()):
            return (
                "attention_mask must be 0 at the end of rows alone, got padding before tokens: set "
                "tokenizer.padding_side = 'right', as padding on the left is for generation"
            )
    elif isinstance(mask, Tensor) and mask.dim() != 2:
        return f"attention_mask must be (B, N), 0 where padding is, got shape {tuple(mask.shape)}"
    return ""


def fault_of_packing(batch: Any) -> str:
    """Return why a batch that names packed documents as transformers' kernels do is refused, or an empty string."""
    for name in _PACKING if isinstance(batch, Mapping) else ():
        if batch.get(name) is not None:
            return f"{name} is not read: give documents, (B, N), or position_ids that restart at 0 in each document"
    return ""


def _are_unshifted(ids: Any, labels: Any) -> bool:
    """Whether labels are the input tokens where they are given, and not all the same token."""
    if not isinstance(ids, Tensor) or not isinstance(labels, Tensor) or ids.shape != labels.shape:
        return False
    counts = labels != -100
    given = labels[counts]
    if len(given) < _LEAST or not torch.equal(given, ids[counts]):
        return False
    return bool((given != given[0]).any())
