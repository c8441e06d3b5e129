"""Packed rows: an id per token says which document it belongs to."""

from __future__ import annotations

import torch
from torch import Tensor


def document_cuts(documents: Tensor | None, batch: int, length: int) -> list[tuple[int, ...]]:
    """Where the documents of each row begin, and where the last one ends."""
    if documents is None:
        return [(0, length)] * batch
    steps = documents.diff(dim=1)
    if (decreasing := (steps < 0).nonzero()).numel():
        row, place = decreasing[0].tolist()
        before, after = documents[row, place].item(), documents[row, place + 1].item()
        raise ValueError(
            f"documents must not decrease along a row, got {before} followed by {after} at row {row}, token {place + 1}"
        )
    borders: list[list[int]] = [[] for _ in range(batch)]
    for row, place in steps.nonzero().tolist():
        borders[row].append(place + 1)
    return [(0, *found, length) for found in borders]


def document_index(documents: Tensor) -> Tensor:
    """Each token's place in its own document, for one row (N,) of ids."""
    place = torch.arange(documents.shape[0], device=documents.device)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[1:] = documents.diff() != 0
    return place - torch.where(begins, place, 0).cummax(0).values
