"""Packing of whole documents into rows."""

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
    """Rows of whole documents.  Only a document that is longer than a row is cut, and continues in another row.

    Each row has `documents`, ids of the documents that increase along it, so that attention stays within a document.
    The last token of a document has no target.  The rest of a row is a document of `pad` tokens without targets.

    Args:
        stream: the documents.
        tokens: number of tokens in a row.
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
        # arrays instead of lists, so that forked worker processes share their memory
        self._pieces = np.array([pieces[piece] for row in rows for piece in row], dtype=np.int64)
        self._borders = np.cumsum([0, *map(len, rows)])

    def __len__(self) -> int:
        return len(self._borders) - 1

    def read(self, i: int, begin: int, end: int) -> Row:
        pieces = self._pieces[self._borders[i] : self._borders[i + 1]].tolist()
        ids = torch.full((end - begin,), self.pad)
        labels = torch.full_like(ids, IGNORED)
        documents = torch.full_like(ids, len(pieces))
        offset = 0
        for number, (first, last, document_end) in enumerate(pieces):
            low, high = max(offset, begin), min(offset + last - first, end)
            if low < high:
                skipped = first - offset  # offset from an index in the row to one in the stream
                chunk = self.stream.read(low + skipped, min(high + skipped + 1, document_end))
                ids[low - begin : high - begin] = chunk[: high - low]
                targets = self.stream.targets_of(chunk[1:], low + skipped + 1)
                labels[low - begin : low - begin + len(targets)] = targets
                documents[low - begin : high - begin] = number
            offset += last - first
        return {"input_ids": ids, "labels": labels, "documents": documents}


def packed(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Pack pieces into rows, and return the sorted indices of the pieces of each row.

    The pieces are placed by decreasing length, each into the row where it leaves the least space (best fit decreasing).

    Args:
        lengths: the length of each piece, at most `tokens`.
        tokens: the length of a row.
    """
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (free tokens, row), ascending
    for piece in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(spaces, (lengths[piece], 0))
        if place < len(spaces):
            free, row = spaces.pop(place)
        else:
            free, row = tokens, len(rows)
            rows.append([])
        rows[row].append(piece)
        if free > lengths[piece]:
            insort(spaces, (free - lengths[piece], row))
    return [sorted(row) for row in rows]
