"""Reductions over ranks with their gradients: means over tokens, whole sequences out of parts, and sums of parts."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from lightning_longnet.sequence.parts import part_of
from lightning_longnet.sequence.position import world_group

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.attention.parallel.comm import Traffic
    from lightning_longnet.attention.parallel.placement import Placement
    from lightning_longnet.sequence.splitter import BatchSplitter
    from lightning_longnet.sequence.window import TokenWindow


class Reductions:
    """The reductions of a rank over the others; `SequenceContext` has the same methods and says more of each.

    Args:
        splitter: says whether sequences are split now, and how.
        token_window: the window that means are taken in.
        traffic: counts the time of the means.
    """

    def __init__(self, splitter: BatchSplitter, token_window: TokenWindow, traffic: Traffic) -> None:
        self._splitter, self._token_window, self._traffic = splitter, token_window, traffic

    def token_mean(self, loss_sum: Tensor, token_count: Tensor | float) -> Tensor:
        """Return the mean over the tokens of all ranks."""
        group = world_group()
        begin = perf_counter()
        totals = _totals(loss_sum, token_count, group)
        self._traffic.loss_seconds += perf_counter() - begin
        ranks = 1 if group is None else dist.get_world_size()
        divisor = self._token_window.divisor(totals[1]) if loss_sum.requires_grad else totals[1]
        mean: Tensor = TokenMean.apply(loss_sum, totals, divisor, ranks)  # type: ignore[no-untyped-call]
        return mean

    def gather_sequence(self, x: Tensor, dim: int) -> Tensor:
        """Return whole sequences, their tokens in order, out of parts x whose dimension `dim` is this rank's tokens.

        Sequences that are not split are returned as they are.
        """
        splitter = self._splitter
        if not splitter.is_split:
            return x
        assert splitter.current.length is not None
        dim %= x.dim()
        splitter.check_tokens(x.shape[dim])
        placement, position = splitter.placement_of(splitter.current.length), splitter.position
        whole: Tensor = GatherSequence.apply(  # type: ignore[no-untyped-call]
            x, placement, position.sequence_parallel_rank, position.sequence_group, dim
        )
        return whole

    def sum_parts(self, x: Tensor) -> Tensor:
        """Return the sum of x over the ranks that share sequences."""
        if not self._splitter.is_split:
            return x
        total: Tensor = SumParts.apply(x, self._splitter.position.sequence_group)  # type: ignore[no-untyped-call]
        return total

    def gather_samples(self, x: Tensor, group: dist.ProcessGroup | None = None) -> list[Tensor]:
        """Return the x of each rank that works on other samples; without a mesh these are `group`, or all."""
        if self._splitter.position.data_parallel_group is not None:
            group = self._splitter.position.data_parallel_group
        elif group is None:
            group = world_group()
        return [x] if group is None else _all_gather_ragged(x, group)


class TokenMean(torch.autograd.Function):
    """The sum over all ranks / the count over all ranks, with a gradient for engines that average gradients over ranks.

    The gradient is that of the sum / `divisor`, which is the count except in a `TokenWindow`.
    """

    @staticmethod
    def forward(ctx: Any, loss_sum: Tensor, totals: Tensor, divisor: Tensor, ranks: int) -> Tensor:
        ctx.factor = torch.where(divisor > 0, ranks / divisor, 0.0)
        mean = torch.where(totals[1] > 0, totals[0] / totals[1], 0.0)
        return mean.to(loss_sum.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return (grad * ctx.factor).to(grad.dtype), None, None, None


def _totals(loss_sum: Tensor, token_count: Tensor | float, group: dist.ProcessGroup | None) -> Tensor:
    """Return (sum of losses, count of tokens) over the ranks, in float64."""
    if loss_sum.dim() != 0:
        raise ValueError(f"loss_sum must be a sum, a tensor of no dimension, got shape {tuple(loss_sum.shape)}")
    count = torch.as_tensor(token_count, dtype=torch.float64, device=loss_sum.device).detach()
    if count.dim() != 0:
        raise ValueError(f"token_count must be one number, got shape {tuple(count.shape)}")
    totals = torch.stack([loss_sum.detach().double(), count])
    if group is not None:
        dist.all_reduce(totals, group=group)
    return totals


class GatherSequence(torch.autograd.Function):
    """The whole sequence on every rank; the gradient of a part is the sum of all ranks' gradients of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, placement: Placement, rank: int, group: dist.ProcessGroup, dim: int) -> Tensor:
        """Return whole sequences out of the parts x of the ranks of `group`; dimension `dim` is the sequence."""
        ctx.where = placement, rank, group, dim
        longest = max(placement.lengths)  # all_gather takes tensors of one shape: shorter parts are padded
        local = x.movedim(dim, 0)
        padded = local.new_zeros((longest, *local.shape[1:]))
        padded[: len(local)] = local
        parts = padded.new_empty((placement.ranks, *padded.shape))
        dist.all_gather(list(parts.unbind()), padded, group=group)
        whole = padded.new_empty((placement.length, *local.shape[1:]))
        for other in range(placement.ranks):
            for begin, end, first in placement.chunks(other):
                whole[begin:end] = parts[other, first : first + end - begin]
        return whole.movedim(0, dim).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Return this rank's part of the sum of all ranks' gradients."""
        placement, rank, group, dim = ctx.where
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=group)
        return part_of(grad, placement, rank, dim), None, None, None, None


class SumParts(torch.autograd.Function):
    """The sum over the ranks, on each of them; the gradient of each addend is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _total(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _total(grad, ctx.group), None


def _total(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the sum of x over the ranks, added in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32), copy=True, memory_format=torch.contiguous_format)
    dist.all_reduce(wide, group=group)
    return wide.to(x.dtype)


def _all_gather_ragged(x: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """Return the x of each rank of a group, whose shapes may differ but for their number of dimensions."""
    shape = torch.tensor(x.shape, device=x.device)
    shapes = [torch.empty_like(shape) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shapes, shape, group=group)
    # all_gather takes tensors of one shape
    padded = x.new_zeros(torch.stack(shapes).amax(0).tolist() if x.dim() else [])
    padded[tuple(slice(n) for n in x.shape)] = x
    states = [torch.empty_like(padded) for _ in shapes]
    dist.all_gather(states, padded, group=group)
    return [state[tuple(slice(n) for n in size.tolist())] for state, size in zip(states, shapes, strict=True)]
