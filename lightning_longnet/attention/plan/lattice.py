"""The rows of a block in memory: a set of (segment, head, row) at constant distances, read as one strided view.

Shapes: B batch, N tokens, H heads, D head_dim.  A tensor (B, N, H, D) is read as (B, segments, heads, rows, D).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lightning_longnet.attention.plan.runs import shifted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    Layout = tuple[Sequence[int], Sequence[int]]  # the shape and the strides of a tensor

_VIEWS = 64  # the most views that a lattice keeps


class View(NamedTuple):
    """The sizes, strides and offset of a strided view; the offset is added to that of the tensor.

    `Lattice.view` returns it.
    """

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


class _Views(NamedTuple):
    """The views of a lattice in tensors of one layout.

    Attributes:
        read: (B, segments, heads, rows, D).
        folded: (B * segments, heads, rows, D); None where samples and segments have no common stride.
    """

    read: View
    folded: View | None


@dataclass(frozen=True)
class Lattice:
    """A set of rows and heads at constant distances.

    Element (s, a, i) is row `starts[s] + a * row_shift + i * step` of head `head + a * head_step`.  A block of a plan
    has one lattice for its queries and one for its keys, by which rows of q, k and v are read and results are written.
    The shift allows heads with different offsets in one view, along a diagonal:

        rows    0 1 2 3 4 5 6 7        dilation_rate 2, one segment of 8: starts range(0, 1), rows 4, step 2,
        head 0  x . x . x . x .        head 0, heads 2, head_step 1, row_shift 1
        head 1  . x . x . x . x

    `starts` is a range if the segments are evenly spaced.  Packed documents need not be: then it is a tuple, and rows
    are copied.
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
        """Whether `read` returns a view.

        `_forward` of blocks.py and `Accumulator.add` ask, as they must write back what they changed in a copy;
        `_joining_cost` asks what becomes a copy.
        """
        return isinstance(self.starts, range)

    @property
    def size(self) -> int:
        """The number of elements, of all segments and heads.

        Plans compare it with the number of all rows and with bounds, `PeerBlocks.is_sparse` counts KV rows by it.
        """
        return len(self.starts) * self.heads * self.rows

    def covers(self, t: Tensor) -> bool:
        """Return whether these are all rows and heads of t (B, N, H, D), segment by segment, in their order.

        `adoptable` asks: the result of such a block can become the accumulator without a copy.
        """
        if not isinstance(self.starts, range):
            return False
        is_evenly_cut = self.starts.start == 0 and (len(self.starts) == 1 or self.starts.step == self.rows)
        return (
            is_evenly_cut
            and (self.step, self.row_shift, self.head, self.heads) == (1, 0, 0, t.shape[2])
            and self.head_step == 1
            and len(self.starts) * self.rows == t.shape[1]
        )

    def read(self, t: Tensor) -> Tensor:
        """Return the rows of t (B, N, H, D), (B, segments, heads, rows, D): a view if `is_view`, else a copy.

        `_forward` of blocks.py and `Accumulator.add` read results and gradients by it that cannot be `folded`, and
        `Round` the places of received keys.
        """
        if not isinstance(self.starts, range):
            return self.copied(t)
        sizes, strides, offset = self._views(t.shape, t.stride()).read
        return t.as_strided(sizes, strides, t.storage_offset() + offset)

    def folded(self, t: Tensor) -> Tensor:
        """Return the rows of t (B, N, H, D) as kernels take them, (B * segments, heads, rows, D).

        The result is a view unless rows are copied, or samples and segments have no common stride.  `fold_rows` calls
        it for what a kernel reads.  Where it is a view (`folds`), `_forward` of blocks.py and `Accumulator.add` add the
        results of a kernel through it.
        """
        if not isinstance(self.starts, range):
            return self.copied(t).flatten(0, 1)
        view = self._views(t.shape, t.stride()).folded
        if view is None:
            return self.read(t).flatten(0, 1)
        sizes, strides, offset = view
        return t.as_strided(sizes, strides, t.storage_offset() + offset)

    def folds(self, t: Tensor) -> bool:
        """Return whether `folded` returns a view of t (B, N, H, D), so that writes to it reach t.

        `_forward` of blocks.py and `Accumulator.add` ask.
        """
        return self.view((t.shape, t.stride())) is not None

    def view(self, layout: Layout) -> View | None:
        """Return the view that `folded` returns of a tensor of this layout; None where it returns a copy.

        The steps of parts keep it, so that nothing is looked up for each tensor.
        """
        return self._views(*layout).folded if self.is_view else None

    def _views(self, shape: Sequence[int], stride: Sequence[int]) -> _Views:
        """Return the views in a tensor (B, N, H, D) of this shape and these strides, which are computed once."""
        kept: dict[tuple[Any, Any], _Views] = self.__dict__.setdefault("_kept_views", {})
        views = kept.get((shape, stride))
        if views is None:
            assert isinstance(self.starts, range)
            if len(kept) >= _VIEWS:
                kept.clear()
            batch, row, head, dim = stride
            segments, segment = len(self.starts), self.starts.step * row
            sizes = self.heads, self.rows, shape[3]
            strides = self.head_step * head + self.row_shift * row, self.step * row, dim
            offset = self.starts.start * row + self.head * head
            folded = None
            # samples and segments are one dimension where the next sample begins a segment after the last one
            if 1 in (shape[0], segments) or batch == segments * segment:
                folded = View((shape[0] * segments, *sizes), (batch if segments == 1 else segment, *strides), offset)
            read = View((shape[0], segments, *sizes), (batch, segment, *strides), offset)
            views = kept[shape, stride] = _Views(read, folded)
        return views

    def copied(self, t: Tensor) -> Tensor:
        """Return a copy of the rows of t (B, N, H, D), (B, segments, heads, rows, D).

        `read` and `folded` call it where the segments are not evenly spaced, and those of `CopiedLattice` always.
        """
        if self._has_whole_rows:
            rows, heads = self._row_indices(t.device), t[:, :, self.head : self.head + self.heads]
            # along dim 0 a copy takes a third of the time
            copied = heads[0].index_select(0, rows)[None] if len(t) == 1 else heads.index_select(1, rows)
            copy: Tensor = copied.unflatten(1, (len(self.starts), self.rows)).transpose(2, 3)
            return copy
        rows, heads = self.indices(t.device)
        if t.stride(1) != t.shape[2] * t.stride(2):
            return t[:, rows, heads]
        # with tokens and heads flattened to one dimension the copy is twice as fast
        flat = rows * t.shape[2] + heads
        copy = t.flatten(1, 2).index_select(1, flat.flatten()).unflatten(1, flat.shape)
        return copy

    def write(self, t: Tensor, values: Tensor) -> None:
        """Write values (B, segments, heads, rows, D) to the rows of t that `read` would read.

        `_forward` of blocks.py and `Accumulator.add` write results and gradients by it: those of a first branch, and
        sums that are no view.
        """
        if self.is_view:
            self.read(t).copy_(values)
        elif self._has_whole_rows:
            values = values.expand(len(t), len(self.starts), self.heads, self.rows, t.shape[3])
            self._write_rows(t, self._row_indices(t.device), whole_rows(values))
        else:
            rows, heads = self.indices(t.device)
            t[:, rows, heads] = values.to(t.dtype)  # an indexed assignment does not convert types

    def _write_rows(self, t: Tensor, rows: Tensor, values: Tensor) -> None:
        """Write values (B, rows, heads, D) to rows of t (B, N, H, D), of the heads of this lattice.

        `rows` are their indices in t.  `write` calls it, also that of `PaddedLattice`.
        """
        target, values = t[:, :, self.head : self.head + self.heads], values.to(t.dtype)
        if len(t) == 1:  # along dim 0 a copy takes a third of the time
            target[0].index_copy_(0, rows, values[0])
        else:
            target.index_copy_(1, rows, values)

    @property
    def _has_whole_rows(self) -> bool:
        """Whether a copied row holds neighbouring heads of one row of memory; `copied` and `write` ask."""
        return self.row_shift == 0 and (self.head_step == 1 or self.heads == 1)

    def _row_indices(self, device: torch.device) -> Tensor:
        """Return the rows of all segments of the first head, (segments * rows,).

        `copied` and `write` call it where the lattice `_has_whole_rows`; `PaddedLattice` overrides it.
        """

        def made() -> Tensor:
            """Return the rows on the device."""
            return (self._first_rows(device)[:, None] + torch.arange(self.rows, device=device) * self.step).flatten()

        return self._made_once("rows", device, made)

    def _first_rows(self, device: torch.device) -> Tensor:
        """Return the first row of each segment, (segments,), which each device is sent once.

        `PagedKeys` overrides it: there it is the first row of each page, (segments, pages).
        """
        return self._kept_on(device, self.starts)

    def _kept_on(self, device: torch.device, values: Sequence[Any]) -> Tensor:
        """Return values as a tensor on a device, which each device is sent once; `_first_rows` calls it."""
        return self._made_once("first rows", device, lambda: torch.tensor(values, device=device))

    def _made_once(self, name: str, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
        """Return a tensor on a device that `make` makes in the first call with this name, and that is kept."""
        kept: dict[tuple[str, torch.device], Tensor] = self.__dict__.setdefault("_tensors", {})
        if (name, device) not in kept:
            # a tensor made in inference mode could not be used in training
            with torch.inference_mode(False):
                kept[name, device] = make()
        return kept[name, device]

    def indices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the rows (segments, heads, rows) and the heads (heads, 1) of all elements.

        `copied` and `write` call it where rows are no view, and `PeerBlocks` for the KV rows that a rank needs of
        another.
        """
        starts = self._first_rows(device)[:, None, None]
        a = torch.arange(self.heads, device=device)[:, None]
        rows = starts + a * self.row_shift + torch.arange(self.rows, device=device) * self.step
        return rows, self.head + a * self.head_step

    def mark(self, flags: bytearray, heads: int) -> None:
        """Set the flag of every element, `row * heads + head`, to 1.

        `PeerBlocks.mask` calls it, to mark the KV rows that a rank needs of another.
        """
        step, ones = self.step * heads, b"\1" * self.rows
        for start in self.starts:
            for a in range(self.heads):
                first = (start + a * self.row_shift) * heads + self.head + a * self.head_step
                flags[first : first + (self.rows - 1) * step + 1 : step] = ones

    def segments(self, first: int, last: int) -> Lattice:
        """Return the lattice of the segments from `first` up to, but not including, `last`, or the end.

        `part_segments` cuts calls by it, and `shares` takes the segments that lie on a rank as a whole.
        """
        if first == 0 and last >= len(self.starts):
            return self
        return replace(self, starts=self.starts[first:last])

    def of_heads(self, first: int, last: int) -> Lattice:
        """Return the lattice of the heads from `first` up to, but not including, `last`, each with its own rows.

        The heads are counted from the first of this lattice.  `part_heads` cuts calls by it, `heads_route` takes the
        heads of one rank, and `_with_query_heads` single heads.
        """
        if (first, last) == (0, self.heads):
            return self
        moved = self.shifted(first * self.row_shift)
        return replace(moved, head=self.head + first * self.head_step, heads=last - first)

    def shifted(self, by: int) -> Lattice:
        """Return the same elements, `by` rows further on.

        `shares` moves lattices by it from the rows of the sequence to those of a rank, and `lattice_blocks` from
        queries to the keys that they see.
        """
        if not by:
            return self
        if isinstance(self.starts, range):
            return replace(self, starts=shifted(self.starts, by))
        return replace(self, starts=tuple(start + by for start in self.starts))

    def elements(self) -> Iterator[tuple[int, int]]:
        """Yield the (row, head) of every element, by segments, then heads; only tests call it."""
        for start in self.starts:
            for a in range(self.heads):
                for i in range(self.rows):
                    yield start + a * self.row_shift + i * self.step, self.head + a * self.head_step


def fold_rows(at: Lattice, t: Tensor) -> Tensor:
    """Return the rows of a lattice in t (B, N, H, D) as kernels take them, (B * segments, heads, rows, D).

    The result is a view unless rows are copied, or samples and segments have no common stride.  `_forward`, `_backward`
    and `kernel_calls` read q, its gradients and the numbers of its rows by it, and `OwnKeys` reads keys
    and values.
    """
    return at.folded(t)


def unfold_rows(at: Lattice, t: Tensor, batch: int) -> Tensor:
    """Return a kernel's result t (B * segments, heads, rows, D) as `write` takes it, (B, segments, heads, rows, D).

    For an lse D is 1.  The result is a view, and of the lattice only the number of segments counts.  `_forward` of
    blocks.py and `Accumulator.add` call it for what a kernel returns, where they cannot add it through `folded`.
    """
    rows: Tensor = t.unflatten(0, (batch, len(at.starts)))
    return rows


def as_readable(x: Tensor) -> Tensor:
    """Return x itself if kernels can read it, else a contiguous copy.

    The last dimension must have stride 1 (that of a gradient of sum() has 0), and no two vectors may overlap.  The
    operators of op.py call it for q, k, v, out and the gradient of out.
    """
    if x.is_contiguous():
        return x
    overlaps = any(0 < stride < x.shape[-1] for stride, size in zip(x.stride()[:-1], x.shape, strict=False) if size > 1)
    return x.contiguous() if overlaps or x.stride(-1) != 1 else x


def whole_rows(x: Tensor) -> Tensor:
    """Return x (B, segments, heads, rows, D) as (B, segments * rows, heads, D): a view where the layout of x allows it.

    `adoptable` calls it for a lattice that `covers` a tensor, of which this then is all, and `Lattice.write` for copied
    rows.
    """
    return x.transpose(2, 3).flatten(1, 2)


def concat_batches(results: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Return the results of several calls as those of one batch: each tensor concatenated along dim 0.

    The operators of op.py call it where samples have different documents, and so different calls.
    """
    return results[0] if len(results) == 1 else tuple(torch.cat(parts) for parts in zip(*results, strict=True))
