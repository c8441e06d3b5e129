"""A dropout mask that does not depend on how the work is split over blocks and ranks.

Whether a pair is dropped is a function of the seed, the sample, the head, the query, the key and the branch.  Every
query and every key gets a hash, its word, at the cost of one hash a row.  The decision for a pair multiplies the two
words and mixes the product once, which takes a few integer instructions.  So any tile of the mask can be computed
without the rest, and the backward computes it again instead of storing it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

_KEYS = 0  # the role that is hashed into the words of keys; the queries of branch b have the role 1 + b


@dataclass(frozen=True)
class Dropout:
    """A rule that drops each pair with `probability`; the weights that stay are scaled by 1 / (1 - probability).

    A forward and its backward make it from one seed (`_pass_options` of op.py) and drop the same pairs;
    `_attend_reference` makes it for the kernel "reference".  Row b of the batch is sample
    `first_sample + sample_step * b`, so that ranks with different samples of one batch drop different pairs.
    """

    probability: float
    seed: int
    first_sample: int = 0
    sample_step: int = 1

    def query_words(self, rows: Tensor, tokens: Tensor, heads: Tensor, branch: int) -> Tensor:
        """Return the words of queries, (rows, tokens, heads), of type int32.

        `PairOptions.query_words` calls it for the block kernels, which compute the masks of their blocks from them, and
        the kernel "reference" for all pairs.

        Args:
            rows: indices in the batch.
            tokens: indices in the whole sequence.
            heads: indices of the query heads.
            branch: the index of the branch.  It is 0 for all branches where a pair counts once, whichever of them
                computes it.
        """
        samples = self.first_sample + self.sample_step * rows
        words = splitmix64(splitmix64(self._role(1 + branch, heads) + samples[:, None]) + heads)
        return _word(words[:, None] + tokens[:, None])

    def token_words(self, rows: Tensor, tokens: Tensor, heads: Tensor, branch: int) -> Tensor:
        """Return the words of queries, (tokens, heads), each token with the index of its own row in the batch.

        `PairOptions.query_words` calls it where `unsharded_call` has joined the rows of a batch to one long row.
        """
        samples = self.first_sample + self.sample_step * rows
        words = splitmix64(splitmix64(self._role(1 + branch, heads) + samples)[:, None] + heads)
        return _word(words + tokens[:, None])

    def key_words(self, tokens: Tensor) -> Tensor:
        """Return the words of keys, of the shape of `tokens`: one a token, the same for all samples and heads.

        `PairOptions.key_words` calls it for the keys of this rank, `RoundsCall` for those that a round received, and
        the kernel "reference" for all.
        """
        return _word(self._role(_KEYS, tokens) + tokens)

    def keep_bits(self, query_words: Tensor, key_words: Tensor) -> Tensor:
        """Return an int32 for each pair: -1 (all bits set) if the pair stays, and 0 if it is dropped.

        The words broadcast, as (..., queries, 1) and (..., 1, keys).  The eager kernel takes `&` of the result and the
        bits of its floats, which leaves a float or makes it 0: comparisons and boolean masks cost ten times as much on
        a CPU as integer arithmetic.  `_Tile.apply_dropout` of the kernel "eager" calls it for each tile, and the kernel
        "reference" for each sample.
        """
        # mixing steps of a 32-bit integer hash, on wrapping integers
        pairs = query_words * key_words
        pairs ^= pairs >> 15
        pairs *= 0x2C1B3C6D
        pairs >>= 1
        pairs &= 0x7FFFFFFF
        # pairs is now uniform in 0 ... 2^31 - 1, and stays iff it is at least t = round(probability * 2^31): then
        # t - 1 - pairs is negative
        return (pairs.neg_() + (round(self.probability * 2**31) - 1)) >> 31

    def _role(self, role: int, like: Tensor) -> Tensor:
        """Return a hash of the seed and a role, a scalar on the device of `like`."""
        return splitmix64(splitmix64(torch.full((), self.seed, dtype=torch.int64, device=like.device)) + role)


def splitmix64(x: Tensor) -> Tensor:
    """Return the splitmix64 hash of each integer, computed on wrapping signed integers.

    `DropoutSeeds` makes the seeds of a step and of its layers with it, too.
    """
    # >> copies the sign bit; the masks clear the copies, as an unsigned shift would
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ (x >> 30 & 2**34 - 1)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> 27 & 2**37 - 1)) * _signed(0x94D049BB133111EB)
    return x ^ (x >> 31 & 2**33 - 1)


def _word(x: Tensor) -> Tensor:
    """Return the upper half of the hash as an odd int32: a product with an odd word loses no bit of the other."""
    return (splitmix64(x) >> 32).to(torch.int32) | 1


def _signed(x: int) -> int:
    """Return the signed 64-bit integer that has the bits of an unsigned one."""
    return x - 2**64 if x >= 2**63 else x
