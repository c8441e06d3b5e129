"""The result of attention over some of the keys, in the form in which the results of blocks are merged."""

from __future__ import annotations

from math import inf, log, nan
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_longnet.attention.kernels.pair_options import PairOptions


class Partial(NamedTuple):
    """The softmax over some of the keys: out (..., D), the weighted mean of their values, and lse (..., 1).

    Each block that a kernel computes gives one, and so do branches, ring steps and caches of inference.  The lse is the
    log-sum-exp of the scores of these keys.  Partials over disjoint keys can be merged in any order; the partial of no
    key (`lse == -inf`, `out == 0`) changes nothing.
    """

    out: Tensor
    lse: Tensor

    def of_samples(self, samples: slice) -> Partial:
        """Return views of some samples; `forward_blocks` gives them to the tasks of threads."""
        return Partial(self.out[samples], self.lse[samples])

    def add_(self, out: Tensor, lse: Tensor, weight: int = 1, has_keys: bool = False, stays: bool = False) -> None:
        """Merge the keys of another partial into this one, in place, each counted `weight` times.

        A negative weight removes keys that were merged before.  `has_keys` says that the other partial is nowhere that
        of no key, which then needs no mask; `stays` that a removal leaves each query a key.  `forward_blocks` calls it
        for the result of each block (in `_forward`), `merge_branches` for branches, `LinesCall` for lines, and
        `attend_by_branches` for new tokens of a cache.
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
            # where all keys are removed, what stays is no more than the rounding of the sum: it is set to no key; that
            # rounding may be larger than what stays of great scores, so that it is not asked where keys do stay
            least = 0 if stays else 64 * torch.finfo(kept.dtype).eps
            gone = kept <= least * self.lse.abs().clamp_min_(1)
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


def no_key_partial(q: Tensor, v: Tensor) -> Partial:
    """Return the partial of no key: out (B, N, H, Dv) is 0 and lse (B, N, H, 1) is -inf.

    `RoundsCall` calls it before the first block, unless the first branch writes every row, and before it computes the
    result of a branch again for "detached".
    """
    partial = uninitialized_partial(q, v.shape[3])
    partial.out.zero_()
    partial.lse.fill_(-inf)
    return partial


def uninitialized_partial(q: Tensor, width: int) -> Partial:
    """Return uninitialized out (B, N, H, width) and lse (B, N, H, 1) in float32, or in float64 for such tensors.

    Lse is in memory as (B, H, N), as operators return it.  `forward_blocks` writes the results of a first branch to
    these, and `forward_parts` of the kernel "triton" those of a launch; `no_key_partial` fills them.
    """
    wide, (batch, rows, heads, _) = torch.promote_types(q.dtype, torch.float32), q.shape
    lse = q.new_empty((batch, heads, rows, 1), dtype=wide)
    return Partial(q.new_empty((batch, rows, heads, width), dtype=wide), lse.transpose(1, 2))


def merge_branches(partials: Sequence[Partial], options: PairOptions, is_saved: bool = False) -> Partial:
    """Return the partials of the branches, merged by their lse, with the null keys in it.

    `RoundsCall.partial` calls it at the end of a forward.  Null keys are merged into `partials` in place: "detached"
    needs the result of each branch with its null keys.  With `is_saved` the backward reads `partials` later, so that
    the sum must be other memory than the only partial.
    """
    if options.null_keys is not None:
        for branch, partial in enumerate(partials):
            options.null_keys.add_to(partial, branch if len(partials) > 1 else None)
    if len(partials) == 1 and not is_saved:
        return partials[0]
    total = Partial(*(x.clone() for x in partials[0]))
    for partial in partials[1:]:
        total.add_(*partial)
    return total


def finalized(total: Partial, like: Tensor, sinks: Tensor | None = None) -> Partial:
    """Return out in the type of `like`, and lse as (B, H, N), both with the sinks in the softmax.

    `RoundsCall` and `LinesCall` call it last in a forward, when all keys have been merged; `like` is q.
    """
    if sinks is not None:
        total.add_logits_(sinks.to(total.lse.dtype)[:, None])
    out = total.out if total.out.dtype == like.dtype else total.out.to(like.dtype)
    return Partial(out, total.lse.transpose(1, 2).squeeze(-1).contiguous())


def backward_lse(lse: Tensor, has_keys: bool) -> Tensor:
    """Return lse (B, H, N) as (B, N, H, 1), +inf for a query without keys: its P = exp(S - lse) must be 0.

    `has_keys` says that there is no such query.  `RoundsCall.gradients` calls it before the first block of a backward.
    """
    if not has_keys:
        lse = lse.nan_to_num(nan=nan, posinf=inf, neginf=inf)
    return lse.transpose(1, 2).unsqueeze(-1)
