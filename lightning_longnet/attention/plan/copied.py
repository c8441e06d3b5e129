"""`CopiedLattice`: a lattice whose rows are always read as a copy, never as a strided view."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_longnet.attention.plan.lattice import Lattice

if TYPE_CHECKING:
    from torch import Tensor


class CopiedLattice(Lattice):
    """A lattice whose rows are copied, even where its segments are evenly spaced.

    It is the base of `PaddedLattice` and `PagedKeys`.  For its methods see also `Lattice`.
    """

    @property
    def is_view(self) -> bool:
        """Whether `read` returns a view: never."""
        return False

    def covers(self, t: Tensor) -> bool:
        """Return False, as no tensor of all rows can be a view of these; `adoptable` asks."""
        return False

    def read(self, t: Tensor) -> Tensor:
        """Return a copy of the rows of t (B, N, H, D), (B, segments, heads, rows, D)."""
        return self.copied(t)

    def folded(self, t: Tensor) -> Tensor:
        """Return a copy of the rows as kernels take them, (B * segments, heads, rows, D); `fold_rows` calls it."""
        return self.copied(t).flatten(0, 1)
