"""The keys of a block, of this rank or received, as a kernel reads them, and the accumulation of their gradients."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from lightning_longnet.attention.plan.lattice import fold_rows

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.attention.kernels.accumulator import Accumulator
    from lightning_longnet.attention.plan.block import Part


class KeyTensors(NamedTuple):
    """All keys of this rank, or all that one round received, for a kernel that reads rows where they are.

    `Keys.tensors` returns it.

    Attributes:
        k, v: (B, rows, Hkv, D); a received row belongs to one head, and all heads have the same view of it.
        padding: (B, rows), True where padding masks a key; None without padding.
        sources: the number of received rows of each rank, in their order; empty for the keys of this rank.
        gradients: those of k and v, to be added to: accumulators of the keys of this rank, tensors of received keys.
    """

    k: Tensor
    v: Tensor
    padding: Tensor | None
    sources: tuple[int, ...] = ()
    gradients: tuple[Accumulator, Accumulator] | tuple[Tensor, Tensor] | None = None


class Keys(Protocol):
    """The keys and values of blocks, as a kernel reads them: (batch * segments, heads, rows, D).

    `OwnKeys` are those of this rank, `ReceivedKeys` those that came in a round; `forward_blocks` and `backward_blocks`
    take either.
    """

    def tensors(self) -> KeyTensors:
        """Return all keys and values, their padding and their gradients.

        A `PartsKernel` calls it, which reads rows where they are, and `forward_blocks` for the width of v.
        """

    def unmasked(self) -> KeyTensors | None:
        """Return these keys, of this rank or received as views, if none is masked; else None.

        Keys are masked by padding, by dropout, or by their tokens where a line masks later ones.  The steps of parts
        read such keys where they are.
        """

    def allocate_gradients(self) -> None:
        """Allocate the memory of the gradients, for threads that add to it.

        `backward_blocks` calls it before its tasks.
        """

    def of_samples(self, samples: slice) -> Keys:
        """Return those of some samples, whose gradients are added to the same memory.

        `forward_blocks` and `backward_blocks` call it for the task of a thread.
        """

    def read(self, part: Part) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a part; `_forward` and `_backward` of blocks.py call it for each block."""

    def key_padding_mask(self, part: Part) -> Tensor | None:
        """Return (batch * segments, 1 or heads, rows), True where padding masks a key; None without padding.

        `kernel_calls` calls it for each block.
        """

    def words(self, part: Part) -> Tensor:
        """Return dropout's words of the keys of a part, (batch * segments, heads, rows).

        `kernel_calls` calls it for each block where pairs are dropped.
        """

    def tokens(self, part: Part) -> Tensor:
        """Return the index of each key of a part in the whole sequence, (batch * segments, heads, rows).

        `kernel_calls` calls it for each block whose later keys are masked.
        """

    def add(self, part: Part, dk: Tensor, dv: Tensor, stores: bool) -> None:
        """Add the gradients of a part, each (batch * segments, heads, rows, D), to those of all keys.

        `_backward` of blocks.py calls it for each block.  With `stores` they are written, as no other part has these
        keys.
        """


class OwnKeys:
    """Keys and values (B, N, Hkv, D) that parts read by their lattices.

    `RoundsCall` makes it of the keys on this rank in each forward and backward, and of received rows as rows of one
    head, where the parts of a round have lattices of these.

    It is one of `Keys`, which says when its methods are called.

    Args:
        padding: (B, N), True where padding masks a key.
        words: dropout's words, (N,).
        tokens: (N,) the index of each key in the whole sequence.
        gradients: dk and dv, to which `add` adds.
    """

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        padding: Tensor | None = None,
        words: Tensor | None = None,
        tokens: Tensor | None = None,
        gradients: tuple[Accumulator, Accumulator] | None = None,
    ) -> None:
        self._k, self._v, self._gradients, self._mask = k, v, gradients, padding
        self._padding = self._words = self._tokens = None
        if padding is not None or words is not None or tokens is not None:
            self._padding, self._words, self._tokens = (
                None if x is None else x[..., None, None].expand(k.shape[0], -1, k.shape[2], 1)
                for x in (padding, words, tokens)
            )

    def tensors(self) -> KeyTensors:
        """Return the tensors as they were given."""
        return KeyTensors(self._k, self._v, self._mask, (), self._gradients)

    def unmasked(self) -> KeyTensors | None:
        """Return the tensors as they were given, unless there are masks of keys."""
        if self._padding is None and self._words is None and self._tokens is None:
            return self.tensors()
        return None

    def allocate_gradients(self) -> None:
        """Allocate the accumulators dk and dv."""
        assert self._gradients is not None
        for gradient in self._gradients:
            gradient.allocate()

    def of_samples(self, samples: slice) -> OwnKeys:
        """Return the keys of some samples, as views."""
        part = copy(self)
        part._k, part._v = self._k[samples], self._v[samples]
        part._mask, part._padding, part._words, part._tokens = (
            None if x is None else x[samples] for x in (self._mask, self._padding, self._words, self._tokens)
        )
        if self._gradients is not None:
            dk, dv = self._gradients
            part._gradients = dk.of_samples(samples), dv.of_samples(samples)
        return part

    def read(self, part: Part) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a part: views where its rows are evenly spaced."""
        return fold_rows(part.block.keys, self._k), fold_rows(part.block.keys, self._v)

    def key_padding_mask(self, part: Part) -> Tensor | None:
        """Return (batch * segments, 1 or heads, rows), True where padding masks a key; None without padding."""
        if self._padding is None:
            return None
        rows = fold_rows(part.block.keys, self._padding).squeeze(-1)
        return rows[:, :1] if part.block.keys.row_shift == 0 else rows  # without a shift all heads have the same rows

    def words(self, part: Part) -> Tensor:
        """Return dropout's words of the keys of a part, (batch * segments, heads, rows)."""
        assert self._words is not None
        return fold_rows(part.block.keys, self._words).squeeze(-1)

    def tokens(self, part: Part) -> Tensor:
        """Return the index of each key of a part in the whole sequence, (batch * segments, heads, rows)."""
        assert self._tokens is not None
        return fold_rows(part.block.keys, self._tokens).squeeze(-1)

    def add(self, part: Part, dk: Tensor, dv: Tensor, stores: bool) -> None:
        """Add the gradients of a part to dk and dv, or write them with `stores`."""
        assert self._gradients is not None
        for total, gradient in zip(self._gradients, (dk, dv), strict=True):
            total.add(part.block.keys, gradient, part.block.weight, stores)


