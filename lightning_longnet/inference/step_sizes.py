"""`StepSizes`: how many tokens a step of a cache takes, so that its memory is bounded."""

from __future__ import annotations

from math import lcm
from typing import TYPE_CHECKING, NamedTuple

from lightning_longnet.inference.layer import BRANCH_TOKENS
from lightning_longnet.inference.plan import is_plain

if TYPE_CHECKING:
    from collections.abc import Set

    from lightning_longnet.attention.pattern.pattern import Pattern

# The largest number of tokens of a step that sees no row of the cache, and of one that does
LONG_STEP = 16384
SHORT_STEP = 2048
# The largest number of scores, of all heads and rows of a batch, of a step that is computed with a mask over all rows
SCORES = 2**23


class StepSizes(NamedTuple):
    """What bounds the steps of a cache.

    Attributes:
        ranks: how many ranks share the cache.
        scores: the scores of one token in a step with a mask over all rows, of all heads and texts.
    """

    ranks: int
    scores: int

    def next_count(self, tokens: int, patterns: Set[Pattern], begins: Set[int]) -> int:
        """Return how many of that many further tokens the next step takes; `DilatedCache.next_count` calls it.

        Args:
            tokens: how many tokens are left.
            patterns: the patterns of the layers.
            begins: the positions of the next tokens of the texts.
        """
        lengths = [branch.segment_length for pattern in patterns for branch in pattern.branches]
        common = 0 if None in lengths else lcm(*(w for w in lengths if w is not None))
        if begins == {0} or (common and not any(begin % common for begin in begins)):
            count = min(tokens, LONG_STEP * self.ranks)  # of which each rank computes its share
            # a step that ends where all segments do leaves none to be seen by the next
            return count // common * common if common and tokens > count >= common else count
        if len(begins) == 1 and all(is_plain(pattern) for pattern in patterns):
            count = min(tokens, SHORT_STEP)
        else:
            count = max(1, min(tokens, BRANCH_TOKENS, SCORES // self.scores))
        if common and len(begins) == 1:
            count = min(count, common - next(iter(begins)) % common)
        return count
