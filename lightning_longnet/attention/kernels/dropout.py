"""Which pairs dropout takes: a rule of seed, sample, head, query, key and branch, never of how the work was split.

Every query and every key gets a word; a pair's fate is one multiplication and one mixing round of the two.  A word
costs one hash a row, so a pair costs a few integer instructions, and any part of the whole can be drawn on its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

_KEYS = 0  # the role of a word; queries of branch b have role 1 + b


@dataclass(frozen=True)
class Dropout:
    """Drops each pair with this probability; what stays is scaled by 1 / (1 - probability).

    Row b of the batch is sample `first_sample` + `sample_step` b.
    """

    probability: float
    seed: int
    first_sample: int = 0
    sample_step: int = 1

    def query_words(self, rows: Tensor, tokens: Tensor, heads: Tensor, branch: int) -> Tensor:
        """(rows, tokens, heads), for a branch's place among the branches; 0 where each pair is counted once."""
        samples = self.first_sample + self.sample_step * rows
        words = hashed(hashed(self._role(1 + branch, heads) + samples[:, None]) + heads)
        return _word(words[:, None] + tokens[:, None])

    def key_words(self, tokens: Tensor) -> Tensor:
        return _word(self._role(_KEYS, tokens) + tokens)

    def keeps(self, query_words: Tensor, key_words: Tensor) -> Tensor:
        """All bits set where a pair stays, none where it is dropped: what a float's bits are masked with.

        Comparisons and boolean masks cost ten times as much on a CPU as integer arithmetic.
        """
        pairs = query_words * key_words
        pairs ^= pairs >> 15
        pairs *= 0x2C1B3C6D
        pairs >>= 1
        pairs &= 0x7FFFFFFF
        return (pairs.neg_() + (round(self.probability * 2**31) - 1)) >> 31

    def _role(self, role: int, like: Tensor) -> Tensor:
        return hashed(hashed(torch.full((), self.seed, dtype=torch.int64, device=like.device)) + role)


def hashed(x: Tensor) -> Tensor:
    """splitmix64, on wrapping signed integers."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ (x >> 30 & 2**34 - 1)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> 27 & 2**37 - 1)) * _signed(0x94D049BB133111EB)
    return x ^ (x >> 31 & 2**33 - 1)


def _word(x: Tensor) -> Tensor:
    """Odd, so that a product with it loses no bit."""
    return (hashed(x) >> 32).to(torch.int32) | 1


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x