class ReceivedKeys:
    """Rows of key heads that came from other ranks: keys and values side by side, (R, B, D + Dv).

    `RoundsCall` makes it for a round whose parts have a `kv_index`.  It is one of `Keys`, which says when its methods
    are called.

    Args:
        padding: (B, R), True where padding masks a key.
        words: dropout's words, (R,).
        tokens: (R,) the index of each row in the whole sequence.
        gradients: (R, B, D + Dv), in the type of the accumulators.
        sources: the number of rows of each rank, in their order.
        kv_heads: the number of key heads that the rows may belong to.
    """

    def __init__(
        self,
        kv_rows: Tensor,
        head_dim: int,
        padding: Tensor | None = None,
        words: Tensor | None = None,
        tokens: Tensor | None = None,
        gradients: Tensor | None = None,
        sources: tuple[int, ...] = (),
        kv_heads: int = 1,
    ) -> None:
        self._kv_rows, self._head_dim, self._padding = kv_rows, head_dim, padding
        self._sources, self._kv_heads = sources, kv_heads
        self._words, self._tokens, self._gradients = words, tokens, gradients

    def tensors(self) -> KeyTensors:
        """Return all received rows, as views."""
        k, v = self._of_heads(self._kv_rows)
        gradients = None if self._gradients is None else self._of_heads(self._gradients)
        return KeyTensors(k, v, self._padding, self._sources, gradients)

    def unmasked(self) -> None:
        """Return None: received rows are read by their index."""

    def allocate_gradients(self) -> None:
        """Do nothing: `RoundsCall` has allocated the gradients of received rows."""
        assert self._gradients is not None, "allocated by the caller"

    def of_samples(self, samples: slice) -> ReceivedKeys:
        """Return the rows of some samples, as views."""
        part = copy(self)
        part._kv_rows = self._kv_rows[:, samples]
        part._padding = None if self._padding is None else self._padding[samples]
        part._gradients = None if self._gradients is None else self._gradients[:, samples]
        return part

    def _of_heads(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and the values in rows (R, B, D + Dv) as views (B, R, Hkv, D)."""
        views = rows.transpose(0, 1)[:, :, None].expand(-1, -1, self._kv_heads, -1)
        return views[..., : self._head_dim], views[..., self._head_dim :]

    def read(self, part: Part) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a part, (batch * segments, heads, rows, D), copied from its `kv_index`."""
        assert part.kv_index is not None
        # (segments, heads, rows, B, D + Dv), then (B * segments, heads, rows, D + Dv) as kernels take it
        rows = self._kv_rows.index_select(0, part.kv_index.flatten()).unflatten(0, part.kv_index.shape)
        rows = rows.permute(3, 0, 1, 2, 4).flatten(0, 1)
        return rows[..., : self._head_dim], rows[..., self._head_dim :]

    def key_padding_mask(self, part: Part) -> Tensor | None:
        """Return (batch * segments, heads, rows), True where padding masks a key; None without padding."""
        if self._padding is None:
            return None
        assert part.kv_index is not None
        return self._padding[:, part.kv_index].flatten(0, 1)

    def words(self, part: Part) -> Tensor:
        """Return dropout's words of the keys of a part, (batch * segments, heads, rows)."""
        return self._of_rows(part, self._words)

    def tokens(self, part: Part) -> Tensor:
        """Return the index of each key of a part in the whole sequence, (batch * segments, heads, rows)."""
        return self._of_rows(part, self._tokens)

    def _of_rows(self, part: Part, x: Tensor | None) -> Tensor:
        """Return a number of each row, (R,), for the rows of a part and all samples."""
        assert part.kv_index is not None
        assert x is not None
        return x[part.kv_index].expand(self._kv_rows.shape[1], *part.kv_index.shape).flatten(0, 1)

    def add(self, part: Part, dk: Tensor, dv: Tensor, stores: bool) -> None:
        """Add the gradients of a part to those of the received rows, which then travel back to their ranks."""
        assert part.kv_index is not None
        assert self._gradients is not None
        assert not stores, "a received row may stand in several blocks"
        # the inverse of `read`: back to (segments, heads, rows, B, D + Dv)
        rows = torch.cat((dk, dv), -1).unflatten(0, (-1, part.kv_index.shape[0])).permute(1, 2, 3, 0, 4)
        self._gradients.index_add_(
            0, part.kv_index.flatten(), rows.flatten(0, 2).to(self._gradients.dtype), alpha=part.block.weight
        )
