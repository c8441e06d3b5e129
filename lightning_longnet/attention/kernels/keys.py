"""Where a block's keys are read, and where their gradients go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from lightning_longnet.attention.plan.gathering import Gathered
from lightning_longnet.attention.plan.lattice import folded, unfolded

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.attention.parallel.routes import Part


class Keys(Protocol):
    """The keys and values of blocks, as a kernel reads them: (batch * segments, heads, rows, D)."""

    def read(self, part: Part) -> tuple[Tensor, Tensor]: ...

    def hidden(self, part: Part) -> Tensor | None:
        """(batch * segments, 1 or heads, rows), True where padding hides a key."""

    def words(self, part: Part) -> Tensor:
        """Dropout's, (batch * segments, heads, rows)."""

    def add(self, part: Part, dk: Tensor, dv: Tensor, stores: bool) -> None: ...


class OwnKeys:
    """Rows of the tensors (B, N, Hkv, D) that are here.

    Args:
        hidden: (B, N), True where padding hides a key.
        words: dropout's, (N,).
        gradients: what is added to, or written where a block is the only one that shows its keys.
    """

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        hidden: Tensor | None,
        words: Tensor | None,
        gradients: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self._k, self._v, self._gradients = k, v, gradients
        shape = k.shape[0], -1, k.shape[2], 1
        self._hidden = None if hidden is None else hidden[:, :, None, None].expand(shape)
        self._words = None if words is None else words[None, :, None, None].expand(shape)

    def read(self, part: Part) -> tuple[Tensor, Tensor]:
        return folded(part.block.keys, self._k), folded(part.block.keys, self._v)

    def hidden(self, part: Part) -> Tensor | None:
        if self._hidden is None:
            return None
        found = folded(part.block.keys, self._hidden).squeeze(-1)
        return found[:, :1] if part.block.keys.row_shift == 0 else found  # the same for all heads

    def words(self, part: Part) -> Tensor:
        assert self._words is not None
        return folded(part.block.keys, self._words).squeeze(-1)

    def add(self, part: Part, dk: Tensor, dv: Tensor, stores: bool) -> None:
        assert self._gradients is not None
        for into, found in zip(self._gradients, (dk, dv), strict=True):
            accumulate(part, into, found, stores)


def accumulate(part: Part, into: Tensor, found: Tensor, stores: bool, of_queries: bool = False) -> None:
    """Add a block's gradient to the rows that it belongs to."""
    at = part.block.queries if of_queries else part.block.keys
    found = unfolded(at, found, into.shape[0])
    if stores:
        at.write(into, found)
    elif isinstance(at, Gathered):
        at.add(into, found, part.block.weight)
    elif at.is_view:
        at.read(into).add_(found, alpha=part.block.weight)
    else:
        at.write(into, at.read(into).add_(found, alpha=part.block.weight))


class ReceivedKeys:
    """Cells that came from other ranks: keys and values side by side, (cells, B, D + Dv).

    Args:
        hidden: (B, cells), True where padding hides a key.
        words: dropout's, (cells,).
        gradients: as the cells, in the type that is summed in.
    """

    def __init__(
        self,
        cells: Tensor,
        head_dim: int,
        hidden: Tensor | None,
        words: Tensor | None,
        gradients: Tensor | None = None,
    ) -> None:
        self._cells, self._head_dim, self._hidden, self._words = cells, head_dim, hidden, words
        self._gradients = gradients

    def read(self, part: Part) -> tuple[Tensor, Tensor]:
        assert part.cells is not None
        rows = self._cells.index_select(0, part.cells.flatten()).unflatten(0, part.cells.shape)
        found = rows.permute(3, 0, 1, 2, 4).flatten(0, 1)
        return found[..., : self._head_dim], found[..., self._head_dim :]

    def hidden(self, part: Part) -> Tensor | None:
        if self._hidden is None:
            return None
        assert part.cells is not None
        return self._hidden[:, part.cells].flatten(0, 1)

    def words(self, part: Part) -> Tensor:
        assert part.cells is not None
        assert self._words is not None
        return self._words[part.cells].expand(self._cells.shape[1], *part.cells.shape).flatten(0, 1)

    def add(self, part: Part, dk: Tensor, dv: Tensor, stores: bool) -> None:
        assert part.cells is not None
        assert self._gradients is not None
        assert not stores
        found = torch.cat((dk, dv), -1).unflatten(0, (-1, part.cells.shape[0])).permute(1, 2, 3, 0, 4)
        self._gradients.index_add_(
            0, part.cells.flatten(), found.flatten(0, 2).to(self._gradients.dtype), alpha=part.block.weight
        )
