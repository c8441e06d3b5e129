"""`PairOptions`: what all blocks of a call have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.attention.kernels.dropout import Dropout
    from lightning_longnet.attention.kernels.null_keys import NullKeys


class PairOptions(NamedTuple):
    """The options that hold for every pair of a call, whichever block computes it.

    `_line_call` makes them for whole sequences, `RankCall.pair_options` for a rank's part.

    Attributes:
        scale: the factor of the scores.
        key_padding_mask: (B, N) of the keys on this rank, True where padding masks one.
        dropout: the rule that drops pairs, or None.
        samples: (B,) the rows of the batch, as dropout numbers them; of rows that are joined to one long row, (N,) that
            of each token.
        tokens: (N,) the index in the whole sequence of each token on this rank.
        first_head: the first query head on this rank, where ranks hold different heads.
        counts_once: whether a pair is one and the same in whichever branch it is computed.
        per_branch: whether a total has the keys of one branch alone, of which a query may lose all to a block of
            negative weight.  In a total of all branches it loses a key only that another branch shows, too.
        branches: the index of each branch in the whole pattern; empty where these are all branches.
        masks_later: whether each key is masked that comes later in the sequence than the query.
        sinks: (H,) one more logit of the softmax for each query head on this rank, without a value.
        null_keys: the keys of score 0 and value 0 of the queries on this rank, or None.
        softcap: the bound of the scores, or None.
    """

    scale: float
    key_padding_mask: Tensor | None = None
    dropout: Dropout | None = None
    samples: Tensor | None = None
    tokens: Tensor | None = None
    first_head: int = 0
    counts_once: bool = False
    per_branch: bool = False
    branches: tuple[int, ...] = ()
    masks_later: bool = False
    sinks: Tensor | None = None
    null_keys: NullKeys | None = None
    softcap: float | None = None

    def of_samples(self, samples: slice, batch: int) -> PairOptions:
        """Return the options of some of `batch` samples.

        Rows that are joined to one long row are one sample, of which dropout has a number for each token.
        `forward_blocks` and `backward_blocks` call it for the task of a thread.
        """
        if self.samples is None or len(self.samples) != batch:
            return self
        return self._replace(samples=self.samples[samples])

    def key_words(self) -> Tensor | None:
        """Return dropout's word, a hash, for each key on this rank, (N,); None without dropout.

        `RoundsCall` calls it once in a forward or backward, and gives the words to `OwnKeys`.
        """
        if self.dropout is None:
            return None
        assert self.tokens is not None
        return self.dropout.key_words(self.tokens)

    def key_tokens(self) -> Tensor | None:
        """Return the index in the whole sequence of each key on this rank, (N,); None unless later keys are masked.

        `RoundsCall` calls it once in a forward or backward, and gives them to `OwnKeys`.
        """
        return self.tokens if self.masks_later else None

    def query_words(self, q: Tensor, branch: int) -> Tensor:
        """Return dropout's word, a hash, for each query of q (B, N, H, D) in a branch: (B, N, H, 1).

        `branch` is an index in `branches`, if there are any.  `kernel_calls` calls it for each branch.
        """
        assert self.dropout is not None
        assert self.samples is not None
        assert self.tokens is not None
        heads = torch.arange(q.shape[2], device=q.device) + self.first_head
        role = 0 if self.counts_once else self.branches[branch] if self.branches else branch
        if len(self.samples) != len(q):
            return self.dropout.token_words(self.samples, self.tokens, heads, role)[None, ..., None]
        return self.dropout.query_words(self.samples, self.tokens, heads, role).unsqueeze(-1)
