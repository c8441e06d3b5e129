"""`Accumulator`: the gradient of q, k or v, to which the blocks of a plan add theirs."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING

import torch

from lightning_longnet.attention.kernels.steps import contiguous_layout
from lightning_longnet.attention.plan.lattice import unfold_rows
from lightning_longnet.attention.plan.paged_keys import PagedKeys

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.attention.plan.lattice import Lattice, Layout


class Accumulator:
    """A gradient (B, N, H, D) in float32, or in float64 for such tensors.

    `RoundsCall` makes one each for dq, dk and dv in every backward.

    Args:
        like: the tensor of which this is the gradient.
        is_written: whether each row is in exactly one block of the first branch.  Then the gradients of these blocks
            are written, not added, and the memory needs no initial value.  If one block has all rows, its gradient
            becomes the accumulator.
        is_whole: whether the gradients of one call of `backward_blocks` are all that it holds.
    """

    def __init__(self, like: Tensor, is_written: bool, is_whole: bool = False) -> None:
        self.dtype = torch.promote_types(like.dtype, torch.float32)
        self._like, self._is_written, self._is_whole = like, is_written, is_whole
        self._total: Tensor | None = None
        if not is_written and not is_whole:
            self._total = self._allocated()

    @classmethod
    def over(cls, total: Tensor) -> Accumulator:
        """Return an accumulator that adds to a tensor (B, N, H, D).

        `RoundsCall` makes one for the gradients of the received keys of a round.
        """
        accumulator = cls(total, is_written=True)
        accumulator._total = total
        return accumulator

    @property
    def total(self) -> Tensor:
        """The sum of what was added, (B, N, H, D); its memory is allocated when it is first needed.

        `add` adds to it.  `backward_parts` of the kernel "triton" writes to it, `RoundsCall` adds the gradients that
        come back from other ranks, and `LinesCall` those of other lines.
        """
        if self._total is None:
            self._total = self._allocated()
        return self._total

    @property
    def layout(self) -> Layout:
        """The shape and the strides of the sum, for views of it before it is allocated.

        It is contiguous, unless it is the memory that `over` was given.
        """
        if self._total is not None:
            return self._total.shape, self._total.stride()
        return contiguous_layout(self._like.shape)

    def allocate(self) -> None:
        """Allocate the memory of the sum, for threads that add to it.

        `backward_blocks` calls it before its tasks, for dk and dv through `OwnKeys.allocate_gradients`.
        """
        self._total = self.total

    def of_samples(self, samples: slice) -> Accumulator:
        """Return the accumulator of some samples, which adds to the memory of this one.

        `backward_blocks` calls it for the task of a thread, for dk and dv through `OwnKeys.of_samples`.
        """
        part = copy(self)
        part._like, part._total = self._like[samples], self.total[samples]
        return part

    def written(self) -> Tensor:
        """Return `total` for a kernel that computes the whole gradient of its parts in one launch.

        It has the type of `like` where it `is_whole`: nothing is added later, so that the gradient is rounded once.
        `backward_parts` of the kernel "triton" calls it.
        """
        if self._is_whole and self._total is None:
            self.dtype = self._like.dtype
        return self.total

    def _allocated(self) -> Tensor:
        """Return memory for the sum: zeros, or uninitialized where blocks are written."""
        make = torch.empty_like if self._is_written else torch.zeros_like
        return make(self._like, dtype=self.dtype, memory_format=torch.contiguous_format)

    def add(self, rows: Lattice, gradient: Tensor, weight: int, stores: bool) -> None:
        """Add `weight` times a block's gradient (B * segments, heads, rows, D) to its rows.

        With `stores`, for the first branch where the accumulator `is_written`, it is written over them, or becomes the
        accumulator (see `adoptable`).

        With a `BlockKernel`, `backward_blocks` calls it for dq (in `_backward`), and `OwnKeys.add` for dk and dv.  A
        `PartsKernel` writes to `written()` or `total` instead, and gradients that come back from other ranks are added
        to `total`.
        """
        # added in the shape that the kernel returns, which saves views and copies
        if not stores and rows.folds(self.total):
            rows.folded(self.total).add_(gradient, alpha=weight)
            return
        if stores and self.adopts(rows, gradient):
            return
        gradient = unfold_rows(rows, gradient, self._like.shape[0])
        if stores:
            assert weight == 1, "the blocks of a first branch remove no pairs"
            rows.write(self.total, gradient)
        elif isinstance(rows, PagedKeys):
            rows.add(self.total, gradient, weight)
        elif rows.is_view:
            rows.read(self.total).add_(gradient, alpha=weight)
        else:
            rows.write(self.total, rows.read(self.total).add_(gradient, alpha=weight))

    def adopts(self, rows: Lattice, gradient: Tensor) -> bool:
        """Return whether a block's gradient becomes the accumulator; see `adoptable`.

        `add` and the steps of `backward_blocks` ask where the first branch is written.
        """
        if self._total is not None:
            return False
        self._total = adoptable(rows, gradient, self._like, self.dtype)
        return self._total is not None

    def take(self, dtype: torch.dtype) -> Tensor:
        """Return the sum in this type, and free the memory of the accumulator.

        `RoundsCall.backward` calls it after the last block.
        """
        total, self._total = self.total, None
        return total if total.dtype == dtype else total.to(dtype)


def adoptable(rows: Lattice, values: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return values (B * segments, heads, rows, D) as an accumulator (B, N, H, D), None where that needs a copy.

    It returns the values of a block that has all rows of the tensor `like`, if they are of this type.
    `Accumulator.adopts` asks for a gradient, `_adopted` of blocks.py for out.
    """
    if values.dtype != dtype or not rows.covers(like):
        return None
    whole = values.transpose(1, 2)
    if not whole.is_contiguous():
        return None
    return whole if len(whole) == len(like) else whole.view(*like.shape[:3], values.shape[3])
