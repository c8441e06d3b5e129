"""Documents and padding along packed rows, as run lengths: on one process, and put together from several ranks."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lightning_longnet.attention.parallel.placement import Placement


def document_cuts(documents: Tensor | None, batch: int, length: int) -> list[tuple[int, ...]]:
    """Return for each row the index at which each document begins, and the end of the last one.

    Args:
        documents: (B, N), an id per token that does not decrease along a row; None is one document a row.
    """
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
    """Return for each row its runs of equal values, (runs, 2): the value and the number of tokens."""
    rows = x if x.dim() == 2 else x[None]
    runs = [torch.unique_consecutive(row.cpu().long(), return_counts=True) for row in rows]
    return [torch.stack(each, 1) for each in runs]


def placed(pieces: Sequence[Sequence[int]], placement: Placement, rank: int) -> list[tuple[int, int, int]]:
    """Return a rank's runs as (index in the whole sequence, value, count), cut at the borders of its stretches."""
    runs, at, left = [], 0, [list(piece) for piece in pieces]
    for stretch in placement.stretches(rank):
        begin = stretch.begin
        while begin < stretch.end:
            value, count = left[at]
            taken = min(count, stretch.end - begin)
            runs.append((begin, value, taken))
            begin += taken
            left[at][1] -= taken
            at += left[at][1] == 0  # the run is used up
    return runs


def cuts_of(pieces: Sequence[tuple[int, int]], length: int) -> tuple[int, ...]:
    """Return the index at which each document of a row begins, and its length, from the runs (id, count) of the row."""
    cuts, at = [0], 0
    for (before, times), (after, _) in pairwise(pieces):
        at += times
        if after < before:
            raise ValueError(f"documents must not decrease along a row, got {before} followed by {after} at token {at}")
        if after != before:
            cuts.append(at)
    return (*cuts, length)


def changes(pieces: Sequence[tuple[int, int]]) -> Tensor:
    """Return the indices at which padding begins and ends, alternately, from the runs (is padding, count) of a row."""
    borders, at, before = [], 0, 0
    for value, times in pieces:
        if value != before:
            borders.append(at)
        at, before = at + times, value
    return torch.tensor(borders, dtype=torch.long)
