"""The result of attention over some of the keys, in the form in which the results of blocks are merged."""

from __future__ import annotations

from math import inf, log
from typing import NamedTuple

import torch
from torch import Tensor


class Partial(NamedTuple):
    """The softmax over some of the keys: out (..., D), the weighted mean of their values, and lse (..., 1).

    Each block that a kernel computes gives one, and so do branches, ring steps and caches of inference.  The lse is the
    log-sum-exp of the scores of these keys.  Partials over disjoint keys can be merged in any order; the partial of no
    key (`lse == -inf`, `out == 0`) changes nothing.
    """

    out: Tensor
    lse: Tensor

    def of_samples(self, samples: slice) -> Partial:
        """Return views of some samples."""
        return Partial(self.out[samples], self.lse[samples])

    def add_(self, out: Tensor, lse: Tensor, weight: int = 1, has_keys: bool = False) -> None:
        """Merge the keys of another partial into this one, in place, each counted `weight` times.

        A negative weight removes keys that were merged before.  `has_keys` says that the other partial is nowhere that
        of no key, which then needs no mask.  `forward_blocks` calls it for the result of each block, and branches,
        lines and the caches of inference are merged by it.
        """
        lse = lse + log(abs(weight)) if abs(weight) != 1 else lse
        if weight > 0:
            # exp(lse) / (exp(lse) + exp(self.lse)); where both are -inf it is NaN, and 0 keeps out as it is
            share = torch.sub(lse, self.lse).sigmoid_()
            if not has_keys:
                share.masked_fill_(lse == -inf, 0)
            self.out.lerp_(out if out.dtype == self.out.dtype else out.to(self.out.dtype), share)
            torch.logaddexp(self.lse, lse, out=self.lse)
        else:
            # the share of the weights that stays, 1 - exp(lse - self.lse), as accurate near 0 as near 1
            kept = -torch.expm1((lse - self.lse).masked_fill_(lse == -inf, -inf))
            # where all keys are removed, what stays is no more than the rounding of the sum: it is set to no key
            gone = kept <= 64 * torch.finfo(kept.dtype).eps * self.lse.abs().clamp_min_(1)
            kept.masked_fill_(gone, 1)
            share = (1 - 1 / kept).masked_fill_(gone, 0)
            self.out.masked_fill_(gone, 0).lerp_(out.to(self.out.dtype), share)
            self.lse.add_(kept.log()).masked_fill_(gone, -inf)

    def add_logits_(self, logits: Tensor) -> None:
        """Merge keys without a value, whose log-sum-exp is `logits`, in place; -inf is no key.

        `logits` broadcasts to the shape of lse.  `finalized` and `LayerCache.attend` call it for sinks, and `NullKeys`
        for null keys.
        """
        total = torch.logaddexp(self.lse, logits)
        # a row without keys has an lse of -inf; with logits of -inf, too, the difference would be NaN
        self.out.mul_(torch.exp(self.lse - total).masked_fill_(self.lse == -inf, 0))
        self.lse.copy_(total)
