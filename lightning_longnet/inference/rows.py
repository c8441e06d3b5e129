"""Storage of keys and values in slots, in the dtype of the model, in a narrower one, or in int8 with scales."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.inference.plan import Write
    from lightning_longnet.inference.ranks import CacheRanks

# the first number of slots that is allocated, and the factor by which it grows
FIRST_SLOTS = 64
GROWTH = 1.5
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8)


class RowStore:
    """The rows of one branch on this rank: keys and values (2, B, Hkv, slots, D), allocated as they are needed.

    Arguments and results count the slots of all ranks together, of which each rank holds some; see `CacheRanks`.

    Args:
        batch, kv_heads, head_dim: the sizes.
        dtype: one of `DTYPES`.  A row of int8 is multiplied by a scale of its own, float32.
        device: where the rows are.
        capacity: the largest number of slots; None is any number.
        ranks: the ranks that share the slots.
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        capacity: int | None,
        ranks: CacheRanks,
    ) -> None:
        self.capacity, self.ranks = capacity, ranks
        with torch.inference_mode(False):  # a tensor made in inference mode could not be written to outside of it
            self.data = torch.zeros(2, batch, kv_heads, 0, head_dim, dtype=dtype, device=device)
            self.scales = None
            if dtype == torch.int8:
                self.scales = torch.zeros(2, batch, kv_heads, 0, 1, dtype=torch.float32, device=device)

    @property
    def slots(self) -> int:
        """The number of slots that are allocated for each head, on all ranks."""
        return self.data.shape[3] * self.ranks.size

    @property
    def nbytes(self) -> int:
        """The bytes of the slots that are allocated on this rank."""
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def grow(self, needed: int) -> None:
        """Allocate slots, so that there are at least as many as needed, and equally many on each rank."""
        needed, allocated = self.ranks.most(needed), self.data.shape[3]
        if needed <= allocated:
            return
        slots = max(needed, FIRST_SLOTS, int(allocated * GROWTH))
        if self.capacity is not None:
            slots = min(slots, self.ranks.most(self.capacity))
        self.data = _grown(self.data, slots)
        if self.scales is not None:
            self.scales = _grown(self.scales, slots)

    def select(self, batch: Tensor) -> None:
        """Take the rows of some texts of the batch, given by their indices, in that order."""
        with torch.inference_mode(False):
            self.data = self.data[:, batch]
            self.scales = None if self.scales is None else self.scales[:, batch]

    def restore(self, data: Tensor, scales: Tensor | None) -> None:
        """Take rows and scales of all slots of another store of the same sizes, with any number of slots."""
        for name, own, given in (("rows", self.data, data), ("scales", self.scales, scales)):
            if (own is None) != (given is None):
                raise ValueError(f"{name} must be there for int8 alone")
            if own is None or given is None:
                continue
            sizes = (*own.shape[:3], own.shape[4])
            if given.dim() != 5 or (*given.shape[:3], given.shape[4]) != sizes or given.dtype != own.dtype:
                raise ValueError(f"{name} must be {sizes} beside the slots, {own.dtype}, got {tuple(given.shape)}")
        if self.capacity is not None and data.shape[3] > self.capacity:
            raise ValueError(f"rows must have at most {self.capacity} slots, got {data.shape[3]}")
        self.data = self._own(data)
        self.scales = None if scales is None else self._own(scales)

    def _own(self, x: Tensor) -> Tensor:
        """Return the slots of this rank, out of those of all ranks, and zeros where other ranks have one more."""
        own = x[:, :, :, self.ranks.rank :: self.ranks.size]
        # copies, since `put` writes in place: the tensors may be restored again
        return _grown(own.to(self.data.device, copy=True), self.ranks.most(x.shape[3]))

    def whole(self) -> tuple[Tensor, Tensor | None]:
        """Return the rows and scales of all slots; all ranks call it together."""
        rows, scales = (None if x is None else self.ranks.gather_slots(x) for x in (self.data, self.scales))
        assert rows is not None
        count = self.slots if self.capacity is None else min(self.slots, self.capacity)
        return rows[:, :, :, :count], None if scales is None else scales[:, :, :, :count]

    def put(self, kv: Tensor, heads: slice, slot: int) -> None:
        """Write kv (2, B, some heads, D) to one slot of these heads, on the rank that holds it."""
        slot, holder = divmod(slot, self.ranks.size)
        if holder != self.ranks.rank:
            return
        rows, scales = self._stored(kv)
        self.data[:, :, heads, slot] = rows
        if self.scales is not None and scales is not None:
            self.scales[:, :, heads, slot] = scales

    def scatter(self, kv: Tensor, write: Write) -> None:
        """Write those of kv (2, B, Hkv, n, D) that `write` names, to slots of this rank."""
        self.place(kv[:, write.batch, write.heads, write.tokens], write)

    def place(self, kv: Tensor, write: Write) -> None:
        """Write kv (2, rows, D) to the slots of this rank that `write` names."""
        if not len(write.slots):
            return
        rows, scales = self._stored(kv)
        self.data[:, write.batch, write.heads, write.slots] = rows
        if self.scales is not None and scales is not None:
            self.scales[:, write.batch, write.heads, write.slots] = scales

    def read(self, heads: slice, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return keys and values, each (B, some heads, own, D), in a floating dtype.

        They are those of the slots among the first `count` that this rank holds.
        """
        count = self.ranks.own(count)
        rows = self.data[:, :, heads, :count]
        if self.data.dtype != dtype:
            rows = rows.to(dtype)
        if self.scales is not None:
            rows = rows * self.scales[:, :, heads, :count].to(dtype)
        k, v = rows.unbind(0)
        return k, v

    def _stored(self, kv: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return rows (..., D) in the dtype of the store, and their scales (..., 1)."""
        if self.scales is None:
            return kv if kv.dtype == self.data.dtype else kv.to(self.data.dtype), None
        kv = kv.float()
        scales = kv.abs().amax(-1, keepdim=True) / 127
        return (kv / scales.clamp(min=torch.finfo(torch.float32).tiny)).round().to(torch.int8), scales


def _grown(x: Tensor, slots: int) -> Tensor:
    """Return x (2, B, Hkv, s, D) with zeros in further slots."""
    if slots == x.shape[3]:
        return x
    with torch.inference_mode(False):
        out = x.new_zeros((*x.shape[:3], slots, x.shape[4]))
    out[:, :, :, : x.shape[3]] = x
    return out
