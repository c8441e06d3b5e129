"""Whole documents packed into rows."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import TYPE_CHECKING

import numpy as np
import torch

from lightning_longnet.data.rows import Row, Rows
from lightning_longnet.data.streams import Stream, documents_of
from lightning_longnet.layers.loss import IGNORED

if TYPE_CHECKING:
    from collections.abc import Sequence


class PackedRows(Rows):
    """Documents that are never cut but where one is longer than a row, and never share a target or attention.

    Each row has `documents`, an id per token that rises along it: attention stays within them.  The last token of a
    document has no target.  What is left of a row is a document of `pad` tokens without targets.

    Args:
        stream: whose documents they are.
        tokens: in each row; longer documents go on in another.
        pad: the token that fills a row.
    """

    def __init__(self, stream: Stream, tokens: int, pad: int = 0) -> None:
        self.stream, self.tokens, self.pad = stream, tokens, pad
        self.identity = f"{stream.identity}/{tokens} packed"
        pieces = [
            (begin, min(begin + tokens, end), end)
            for first, end in documents_of(stream)
            for begin in range(first, end, tokens)
        ]
        if not pieces:
            raise ValueError(f"the data must hold documents to fill rows of {tokens:,} tokens, got none")
        rows = packed([end - begin for begin, end, _ in pieces], tokens)
        # arrays, not lists: worker processes share them
        self._pieces = np.array([pieces[piece] for row in rows for piece in row], dtype=np.int64)
        self._borders = np.cumsum([0, *map(len, rows)])

    def __len__(self) -> int:
        return len(self._borders) - 1

    def read(self, i: int, begin: int, end: int) -> Row:
        pieces = self._pieces[self._borders[i] : self._borders[i + 1]].tolist()
        ids = torch.full((end - begin,), self.pad)
        labels = torch.full_like(ids, IGNORED)
        documents = torch.full_like(ids, len(pieces))
        at = 0
        for number, (first, last, document_end) in enumerate(pieces):
            low, high = max(at, begin), min(at + last - first, end)
            if low < high:
                skipped = first - at  # from a place in the row to one in the stream
                found = self.stream.read(low + skipped, min(high + skipped + 1, document_end))
                ids[low - begin : high - begin] = found[: high - low]
                labels[low - begin : low - begin + len(found) - 1] = found[1:]
                documents[low - begin : high - begin] = number
            at += last - first
        return {"input_ids": ids, "labels": labels, "documents": documents}


def packed(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Which pieces each row holds: the longest first, each where it leaves the least space."""
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (what is left, row), in rising order
    for piece in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(spaces, (lengths[piece], 0))
        if place < len(spaces):
            left, row = spaces.pop(place)
        else:
            left, row = tokens, len(rows)
            rows.append([])
        rows[row].append(piece)
        if left > lengths[piece]:
            insort(spaces, (left - lengths[piece], row))
    return [sorted(row) for row in rows]
