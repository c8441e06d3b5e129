"""`LocalShard`: the shard of a process that holds whole sequences, which needs no group."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_longnet.attention.parallel.comm import Comm, Traffic
from lightning_longnet.attention.parallel.shard import SequenceShard

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import Tensor


class LocalComm(Comm):
    """The messages of a process to itself: none is ever sent.  A `LocalShard` has one."""

    def __init__(self) -> None:
        self.rank, self.ranks, self.shard = 0, 1, 0
        self.traffic, self.failure = Traffic(), ""

    @property
    def name(self) -> None:
        """None: there is no group.  A `Guard` tells groups apart by it."""
        return None

    def all_gather(self, own: Tensor, step: str) -> Tensor:
        """Return this process's own tensor as that of the only rank, (1, *own.shape), on its device.

        A `LocalShard` shares its arguments by it when it is made and when it compares a call, as ranks do.
        """
        self._check_failure()
        return own[None]


def local_shard(documents: Tensor | None, key_padding_mask: Tensor | None) -> LocalShard:
    """Return the shard with these documents and this padding, of which at least one is given.

    The property `ContextAttention.shard` calls it for a batch with documents or padding that is not split.
    """
    mask = documents if key_padding_mask is None else key_padding_mask
    assert mask is not None
    return LocalShard(mask.shape[-1], documents, key_padding_mask)


class LocalShard(SequenceShard):
    """All tokens of each sequence, with their documents and padding, as `attend` takes the parts of ranks.

    `local_shard` makes it.

    Args:
        length: tokens of each sequence.
        documents, key_padding_mask: as of `SequenceShard`.
    """

    def __init__(self, length: int, documents: Tensor | None = None, key_padding_mask: Tensor | None = None) -> None:
        super().__init__(None, length, documents=documents, key_padding_mask=key_padding_mask)

    @staticmethod
    def _make_comm(group: dist.ProcessGroup | None) -> Comm:
        """Return messages without a group; `SequenceShard` calls it with `group` None."""
        return LocalComm()
