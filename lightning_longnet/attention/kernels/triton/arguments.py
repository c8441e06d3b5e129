"""The arguments of a launch, as the programs of Triton read them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lightning_longnet.attention.kernels.triton.rectangles import Phase
    from lightning_longnet.attention.kernels.triton.tile_list import TileList


class Rows(NamedTuple):
    """A tensor (B, N, H, D) or (B, N, H) and its strides over samples, rows and heads; D is contiguous.

    The programs read q, k, v, out, lse and the gradients through it.
    """

    data: Tensor
    batch: int
    row: int
    head: int

    @classmethod
    def of(cls, x: Tensor) -> Rows:
        """Return a tensor with its strides; `launch.py` calls it for each argument."""
        return cls(x, *x.stride()[:3])


class Lists(NamedTuple):
    """The tile list of a launch, the rows of received keys, and the number of programs of an item.

    Attributes:
        items, spans: those of a `TileList`, on the device of the tensors.
        received: the row of each received key; `items`, which is not read, where keys are those of this process.
        programs: one for each sample and, in programs of queries, for each query head of the item's key head.
    """

    items: Tensor
    spans: Tensor
    received: Tensor
    programs: int

    @classmethod
    def of(cls, phase: Phase, tiles: TileList, device: torch.device) -> Lists:
        """Return the lists of a phase on a device, with 1 for `programs`.

        `launch.py` calls it once for parts that it has not met, and replaces `programs` in each call.
        """
        items, spans = (x.to(device) for x in tiles)
        received = items if phase.received is None else phase.received.to(device)
        return cls(items, spans, received, 1)


class Form(NamedTuple):
    """The values for which a program is compiled: Triton's constants.

    Attributes:
        rows, others: the sizes of a tile; see `TileList`.
        width, value_width: of q and k, and of v.
        padded_width, padded_value_width: the powers of two that hold them, 16 at least.
        group: the number of query heads of a key head.
        every: see `Phase`.
        is_joined: whether rectangles are of several branches: without, `multiple` and `unit` are 1 and `level` is 0.
        is_signed: whether rectangles have weights.
        is_received: whether keys stand in an index.
        is_padded: whether a padding mask excludes keys.
        accumulates: whether results are merged into what is in memory, which they otherwise replace.
    """

    rows: int
    others: int
    width: int
    value_width: int
    padded_width: int
    padded_value_width: int
    group: int
    every: tuple[int, ...]
    is_joined: bool
    is_signed: bool
    is_received: bool
    is_padded: bool
    accumulates: bool
