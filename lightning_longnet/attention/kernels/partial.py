"""The currency between blocks: an attention output and the log-sum-exp of the scores that made it."""

from __future__ import annotations

from math import inf, log
from typing import NamedTuple

import torch
from torch import Tensor


class Partial(NamedTuple):
    """`out` (..., D) is the softmax-weighted mean over some keys, `lse` (..., 1) the log of their weights' sum.

    Partials over disjoint keys add up in any order; one that saw no key (`lse == -inf`, `out == 0`) changes nothing.
    """

    out: Tensor
    lse: Tensor

    def add_(self, out: Tensor, lse: Tensor, weight: int = 1) -> None:
        """Take in the keys of another partial, each counted `weight` times; a negative weight takes them out again."""
        lse = lse + log(abs(weight)) if abs(weight) != 1 else lse
        if weight > 0:
            share = torch.sigmoid(lse - self.lse).masked_fill_(lse == -inf, 0)
            total = torch.logaddexp(self.lse, lse)
        else:
            # 1 - exp(lse - self.lse), as accurate for shares near 0 as for shares near 1
            kept = -torch.expm1((lse - self.lse).masked_fill_(lse == -inf, -inf))
            # What is left is rounding where all was taken away: it weighs no more than the rounding of the sum itself
            gone = kept <= 64 * torch.finfo(kept.dtype).eps * self.lse.abs().clamp_min_(1)
            kept.masked_fill_(gone, 1)
            share = (1 - 1 / kept).masked_fill_(gone, 0)
            total = (self.lse + kept.log()).masked_fill_(gone, -inf)
            self.out.masked_fill_(gone, 0)
        self.out.lerp_(out.to(self.out.dtype), share)
        self.lse.copy_(total)
