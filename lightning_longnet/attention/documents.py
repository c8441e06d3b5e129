"""Packed rows: an id per token says which document it belongs to."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def document_cuts(documents: Tensor | None, batch: int, length: int) -> list[tuple[int, ...]]:
    """Where the documents of each row begin, and where the last one ends."""
    if documents is None:
        return [(0, length)] * batch
    if batch > 1 and documents.stride(0) == 0:  # one row for all samples
        return document_cuts(documents[:1], 1, length) * batch
    steps = documents.long().diff(dim=1)  # narrow and unsigned integers would wrap around
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
