"""Samples: rows of tokens, each of which can be read in part."""

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
    """Rows of `tokens` tokens, addressed by their number.

    Attributes:
        tokens: in each row.
        identity: the same for equal rows on all ranks; others have another.
    """

    tokens: int
    identity: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, i: int, begin: int, end: int) -> Row:
        """Tokens `begin` to `end` of row `i`: `input_ids`, `labels`, the targets of each, and what else there is."""


class Windows(Rows):
    """A stream cut into rows; the target of each token is the one that follows, across documents too."""

    def __init__(self, stream: Stream, tokens: int) -> None:
        if len(stream) <= tokens:
            raise ValueError(f"tokens must be less than the {len(stream):,} tokens of the data, got {tokens:,}")
        self.stream, self.tokens, self.identity = stream, tokens, f"{stream.identity}/{tokens}"

    def __len__(self) -> int:
        return (len(self.stream) - 1) // self.tokens

    def read(self, i: int, begin: int, end: int) -> Row:
        first = i * self.tokens
        piece = self.stream.read(first + begin, first + end + 1)
        return {"input_ids": piece[:-1], "labels": piece[1:]}


class Cut:
    """What of each row this rank reads: all of it, or the tokens that it is to hold.

    Args:
        tokens: of a row.
        placement: of them over the ranks that share it; None for whole rows.
        rank: this rank among them.
    """

    def __init__(self, tokens: int, placement: Placement | None = None, rank: int = 0) -> None:
        assert placement is None or placement.length == tokens
        self.tokens, self._is_whole = tokens, placement is None
        self._stretches: tuple[tuple[int, int], ...] = ((0, tokens),)
        if placement is not None:
            self._stretches = tuple((begin, end) for begin, end, _ in placement.stretches(rank))

    def row(self, read: Callable[[int, int], Row], name: str, counts: bool = True) -> Sample:
        """What `read` gives of it, with its name where ranks hold different tokens; without targets if it is none."""
        pieces = [read(begin, end) for begin, end in self._stretches]
        row = {key: torch.cat([piece[key] for piece in pieces]) for key in pieces[0]}
        if not counts:
            row["labels"] = torch.full_like(row["labels"], IGNORED)
        return row if self._is_whole else SequencePart(row, self.tokens, self._stretches, (name,))


class RowParts(Dataset[Sample]):
    """Rows as a loader takes them.

    A row past the end is one that does not count: it has no targets.  Ranks whose number does not divide the samples
    are handed those in the last batch.
    """

    def __init__(self, rows: Rows, cut: Cut | None = None) -> None:
        self.rows, self.cut = rows, cut or Cut(rows.tokens)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Sample:
        counts, i = i < len(self), i % len(self)
        return self.cut.row(partial(self.rows.read, i), f"{self.rows.identity}:{i}", counts)
