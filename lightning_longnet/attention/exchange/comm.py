"""Messages between the ranks of a group: started, and waited for with words that say what was waited for."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


@dataclass
class Pending:
    """Messages on their way, each with the words that tell whose it is.

    The tensors are held, as the network reads and writes them.
    """

    works: list[tuple[dist.Work, str]]
    tensors: tuple[Tensor, ...]
    comm: Comm

    def wait(self) -> None:
        begin = perf_counter()
        for work, words in self.works:
            try:
                work.wait()
            except RuntimeError as error:
                raise RuntimeError(f"{words}: {error}") from error
        self.works, self.tensors = [], ()
        self.comm.waited_seconds += perf_counter() - begin


class Errand(NamedTuple):
    """What messages are sent for: in words, and by all that must be equal on both sides."""

    words: str
    kind: str


class Comm:
    """What one rank of a group sends and receives.

    `shard` is the number by which all ranks know whose messages these are.  `messages` and `sent_bytes` count what this
    one sent, `waited_seconds` how long it stood still for what had not come.  `failure` tells what it did not finish.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.shard = 0
        self.messages = self.sent_bytes = 0
        self.waited_seconds = 0.0
        self.failure = ""

    @contextmanager
    def finished(self, what: str) -> Iterator[None]:
        """A rank does all of it, or nothing more: after an error others wait, and nobody knows who has heard what."""
        self._check_failure()
        done = False
        try:
            yield
            done = True
        finally:
            if not done:
                self.failure = f"rank {self.rank} of {self.ranks} failed in {what} ({sys.exc_info()[1]!r})"

    def swap(self, send: dict[int, Tensor], receive: dict[int, Tensor], errand: Errand, what: str) -> Pending:
        """One message to each rank of `send` and from each of `receive`; none of them empty.

        Messages match by a tag of the shard, the errand, `what`, and their type and shape: where ranks do different
        things, gloo waits for what never comes, and a timeout tells.  NCCL knows no tags: there messages match in their
        order alone.
        """
        story = f"rank {self.rank} of {self.ranks}, {errand.words}, {what}"
        operations, words = [], []
        for peer, tensor in sorted(receive.items()):
            tag = self._tag(errand, what, tensor)
            operations.append(dist.P2POp(dist.irecv, tensor, group=self.group, tag=tag, group_peer=peer))
            words.append(f"{story}, from rank {peer}")
        for peer, tensor in sorted(send.items()):
            assert tensor.is_contiguous()
            tag = self._tag(errand, what, tensor)
            operations.append(dist.P2POp(dist.isend, tensor, group=self.group, tag=tag, group_peer=peer))
            words.append(f"{story}, to rank {peer}")
            self.messages += 1
            self.sent_bytes += tensor.numel() * tensor.element_size()
        peers = ", ".join(map(str, sorted({*send, *receive})))
        try:
            works = dist.batch_isend_irecv(operations) if operations else []
        except RuntimeError as error:
            raise RuntimeError(f"{story}, with ranks {peers}: {error}") from error
        if len(works) < len(words):  # NCCL has one for all of them
            words = [f"{story}, with ranks {peers}"] * len(works)
        return Pending(list(zip(works, words, strict=True)), (*send.values(), *receive.values()), self)

    def gathered(self, own: Tensor, what: str) -> Tensor:
        """(ranks, *own.shape), of tensors of one shape."""
        self._check_failure()
        found = own.new_empty((self.ranks, *own.shape))
        try:
            dist.all_gather(list(found.unbind()), own.contiguous(), group=self.group)
        except RuntimeError as error:
            raise RuntimeError(f"rank {self.rank} of {self.ranks}, {what}: {error}") from error
        return found

    def _check_failure(self) -> None:
        if self.failure:
            raise RuntimeError(
                f"{self.failure}, and its messages may still be under way: make a new group and a new shard"
            )

    def _tag(self, errand: Errand, what: str, tensor: Tensor) -> int:
        words = f"{self.shard} {errand} {what} {tensor.dtype} {tuple(tensor.shape)}"
        return int.from_bytes(sha256(words.encode()).digest()[:4], "big") >> 1  # what a tag may be: 31 bits
