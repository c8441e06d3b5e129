"""Null keys, of score 0 and value 0: the padding of segments that are not full, for `Branch(ragged="zero_keys")`.

No kernel computes them.  A query with z null keys has `log z` more in its log-sum-exp, and its out shrinks by as much;
the backward of a block takes both as they are.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.attention.kernels.partial import Partial
    from lightning_longnet.attention.pattern.pattern import Pattern


@lru_cache(32)
@torch.inference_mode(False)  # a cached tensor made in inference mode could not be used in training
def _cuts_on(device: torch.device, cuts: tuple[int, ...]) -> Tensor:
    """Return the cuts as a tensor on a device."""
    return torch.tensor(cuts, device=device)


class NullKeys(NamedTuple):
    """The null keys of the queries of one call.

    `_line_call` makes it for whole sequences, `RankCall.pair_options` for a rank's part.

    Attributes:
        pattern: which of its branches have them.
        cuts: where the documents begin, and where the last one ends.
        tokens: (N,) the index in the whole sequence of each query.
        heads, kv_heads: of the whole layer.
        own_heads: the query heads that the call computes.
    """

    pattern: Pattern
    cuts: tuple[int, ...]
    tokens: Tensor
    heads: int
    kv_heads: int
    own_heads: slice = slice(None)

    def add_to(self, partial: Partial, branch: int | None) -> None:
        """Merge the null keys of a branch into its partial, in place; where `branch` is None, those of all branches.

        `branch` is its number in `Pattern.ordered()`.  `merge_branches` calls it at the end of a forward; `RoundsCall`
        calls it in a backward where "detached" computes the result of a branch again.
        """
        ordered = self.pattern.ordered()
        branches = [b for b in (ordered if branch is None else ordered[branch : branch + 1]) if b.has_null_keys]
        if not branches:
            return
        tokens = self.tokens.to(partial.lse.device)
        cuts = _cuts_on(tokens.device, self.cuts)
        document = torch.searchsorted(cuts, tokens, right=True) - 1
        lengths, positions = cuts.diff()[document], tokens - cuts[document]  # in their documents
        counts = branches[0].null_keys(positions, lengths, self.kv_heads)
        for other in branches[1:]:
            counts = counts + other.null_keys(positions, lengths, self.kv_heads)
        per_query = counts.repeat_interleave(self.heads // self.kv_heads, 0)[self.own_heads]
        partial.add_logits_(per_query.T[..., None].to(partial.lse.dtype).log())
