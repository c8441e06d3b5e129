"""Messages between the ranks of a group: started, and waited for with words that say what was waited for."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor


@dataclass
class Traffic:
    """What one rank sent, and how long it took, since its count began.

    `waited_seconds` is how long the rank stood still for what had not come, `flight_seconds` the time from the start of
    messages until they were known to have come, in which it may have computed, and `loss_seconds` how long it stood
    still for the losses of others.  Over NCCL they are of the host, which waits for nothing: a GPU's own waiting is not
    in them.  Where `calls` is a list, each pass of attention over ranks is noted in it, as (is it a backward, layout,
    exchanges, sizes); whoever wants that empties the list, too.
    """

    messages: int = 0
    sent_bytes: int = 0
    waited_seconds: float = 0.0
    flight_seconds: float = 0.0
    loss_seconds: float = 0.0
    calls: list[tuple[bool, Any, tuple[str, ...], Any]] | None = None

    def waited(self, begin: float, started: float) -> None:
        """Until now, from `begin` on, for messages that were on their way since `started`."""
        end = perf_counter()
        self.waited_seconds += end - begin
        self.flight_seconds += end - started

    def note(self, is_backward: bool, layout: Any, exchanges: tuple[str, ...], sizes: Any) -> None:
        if self.calls is not None:
            self.calls.append((is_backward, layout, exchanges, sizes))


@dataclass
class Pending:
    """Messages on their way, each with the words that tell whose it is.

    The tensors are held, as the network reads and writes them.
    """

    works: list[tuple[dist.Work, str]]
    tensors: tuple[Tensor, ...]
    comm: Comm
    started: float = field(default_factory=perf_counter)

    def wait(self) -> None:
        if not self.works:
            return
        begin = perf_counter()
        for work, words in self.works:
            try:
                work.wait()
            except RuntimeError as error:
                raise RuntimeError(f"{words}: {error}") from error
        self.works, self.tensors = [], ()
        self.comm.traffic.waited(begin, self.started)


class Errand(NamedTuple):
    """What messages are sent for: in words, and by all that must be equal on both sides."""

    words: str
    kind: str


class Comm:
    """What one rank of a group sends and receives.

    `shard` is the number by which all ranks know whose messages these are.  `traffic` counts what this one sent; the
    shards of a `SequenceContext` share theirs.  `failure` tells what it did not finish; `on_failure`, where there is
    one, is told of it with the error, which it may add to: that of a call hears of its forward and its backward.
    """

    swaps = 0  # begun so far

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.shard = 0
        self.traffic = Traffic()
        self.failure = ""
        self.on_failure: Callable[[BaseException, str], None] | None = None

    @property
    def messages(self) -> int:
        return self.traffic.messages

    @property
    def sent_bytes(self) -> int:
        return self.traffic.sent_bytes

    @property
    def waited_seconds(self) -> float:
        return self.traffic.waited_seconds

    @contextmanager
    def heard(self, on_failure: Callable[[BaseException, str], None] | None) -> Iterator[None]:
        """In here failures are told to this one."""
        kept, self.on_failure = self.on_failure, on_failure
        try:
            yield
        finally:
            self.on_failure = kept

    @contextmanager
    def finished(self, what: str) -> Iterator[None]:
        """A rank does all of it, or nothing more: after an error others wait, and nobody knows who has heard what."""
        self._check_failure()
        before, done = self.swaps, False
        try:
            yield
            done = True
        except ValueError:
            done = self.swaps == before  # what a schedule refuses it refuses on all ranks, before anything is begun
            raise
        finally:
            if not done:
                error = sys.exc_info()[1]
                self.failure = f"rank {self.rank} of {self.ranks} failed in {what} ({error!r})"
                if self.on_failure is not None and error is not None:
                    self.on_failure(error, self.failure)

    def swap(self, send: dict[int, Tensor], receive: dict[int, Tensor], errand: Errand, what: str) -> Pending:
        """One message to each rank of `send` and from each of `receive`; none of them empty.

        Messages match by a tag of the shard, the errand, `what`, and their type and shape: where ranks do different
        things, gloo waits for what never comes, and a timeout tells.  NCCL knows no tags: there messages match in their
        order alone.
        """
        story = f"rank {self.rank} of {self.ranks}, {errand.words}, {what}"
        peers = ", ".join(map(str, sorted({*send, *receive})))
        self.swaps += bool(peers)
        operations, words = [], []
        try:
            for peer, tensor in sorted(receive.items()):
                tag = self._tag(errand, what, tensor)
                operations.append(dist.P2POp(dist.irecv, tensor, group=self.group, tag=tag, group_peer=peer))
                words.append(f"{story}, from rank {peer}")
            for peer, tensor in sorted(send.items()):
                assert tensor.is_contiguous()
                tag = self._tag(errand, what, tensor)
                operations.append(dist.P2POp(dist.isend, tensor, group=self.group, tag=tag, group_peer=peer))
                words.append(f"{story}, to rank {peer}")
                self.traffic.messages += 1
                self.traffic.sent_bytes += tensor.numel() * tensor.element_size()
            works = dist.batch_isend_irecv(operations) if operations else []
        except (RuntimeError, ValueError) as error:  # a ValueError where the group was destroyed
            raise RuntimeError(f"{story}, with ranks {peers}: {error}") from error
        if len(works) < len(words):  # NCCL has one for all of them
            words = [f"{story}, with ranks {peers}"] * len(works)
        return Pending(list(zip(works, words, strict=True)), (*send.values(), *receive.values()), self)

    def gathered(self, own: Tensor, what: str) -> Tensor:
        """(ranks, *own.shape), of tensors of one shape."""
        self._check_failure()
        found = own.new_empty((self.ranks, *own.shape))
        begin = perf_counter()
        try:
            dist.all_gather(list(found.unbind()), own.contiguous(), group=self.group)
        except RuntimeError as error:
            raise RuntimeError(f"rank {self.rank} of {self.ranks}, {what}: {error}") from error
        self.traffic.waited(begin, begin)
        return found

    def _check_failure(self) -> None:
        if self.failure:
            raise RuntimeError(
                f"{self.failure}, and its messages may still be under way: make a new group and a new shard"
            )

    def _tag(self, errand: Errand, what: str, tensor: Tensor) -> int:
        words = f"{self.shard} {errand} {what} {tensor.dtype} {tuple(tensor.shape)}"
        return int.from_bytes(sha256(words.encode()).digest()[:4], "big") >> 1  # what a tag may be: 31 bits
