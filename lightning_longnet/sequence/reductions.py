"""Collectives with gradients: means over tokens of all ranks, whole sequences out of parts, and sums of parts."""

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
    """Computes what the methods of `SequenceContext` with the same names return; they call it and say when to use each.

    Args:
        splitter: says whether sequences are split now, and how.
        token_window: chooses the divisor of gradients when micro-batches are weighted by their tokens.
        traffic: counts the time that `token_mean` waits for other ranks.
    """

    def __init__(self, splitter: BatchSplitter, token_window: TokenWindow, traffic: Traffic) -> None:
        self._splitter, self._token_window, self._traffic = splitter, token_window, traffic

    def token_mean(self, loss_sum: Tensor, token_count: Tensor | float) -> Tensor:
        """Return the sum of all ranks' `loss_sum` over the sum of their `token_count`, in the dtype of the loss.

        All ranks call it together.  A loss without a gradient, as one that is logged, leaves the token window as it is.
        """
        group = world_group()
        begin = perf_counter()
        totals = _totals(loss_sum, token_count, group)
        self._traffic.loss_seconds += perf_counter() - begin
        ranks = 1 if group is None else dist.get_world_size()
        divisor = self._token_window.divisor(totals[1]) if loss_sum.requires_grad else totals[1]
        mean: Tensor = TokenMean.apply(loss_sum, totals, divisor, ranks)  # type: ignore[no-untyped-call]
        return mean

    def gather_sequence(self, x: Tensor, dim: int) -> Tensor:
        """Return whole sequences, with all N tokens in dimension `dim`, out of parts x with this rank's L tokens there.

        All ranks of the sequence group call it together.  Sequences that are not split are returned as they are.
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
        """Return the sum of x over the ranks of the sequence group, which call it together; x if nothing is split."""
        if not self._splitter.is_split:
            return x
        total: Tensor = SumParts.apply(x, self._splitter.position.sequence_group)  # type: ignore[no-untyped-call]
        return total

    def gather_samples(self, x: Tensor, group: dist.ProcessGroup | None = None) -> list[Tensor]:
        """Return the x of each rank of the data-parallel group of this rank, as a list; all of them call it together.

        Without a mesh the ranks are those of `group`, or all ranks if that is None, or this one process.
        """
        if self._splitter.position.data_parallel_group is not None:
            group = self._splitter.position.data_parallel_group
        elif group is None:
            group = world_group()
        return [x] if group is None else _all_gather_ragged(x, group)


class TokenMean(torch.autograd.Function):
    """The sum of losses over all ranks, divided by the count of tokens over all ranks.

    `Reductions.token_mean` applies it.  The gradient of `loss_sum` is `ranks / divisor`, or 0 where the divisor is 0:
    DDP, FSDP and DeepSpeed average gradients over the ranks, and so divide by `ranks` again.
    """

    @staticmethod
    def forward(ctx: Any, loss_sum: Tensor, totals: Tensor, divisor: Tensor, ranks: int) -> Tensor:
        """Return the mean, without dimensions; 0 if no rank has a token.

        Args:
            loss_sum: the sum of this rank alone, which gets the gradient.
            totals: (2,) in float64, what `_totals` returns.
            divisor: what the gradient is divided by: the count of tokens except in a `TokenWindow`.
            ranks: the number of ranks over which gradients are averaged.
        """
        ctx.factor = torch.where(divisor > 0, ranks / divisor, 0.0)
        mean = torch.where(totals[1] > 0, totals[0] / totals[1], 0.0)
        return mean.to(loss_sum.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Return the gradient of `loss_sum`; the others have none."""
        return (grad * ctx.factor).to(grad.dtype), None, None, None


def _totals(loss_sum: Tensor, token_count: Tensor | float, group: dist.ProcessGroup | None) -> Tensor:
    """Return (sum of losses, count of tokens) over the ranks of a group, (2,) in float64; they call it together."""
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
    """The whole sequence on every rank of a group, out of their parts; `Reductions.gather_sequence` applies it.

    The gradient of a part is the sum of the gradients that all ranks have of its tokens.  All ranks run the forward
    together, and the backward too.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, placement: Placement, rank: int, group: dist.ProcessGroup, dim: int) -> Tensor:
        """Return whole sequences, with N tokens in dimension `dim`.

        Args:
            x: this rank's part, with its tokens in dimension `dim`.
            placement: which tokens each rank holds.
            rank: the number of this rank in `group`.
            group: the ranks that share the sequences.
            dim: the dimension of the tokens, not negative.
        """
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
    """The sum of x over the ranks of a group, on each of them; the gradient of x is the sum of all ranks' gradients.

    `Reductions.sum_parts` applies it.  All ranks run the forward together, and the backward too.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Return the sum, in the shape and dtype of x."""
        ctx.group = group
        return _total(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Return the sum of all ranks' gradients."""
        return _total(grad, ctx.group), None


def _total(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the sum of x over the ranks of a group in the dtype of x, added in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32), copy=True, memory_format=torch.contiguous_format)
    dist.all_reduce(wide, group=group)
    return wide.to(x.dtype)


def _all_gather_ragged(x: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """Return the x of each rank of a group, which call it together: of equal dtype and number of dimensions.

    The sizes may differ.  `Reductions.gather_samples` calls it.
    """
    shape = torch.tensor(x.shape, device=x.device)
    shapes = [torch.empty_like(shape) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shapes, shape, group=group)
    # all_gather takes tensors of one shape
    padded = x.new_zeros(torch.stack(shapes).amax(0).tolist() if x.dim() else [])
    padded[tuple(slice(n) for n in x.shape)] = x
    states = [torch.empty_like(padded) for _ in shapes]
    dist.all_gather(states, padded, group=group)
    return [state[tuple(slice(n) for n in size.tolist())] for state, size in zip(states, shapes, strict=True)]
