"""The states of a text, block by block: in flat memory where the model can use a cache, and otherwise at once."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from math import lcm
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_longnet.evaluation.ranks import Ranks
from lightning_longnet.inference.cache import DilatedCache, refusal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning_longnet.models.blocks import BlocksConfig
    from lightning_longnet.models.longnet import LongNet

_BLOCK = 16384  # the largest number of tokens of a block
_WHOLE = 2**62


class TextStates:
    """A text of which `encode` returns the states of one block after the other.

    Args:
        model: the model, in evaluation mode.
        separator: the token that ends a document; None where the text is one document.
        cache: a cache that holds the tokens before the first block; a new one by default.
        ranks: the ranks that share the text; this process alone by default.

    Attributes:
        documents: the number of documents that have ended.
        cache: the cache; None where the model cannot use one.
    """

    def __init__(
        self,
        model: LongNet,
        separator: int | None = None,
        cache: DilatedCache | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.model, self.separator, self.documents = model, separator, 0
        self.cache, self.ranks = cache, Ranks() if ranks is None else ranks
        if cache is None and refusal(model.config) is None:
            self.cache = model.new_cache(group=self.ranks.group)

    def document_ids(self, ids: Tensor) -> Tensor:
        """Return the number (n,) of the document that each of the tokens ids (n,), which come next, is in."""
        if self.separator is None:
            return torch.zeros_like(ids)
        ends = (ids == self.separator).long()
        return ends.cumsum(0) - ends + self.documents

    @torch.no_grad()
    def encode(self, ids: Tensor) -> Tensor:
        """Return the states (n, dim) of the next tokens ids (n,), on the device of the model.

        Of ranks that share the text, each gets those of `ranks.share(n)`.
        """
        placed, share = ids[None].to(self.model.head.weight.device), self.ranks.share(len(ids))
        documents = None if self.separator is None else self.document_ids(placed[0])[None]
        if self.cache is not None:
            states = self.model.encode(self.model.embed(placed), documents=documents, cache=self.cache)[0, share]
        elif self.ranks.size == 1:
            states = self.model.encode(self.model.embed(placed), documents=documents)[0]
        else:
            with self.ranks.context.parts_of(len(ids)):
                own = None if documents is None else documents[:, share]
                states = self.model.encode(self.model.embed(placed[:, share]), documents=own)[0]
        if self.separator is not None:
            self.documents += int((ids == self.separator).sum())
        return states


@contextmanager
def one_text(model: LongNet) -> Iterator[None]:
    """Read the blocks of a text without a warning of what the patterns reach.

    A block does not know the length of the text, for which the caller warns afterwards.
    """
    checked, model._checked_length = model._checked_length, sys.maxsize
    try:
        yield
    finally:
        model._checked_length = checked


@torch.no_grad()
def row_states(model: LongNet, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the index of the first token and the states (B, n, dim) of consecutive blocks of rows (B, N)."""
    size, count = block_tokens(model.config), rows.shape[1]
    cache = model.new_cache(len(rows)) if count > size else None
    for begin in range(0, count, min(size, count)):
        x = model.embed(rows[:, begin : begin + size].to(model.head.weight.device))
        yield begin, model.encode(x) if cache is None else model.encode(x, cache=cache)


def block_tokens(config: BlocksConfig) -> int:
    """Return the number of tokens of the blocks in which a model reads a text.

    Blocks that end where all segments of the patterns do leave no keys for later ones, so they are preferred.
    """
    if refusal(config) is not None:
        return _WHOLE
    lengths = [branch.segment_length for pattern in config.patterns for branch in pattern.branches]
    if None in lengths:
        return _BLOCK
    common = lcm(*(length for length in lengths if length is not None))
    return _BLOCK // common * common if common <= _BLOCK else _BLOCK
