"""`Lattice`: the rows of a block as an affine set of (segment, head, row), which is read as one strided view."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from lightning_longnet.attention.plan.runs import shifted

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor


@dataclass(frozen=True)
class Lattice:
    """The rows of several segments and heads: (s, a, i) is row `starts[s] + a * row_shift + i * step` of head
    `head + a * head_step`.

    The shift lets heads with different offsets share one view, along a diagonal:

        rows    0 1 2 3 4 5 6 7        r = 2, one segment of 8
        head 0  x . x . x . x .        head 0, row 0
        head 1  . x . x . x . x        head_step 1, row_shift 1

    `starts` is a range where the segments are evenly spaced.  Packed documents need not be, and their rows are copied.
    """

    starts: range | tuple[int, ...]
    rows: int
    step: int
    head: int
    heads: int
    head_step: int = 1
    row_shift: int = 0

    @property
    def is_view(self) -> bool:
        """Whether `read` returns a view."""
        return isinstance(self.starts, range)

    @property
    def size(self) -> int:
        """The number of rows, over all segments and heads."""
        return len(self.starts) * self.heads * self.rows

    def read(self, t: Tensor) -> Tensor:
        """Return (B, segments, heads, rows, D) of a tensor (B, N, H, D): a view where the lattice is one."""
        if not isinstance(self.starts, range):
            return self.copied(t)
        batch, row, head, dim = t.stride()
        return t.as_strided(
            (t.shape[0], len(self.starts), self.heads, self.rows, t.shape[3]),
            (batch, self.starts.step * row, self.head_step * head + self.row_shift * row, self.step * row, dim),
            t.storage_offset() + self.starts.start * row + self.head * head,
        )

    def copied(self, t: Tensor) -> Tensor:
        """Return the rows as a copy."""
        rows, heads = self.indices(t.device)
        if t.stride(1) != t.shape[2] * t.stride(2):
            return t[:, rows, heads]
        # index_select along one dimension is twice as fast as indexing along two
        cells = rows * t.shape[2] + heads
        selected: Tensor = t.flatten(1, 2).index_select(1, cells.flatten()).unflatten(1, cells.shape)
        return selected

    def write(self, t: Tensor, values: Tensor) -> None:
        """Write values (B, segments, heads, rows, D) to the rows of a tensor (B, N, H, D)."""
        if self.is_view:
            self.read(t).copy_(values)
        else:
            rows, heads = self.indices(t.device)
            t[:, rows, heads] = values.to(t.dtype)  # unlike copy_, indexing does not convert

    def indices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the rows (segments, heads, rows) and the heads (heads, 1) of all elements."""
        starts = torch.tensor(self.starts, device=device)[:, None, None]
        a = torch.arange(self.heads, device=device)[:, None]
        rows = starts + a * self.row_shift + torch.arange(self.rows, device=device) * self.step
        return rows, self.head + a * self.head_step

    def segments(self, first: int, last: int) -> Lattice:
        """Return the segments `first` to `last`."""
        return replace(self, starts=self.starts[first:last])

    def diagonal(self, first: int, last: int) -> Lattice:
        """Return the heads `first` to `last` of the lattice, each with its own rows."""
        moved = self.shifted(first * self.row_shift)
        return replace(moved, head=self.head + first * self.head_step, heads=last - first)

    def shifted(self, by: int) -> Lattice:
        """Return the lattice moved by so many rows."""
        if isinstance(self.starts, range):
            return replace(self, starts=shifted(self.starts, by))
        return replace(self, starts=tuple(start + by for start in self.starts))

    def cells(self) -> Iterator[tuple[int, int]]:
        """Yield every (row, head), for tests and pictures."""
        for start in self.starts:
            for a in range(self.heads):
                for i in range(self.rows):
                    yield start + a * self.row_shift + i * self.step, self.head + a * self.head_step


def folded(at: Lattice, t: Tensor) -> Tensor:
    """Return (B * segments, heads, rows, D) of a tensor (B, N, H, D), as kernels take it.

    It is a copy only where samples and segments have no common stride.
    """
    return at.read(t).flatten(0, 1)


def unfolded(at: Lattice, t: Tensor, batch: int) -> Tensor:
    """Return (B, segments, heads, rows, D) of what a kernel returns, (B * segments, heads, rows, D)."""
    split: Tensor = t.unflatten(0, (batch, len(at.starts)))
    return split


def readable(x: Tensor) -> Tensor:
    """Return x, or a copy that kernels can read: stride 1 in the last dimension, and rows that do not overlap.

    The gradient of a sum() has stride 0.
    """
    crossed = any(0 < stride < x.shape[-1] for stride, size in zip(x.stride()[:-1], x.shape, strict=False) if size > 1)
    return x.contiguous() if crossed or x.stride(-1) != 1 else x


def joined(results: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Concatenate the results of groups of samples along the batch."""
    return results[0] if len(results) == 1 else tuple(torch.cat(parts) for parts in zip(*results, strict=True))
