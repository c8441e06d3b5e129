"""Packed rows: an id per token says which document it belongs to."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lightning_longnet.attention.parallel.placement import Placement


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


def pieces_of(x: Tensor) -> list[Tensor]:
    """Of each row (value, how often), one after the other."""
    rows = x if x.dim() == 2 else x[None]
    found = [torch.unique_consecutive(row.cpu().long(), return_counts=True) for row in rows]
    return [torch.stack(each, 1) for each in found]


def placed(pieces: Sequence[Sequence[int]], placement: Placement, rank: int) -> list[tuple[int, int, int]]:
    """(where it begins in the whole, value, how often): a rank's pieces, cut where its stretches end."""
    found, at, left = [], 0, [list(piece) for piece in pieces]
    for stretch in placement.stretches(rank):
        begin = stretch.begin
        while begin < stretch.end:
            value, count = left[at]
            taken = min(count, stretch.end - begin)
            found.append((begin, value, taken))
            begin += taken
            left[at][1] -= taken
            at += left[at][1] == 0
    return found


def cuts_of(pieces: Sequence[tuple[int, int]], length: int) -> tuple[int, ...]:
    cuts, at = [0], 0
    for (before, times), (after, _) in pairwise(pieces):
        at += times
        if after < before:
            raise ValueError(f"documents must not decrease along a row, got {before} followed by {after} at token {at}")
        if after != before:
            cuts.append(at)
    return (*cuts, length)


def changes(pieces: Sequence[tuple[int, int]]) -> Tensor:
    """Where padding begins and ends, in turn."""
    found, at, before = [], 0, 0
    for value, times in pieces:
        if value != before:
            found.append(at)
        at, before = at + times, value
    return torch.tensor(found, dtype=torch.long)
