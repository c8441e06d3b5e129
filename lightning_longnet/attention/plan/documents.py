"""Packed rows: an id for each token says to which document it belongs.

Ranks exchange ids and padding masks in run-length form: a sequence of (value, count).
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lightning_longnet.attention.parallel.placement import Placement


def document_cuts(documents: Tensor | None, batch: int, length: int) -> list[tuple[int, ...]]:
    """Return the cuts of each row: the first token of each document, and the end of the last one.

    `documents` are ids (B, N), which must not decrease along a row; None is one document.  It serves whole sequences:
    the kernel "reference", `packed_rows` and the callback `TokenThroughput` call it.  Of sequences that are split over
    ranks `cuts_of` returns the same.
    """
    if documents is None:
        return [(0, length)] * batch
    if batch > 1 and documents.stride(0) == 0:  # expanded from one row
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
    return [(0, *inner, length) for inner in borders]


def run_lengths_of(x: Tensor) -> list[Tensor]:
    """Return the runs of each row of x, (B, N) or (N,), as tensors (runs, 2) of (value, count).

    `SequenceShard` calls it for the ids and the padding of this rank's tokens, which the ranks then exchange.
    """
    rows = x if x.dim() == 2 else x[None]
    counts = [torch.unique_consecutive(row.cpu().long(), return_counts=True) for row in rows]
    return [torch.stack(values_and_counts, 1) for values_and_counts in counts]


def runs_on_rank(runs: Sequence[Sequence[int]], placement: Placement, rank: int) -> list[tuple[int, int, int]]:
    """Return the runs (value, count) of a rank's own tokens as runs of the whole sequence, (first token, value, count).

    Each `SequenceShard`, when it is made, calls it for the runs of all ranks: a value is a document's id, or that of a
    padding mask.  A run that spans several chunks of the rank is cut where they end.  What follows the rank's last
    token is not read: ranks have unequal numbers of runs, and fill up with (0, 0).
    """
    result, at, left = [], 0, [list(run) for run in runs]
    for chunk in placement.chunks(rank):
        begin = chunk.begin
        while begin < chunk.end:
            value, count = left[at]
            taken = min(count, chunk.end - begin)
            result.append((begin, value, taken))
            begin += taken
            left[at][1] -= taken
            at += left[at][1] == 0  # the next run, once this one is used up
    return result


def cuts_of(runs: Sequence[tuple[int, int]], length: int) -> tuple[int, ...]:
    """Return the cuts of a row of `length` tokens, (0, ..., length), from the runs of its document ids.

    `SequenceShard` calls it with the runs of all ranks.  Ids that decrease raise a ValueError.
    """
    cuts, at = [0], 0
    for (before, times), (after, _) in pairwise(runs):
        at += times
        if after < before:
            raise ValueError(f"documents must not decrease along a row, got {before} followed by {after} at token {at}")
        if after != before:
            cuts.append(at)
    return (*cuts, length)


def change_points(runs: Sequence[tuple[int, int]]) -> Tensor:
    """Return the tokens at which the value of a padding mask changes, ascending; the first is a change from 0.

    `SequenceShard` calls it for each row of the batch: a token with an odd number of changes up to it is padding.
    """
    tokens, at, before = [], 0, 0
    for value, times in runs:
        if value != before:
            tokens.append(at)
        at, before = at + times, value
    return torch.tensor(tokens, dtype=torch.long)
