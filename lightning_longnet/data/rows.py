"""Rows of tokens as samples, of which a rank can read only its part."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.utils.data import Dataset

from lightning_longnet.layers.loss import IGNORED
from lightning_longnet.sequence import SequencePart

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from lightning_longnet.attention.parallel.placement import Placement
    from lightning_longnet.data.streams import Stream

Row = dict[str, "Tensor"]
Sample = Row | SequencePart


class Rows(ABC):
    """Rows with a fixed number of tokens, addressed by their index.

    Attributes:
        tokens: number of tokens in a row.
        identity: a text that is equal for equal rows on all ranks, and different for other rows.
    """

    tokens: int
    identity: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, i: int, begin: int, end: int) -> Row:
        """Return tokens `begin` to `end` of row `i`: input_ids and labels (end - begin,), and optionally documents."""


class Windows(Rows):
    """A stream that is cut into rows.  The target of each token is the next token, also of the next document."""

    def __init__(self, stream: Stream, tokens: int) -> None:
        if len(stream) <= tokens:
            raise ValueError(f"tokens must be less than the {len(stream):,} tokens of the data, got {tokens:,}")
        self.stream, self.tokens, self.identity = stream, tokens, f"{stream.identity}/{tokens}"

    def __len__(self) -> int:
        return (len(self.stream) - 1) // self.tokens

    def read(self, i: int, begin: int, end: int) -> Row:
        first = i * self.tokens
        piece = self.stream.read(first + begin, first + end + 1)
        return {"input_ids": piece[:-1], "labels": self.stream.targets_of(piece[1:], first + begin + 1)}


class Cut:
    """The part of each row that this rank reads.

    Args:
        tokens: number of tokens in a row.
        placement: the placement of the tokens over the ranks that share a row; None reads whole rows.
        rank: the index of this rank among those.
    """

    def __init__(self, tokens: int, placement: Placement | None = None, rank: int = 0) -> None:
        assert placement is None or placement.length == tokens
        self.tokens, self._is_whole = tokens, placement is None
        self._ranges: tuple[tuple[int, int], ...] = ((0, tokens),)
        if placement is not None:
            self._ranges = tuple((begin, end) for begin, end, _ in placement.chunks(rank))

    def row(self, read: Callable[[int, int], Row], name: str, counts: bool = True) -> Sample:
        """Return this rank's part of a row: a dictionary for whole rows, otherwise a SequencePart.

        Args:
            read: returns tokens begin to end of the row.
            name: a name of the row that is equal on all ranks, by which the strategy checks that they read the same.
            counts: False sets all labels to the ignored one.
        """
        pieces = [read(begin, end) for begin, end in self._ranges]
        row = {key: torch.cat([piece[key] for piece in pieces]) for key in pieces[0]}
        if not counts:
            row["labels"] = torch.full_like(row["labels"], IGNORED)
        return row if self._is_whole else SequencePart(row, self.tokens, self._ranges, (name,))


class RowParts(Dataset[Sample]):
    """A dataset of this rank's parts of rows.

    An index past the last row gives a row without targets, which does not count.  `GlobalOrder` gives such indices to
    ranks without a sample in the last batch.

    Args:
        rows: the rows.
        cut: the part of each row that this rank reads; all of it by default.
    """

    def __init__(self, rows: Rows, cut: Cut | None = None) -> None:
        self.rows, self.cut = rows, cut or Cut(rows.tokens)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Sample:
        counts, i = i < len(self), i % len(self)
        return self.cut.row(partial(self.rows.read, i), f"{self.rows.identity}:{i}", counts)
