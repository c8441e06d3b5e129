"""Means over the tokens of all ranks, and whole sequences out of the ranks' parts: with the gradients of both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.attention.parallel.placement import Placement


class TokenMean(torch.autograd.Function):
    """Sum over all ranks / count over all ranks, and a gradient for engines that average gradients over all ranks.

    Where `divisor` is given the gradient is that of the sum / divisor, and the value stays the mean.
    """

    @staticmethod
    def forward(ctx: Any, loss_sum: Tensor, totals: Tensor, divisor: Tensor, ranks: int) -> Tensor:
        ctx.factor = torch.where(divisor > 0, ranks / divisor, 0.0)
        mean = torch.where(totals[1] > 0, totals[0] / totals[1], 0.0)
        return mean.to(loss_sum.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return (grad * ctx.factor).to(grad.dtype), None, None, None


def summed(loss_sum: Tensor, token_count: Tensor | float, group: dist.ProcessGroup | None) -> Tensor:
    """(sum of losses, count of tokens) over the ranks, in float64."""
    if loss_sum.dim() != 0:
        raise ValueError(f"loss_sum must be a sum, a tensor of no dimension, got shape {tuple(loss_sum.shape)}")
    count = torch.as_tensor(token_count, dtype=torch.float64, device=loss_sum.device).detach()
    if count.dim() != 0:
        raise ValueError(f"token_count must be one number, got shape {tuple(count.shape)}")
    totals = torch.stack([loss_sum.detach().double(), count])
    if group is not None:
        dist.all_reduce(totals, group=group)
    return totals


class GatheredSequence(torch.autograd.Function):
    """The whole sequence on every rank; the gradient of a rank's part is the sum of what all ranks have for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, placement: Placement, rank: int, group: dist.ProcessGroup, dim: int) -> Tensor:
        ctx.told = placement, rank, group, dim
        longest = max(placement.lengths)
        local = x.movedim(dim, 0)
        padded = local.new_zeros((longest, *local.shape[1:]))
        padded[: len(local)] = local
        parts = padded.new_empty((placement.ranks, *padded.shape))
        dist.all_gather(list(parts.unbind()), padded, group=group)
        whole = padded.new_empty((placement.length, *local.shape[1:]))
        for other in range(placement.ranks):
            for begin, end, first in placement.stretches(other):
                whole[begin:end] = parts[other, first : first + end - begin]
        return whole.movedim(0, dim).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        placement, rank, group, dim = ctx.told
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=group)
        return part_of(grad, placement, rank, dim), None, None, None, None


class SummedParts(torch.autograd.Function):
    """The sum over the ranks, on each of them; the gradient of a rank's is the sum of what all ranks have for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _total(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _total(grad, ctx.group), None


def _total(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32), copy=True, memory_format=torch.contiguous_format)
    dist.all_reduce(wide, group=group)
    return wide.to(x.dtype)


def part_of(x: Tensor, placement: Placement, rank: int, dim: int) -> Tensor:
    """The tokens of a rank, in the order in which it holds them; a copy, so that the whole can be freed."""
    parts = [x.narrow(dim, begin, end - begin) for begin, end, _ in placement.stretches(rank)]
    return torch.cat(parts, dim) if parts else x.narrow(dim, 0, 0).clone()


def gathered_states(x: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """What each rank of a group has, of shapes of their own."""
    found: list[Any] = [None] * dist.get_world_size(group)
    shape = torch.tensor(x.shape, device=x.device)
    shapes = [torch.empty_like(shape) for _ in found]
    dist.all_gather(shapes, shape, group=group)
    padded = x.new_zeros(torch.stack(shapes).amax(0).tolist() if x.dim() else [])
    padded[tuple(slice(n) for n in x.shape)] = x
    found = [torch.empty_like(padded) for _ in found]
    dist.all_gather(found, padded, group=group)
    return [each[tuple(slice(n) for n in size.tolist())] for each, size in zip(found, shapes, strict=True)]
