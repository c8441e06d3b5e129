"""`CacheRanks`: the ranks over which the rows of a cache are split, and what they say to each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from lightning_longnet.attention.parallel.comm import Comm

if TYPE_CHECKING:
    from typing import Any

    from torch import Tensor

    from lightning_longnet.attention.kernels.partial import Partial
    from lightning_longnet.attention.parallel.comm import MessageContext
    from lightning_longnet.inference.plan import Write


class CacheRanks:
    """The ranks that share a cache: of each branch and head, slot s is on rank `s % size`, as its slot `s // size`.

    So ranks hold equally many rows at any time, to one row of each branch, and a new row takes the place of one of the
    same rank.

    Args:
        group: the ranks; None is this process alone.

    Attributes:
        group: as given.
        size: the number of ranks.
        rank: the number of this rank among them.
        comm: the messages to the others, whose `traffic` counts them; None where there is no other rank.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.comm = None if group is None or dist.get_world_size(group) == 1 else Comm(group)
        self.rank, self.size = (0, 1) if self.comm is None else (self.comm.rank, self.comm.ranks)

    def __deepcopy__(self, _: Any) -> CacheRanks:
        return self  # groups cannot be copied

    @property
    def numbers_among_all(self) -> list[int]:
        """The numbers of these ranks among all."""
        return [] if self.comm is None else dist.get_process_group_ranks(self.comm.group)

    def most(self, count: int) -> int:
        """Return the largest number of slots that a rank holds of the first `count`."""
        return -(-count // self.size)

    def own(self, count: int) -> int:
        """Return how many of the first `count` slots are on this rank."""
        return len(range(self.rank, count, self.size))

    @property
    def share(self) -> slice:
        """The share of this rank in slots, and in the tokens of a step."""
        return slice(self.rank, None, self.size)

    def own_rows(self, write: Write) -> Write:
        """Return those of the rows to write whose slots are on this rank, with its own numbers of the slots."""
        if self.comm is None:
            return write
        own = write.those(write.slots % self.size == self.rank)
        return own._replace(slots=own.slots // self.size)

    def merge_(self, partial: Partial) -> None:
        """Merge what each rank attended to, in place: one all_gather of out and lse.

        The ranks add in the same order, so that all get the same bits.
        """
        if self.comm is None:
            return
        width = partial.out.shape[-1]
        own = torch.cat([partial.out, partial.lse], -1)
        outs, lses = self.all_gather(own, "merges attention to a cache").split([width, 1], -1)
        lse = lses.logsumexp(0)
        shares = (lses - lse.masked_fill(lse.isneginf(), 0)).exp()  # 0 of ranks that hold no key
        partial.out.copy_((shares * outs).sum(0))
        partial.lse.copy_(lse)

    def all_gather(self, own: Tensor, step: str) -> Tensor:
        """Return the tensors of all ranks, (ranks, *own.shape), on the CPU; `step` describes the call in errors."""
        assert self.comm is not None
        self._count(own)
        return self.comm.all_gather(own, step)

    def exchange(self, send: dict[int, Tensor], receive: dict[int, Tensor], context: MessageContext) -> None:
        """Send a tensor to each rank of `send`, and fill those of `receive` with what their ranks send."""
        assert self.comm is not None
        self.comm.exchange(send, receive, context, "keys and values").wait()

    def gather_slots(self, x: Tensor) -> Tensor:
        """Return the slots (2, B, Hkv, slots, D) of all ranks, in their order, out of those of each rank."""
        if self.comm is None:
            return x
        everywhere = self.all_gather(x, "gathers the rows of a cache")
        return everywhere.movedim(0, 4).flatten(3, 4)

    def check_same(self, fault: str, cache: int, tokens: int) -> None:
        """Raise a ValueError on all ranks where one has a fault, or where they differ in what they were given.

        Args:
            fault: why this rank cannot compute the step; "" where it can.
            cache: a number of what its cache is and holds.
            tokens: a number of the tokens that it was given.
        """
        if self.comm is None:
            if fault:
                raise ValueError(fault)
            return
        own = torch.tensor([bool(fault), cache, tokens], device=self._device)
        notes = self.all_gather(own, "compares the tokens of a cache")
        if fault:
            raise ValueError(fault)
        for ranks, message in (
            (notes[:, 0] != 0, "cannot go on with these tokens: its own message says why"),
            (notes[:, 1] != notes[0, 1], "holds another cache than rank 0: the ranks of a group must make it alike"),
            (notes[:, 2] != notes[0, 2], "was given other tokens than rank 0, or other options: all must go on alike"),
        ):
            if others := ranks.nonzero().flatten().tolist():
                raise ValueError(f"rank {others[0]} of {self.size} {message}")

    def first(self, x: Tensor) -> Tensor:
        """Return the x of the first rank on all of them, on the CPU."""
        if self.comm is None:
            return x
        x = x.to(self._device)
        self._count(x)
        dist.broadcast(x, group=self.group, group_src=0)  # sent on by others, so that each counts as for a gather
        return x.cpu()

    @property
    def _device(self) -> torch.device:
        """The device of small messages."""
        return torch.device("cuda" if dist.get_backend(self.group) == "nccl" else "cpu")

    def _count(self, own: Tensor) -> None:
        """Count what this rank sends to the others."""
        assert self.comm is not None
        self.comm.traffic.messages += self.size - 1
        self.comm.traffic.sent_bytes += (self.size - 1) * own.nbytes
