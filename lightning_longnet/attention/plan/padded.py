"""Padded lattices: segments of different lengths in one kernel call, each padded to the longest of them.

    document a     x x x x x x        read as rows 0 1 2 3 4 5
    document b     x x x x            read as rows 0 1 2 3 3 3: its last row stands for the padding

The padding is never written.  No query of a document sees a key of the padding, and as a query the padding has no
weight: its log-sum-exp in the backward is +inf.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from typing import TYPE_CHECKING

import torch

from lightning_longnet.attention.plan.copied import CopiedLattice

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lightning_longnet.attention.plan.lattice import Lattice


@dataclass(frozen=True)
class PaddedLattice(CopiedLattice):
    """A lattice of which segment s has only `lengths[s]` of the `rows`; its last row stands for those behind it.

    `padded` makes it.  For its methods see also `Lattice`.
    """

    lengths: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """The number of elements without the padding.  Only the rows of `lengths` count."""
        return sum(self.lengths) * self.heads

    def write(self, t: Tensor, values: Tensor) -> None:
        """Write values (B, segments, heads, rows, D) without those of the padding."""
        values = values.expand(len(t), len(self.starts), self.heads, self.rows, t.shape[3])
        flat = values.transpose(2, 3).flatten(1, 2).index_select(1, self._own_places(t.device))
        rows = self._own_rows(t.device)
        if self._has_whole_rows:
            self._write_rows(t, rows, flat)
            return
        a = torch.arange(self.heads, device=t.device)
        t[:, rows[:, None] + a * self.row_shift, self.head + a * self.head_step] = flat.to(t.dtype)

    def padding(self, device: torch.device) -> Tensor:
        """Return (segments, rows), True for the padding.

        `kernel_calls` masks these rows as keys where no causal mask hides them, `without_weight` gives them no weight
        as queries, and `write` leaves them out (`_own_places`).
        """

        def made() -> Tensor:
            """Return the mask, which is made once for each device."""
            return torch.arange(self.rows, device=device) >= torch.tensor(self.lengths, device=device)[:, None]

        return self._made_once("padding", device, made)

    def without_weight(self, lse: Tensor) -> Tensor:
        """Return lse (batch * segments, heads, rows) with +inf for the padding, which then has no gradient.

        `_backward` of blocks.py calls it for each block with such queries.
        """
        padding = self.padding(lse.device)[:, None]
        hidden: Tensor = lse.unflatten(0, (-1, len(self.starts))).masked_fill(padding, inf).flatten(0, 1)
        return hidden

    def _row_indices(self, device: torch.device) -> Tensor:
        """Return the rows of all segments of the first head, (segments * rows,).

        The padding has the last row of its segment.
        """

        def made() -> Tensor:
            """Return the rows on the device."""
            last = torch.tensor(self.lengths, device=device)[:, None] - 1
            steps = torch.arange(self.rows, device=device).minimum(last) * self.step
            return (self._first_rows(device)[:, None] + steps).flatten()

        return self._made_once("rows", device, made)

    def indices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the rows (segments, heads, rows) and the heads (heads, 1) of all elements."""
        a = torch.arange(self.heads, device=device)[:, None]
        rows = self._row_indices(device).view(len(self.starts), 1, self.rows)
        return rows + a * self.row_shift, self.head + a * self.head_step

    def segments(self, first: int, last: int) -> Lattice:
        """Return the lattice of the segments from `first` up to, but not including, `last`, or the end."""
        if first == 0 and last >= len(self.starts):
            return self
        return replace(self, starts=self.starts[first:last], lengths=self.lengths[first:last])

    def elements(self) -> Iterator[tuple[int, int]]:
        """Yield the (row, head) of every element without the padding, by segments, then heads; only tests call it."""
        for start, length in zip(self.starts, self.lengths, strict=True):
            for a in range(self.heads):
                for i in range(length):
                    yield start + a * self.row_shift + i * self.step, self.head + a * self.head_step

    def _own_places(self, device: torch.device) -> Tensor:
        """Return the indices in (segments * rows,) of what is no padding, ascending."""
        return self._made_once("places", device, lambda: (~self.padding(device)).flatten().nonzero().flatten())

    def _own_rows(self, device: torch.device) -> Tensor:
        """Return the rows of the first head that are no padding, in the order of `_own_places`."""
        return self._made_once("own rows", device, lambda: self._row_indices(device)[self._own_places(device)])


def padded(rows: list[Lattice]) -> Lattice:
    """Return one lattice of the segments of several, from the longest to the shortest, for one call; see `batched`.

    The lattices have the same heads and steps.  `_padded_block` calls it.
    """
    longest, *_ = rows = sorted(rows, key=lambda lattice: -lattice.rows)
    starts = tuple(start for lattice in rows for start in lattice.starts)
    if longest.rows == rows[-1].rows:
        return replace(longest, starts=tuple(sorted(starts)))
    return PaddedLattice(
        starts,
        longest.rows,
        longest.step,
        longest.head,
        longest.heads,
        longest.head_step,
        longest.row_shift,
        tuple(lattice.rows for lattice in rows for _ in lattice.starts),
    )
