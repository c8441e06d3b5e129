"""Messages between the ranks of a group, with descriptions of what a rank waited for."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from time import perf_counter
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import timedelta
    from hashlib import _Hash

    from torch import Tensor

    from lightning_longnet.attention.parallel.exchange import ExchangePlan, Sizes

Direction = Literal["forward", "backward"]


@dataclass
class Traffic:
    """The messages and bytes that one rank sent since the object was made, and the time that they took.

    Each `Comm` has one; the callback `CommunicationMonitor` reads that of the `SequenceContext` and logs differences.

    Attributes:
        messages, sent_bytes: what `Comm.exchange` sent.  `Comm.all_gather` counts its wait alone; inference, which
            sends much by it, adds its messages here.
        waited_seconds: how long the rank waited for messages without computing.
        flight_seconds: the time from the start of messages until their arrival was known; the rank may have computed
            meanwhile.
        loss_seconds: how long the rank waited for the losses of others.
        calls: None, or a list to which each forward and backward over ranks is added as (direction, plan, sizes).
            `CommunicationMonitor` and `MemoryMonitor` set it at the start of a training batch, and None after training
            and before a validation.

    Over NCCL the times are those of the host, which waits for nothing: a GPU's own waiting is not in them.
    """

    messages: int = 0
    sent_bytes: int = 0
    waited_seconds: float = 0.0
    flight_seconds: float = 0.0
    loss_seconds: float = 0.0
    calls: list[tuple[Direction, ExchangePlan, Sizes]] | None = None

    def add_wait(self, begin: float, started: float) -> None:
        """Count a wait that began at `begin` and ends now, for messages that were sent at `started`.

        Both are values of `perf_counter`, in seconds.  `Pending.wait` and `Comm.all_gather` call it.
        """
        end = perf_counter()
        self.waited_seconds += end - begin
        self.flight_seconds += end - started

    def add_call(self, direction: Direction, plan: ExchangePlan, sizes: Sizes) -> None:
        """Record a call if `calls` is a list; `distributed_calls` calls it for each, and callbacks read the list."""
        if self.calls is not None:
            self.calls.append((direction, plan, sizes))


@dataclass
class Pending:
    """Messages on their way, each with a description for errors: what `Comm.exchange` returns.

    It references the tensors, since the network still reads and writes them.
    """

    works: list[tuple[dist.Work, str]]
    tensors: tuple[Tensor, ...]
    comm: Comm
    started: float = field(default_factory=perf_counter)

    def wait(self) -> None:
        """Wait for all messages, or raise a RuntimeError that says which one failed; a second call does nothing.

        Each caller of `Comm.exchange` calls it before it reads what it receives: `RoundsCall` after the blocks that it
        computes meanwhile, `RankOrder`, `AllToAllCall` and `CacheRanks` at once or after copies on this rank.
        """
        if not self.works:
            return
        begin, limit = perf_counter(), wait_arguments(self.comm.group)
        for work, description in self.works:
            try:
                work.wait(*limit)
            except RuntimeError as error:
                raise RuntimeError(f"{description}: {error}") from error
        self.works, self.tensors = [], ()
        self.comm.traffic.add_wait(begin, self.started)


def timeout_of(group: dist.ProcessGroup) -> timedelta:
    """Return the timeout that a group of gloo or NCCL has now.

    `wait_arguments` asks for gloo, and `Timeouts.shorten` before it sets a shorter timeout for a training step;
    `Timeouts.end_step` or `Timeouts.interrupt` then sets this one again.
    """
    device = "cpu" if dist.get_backend(group) == "gloo" else "cuda"
    limit: timedelta = group._get_backend(torch.device(device)).options._timeout
    return limit


def wait_arguments(group: dist.ProcessGroup) -> tuple[timedelta, ...]:
    """Return the arguments of `Work.wait` for messages of a group: with gloo, the timeout that the group has now.

    With other backends there are none.  Messages of gloo, unlike its collectives, would go by the timeout that the
    group was made with.  `Pending.wait` asks.
    """
    return (timeout_of(group),) if dist.get_backend(group) == "gloo" else ()


class MessageContext(NamedTuple):
    """The call that messages belong to: a description for errors, and the text of what both sides must agree on.

    `distributed_calls` makes one for each call, and inference for a long step over ranks.  The tag of a message is a
    hash of both and of more, see `Comm.exchange`.
    """

    description: str
    kind: str


class Comm:
    """Messages of one rank to and from the others of a group.

    Each `SequenceShard` has one, and so have the caches of inference over ranks.

    Attributes:
        shard: the number by which all ranks know the shard that messages belong to.
        traffic: counts what this rank sends; the shards of a `SequenceContext` share one.
        failure: describes the call that this rank did not finish, or ""; later calls and gathers are refused with it.
    """

    exchanges = 0  # the number of exchanges that were started

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.shard = 0
        self.traffic = Traffic()
        self.failure = ""

    @property
    def name(self) -> str | None:
        """The name of the group; None for the one process of a `LocalComm`.  A `Guard` tells groups apart by it."""
        return self.group.group_name

    @property
    def messages(self) -> int:
        """The messages that this rank has sent; see `Traffic`.  Users, tests and benchmarks read these three counts."""
        return self.traffic.messages

    @property
    def sent_bytes(self) -> int:
        """The bytes that this rank has sent; see `Traffic`."""
        return self.traffic.sent_bytes

    @property
    def waited_seconds(self) -> float:
        """The seconds that this rank has waited for messages; see `Traffic`."""
        return self.traffic.waited_seconds

    @contextmanager
    def whole_call(self, call: str) -> Iterator[None]:
        """Mark the communication as failed unless the call runs to its end.

        The operators of op.py run a forward or backward over ranks inside of it; `call` names that in errors.  After an
        error other ranks still wait, and no rank knows what the others have received.  A ValueError before the first
        message of the call is no failure: all ranks raise it.  After a failure this raises a RuntimeError at once.
        """
        self._check_failure()
        before, done = self.exchanges, False
        try:
            yield
            done = True
        except ValueError:
            done = self.exchanges == before  # all ranks refuse alike, before any of them begins a message
            raise
        finally:
            if not done:
                error = sys.exc_info()[1]
                self.failure = f"rank {self.rank} of {self.ranks} failed in {call} ({error!r})"

    def exchange(
        self, send: dict[int, Tensor], receive: dict[int, Tensor], context: MessageContext, content: str
    ) -> Pending:
        """Start one message to each rank of `send` and from each of `receive`; both may be empty, but no tensor.

        `RoundsCall`, `AllToAllCall` and `RankOrder` call it, and `CacheRanks.exchange` of inference.  Received tensors
        are valid, and sent ones may be changed, when the caller has called `wait` of the result.  `content` says what
        is sent, for errors and tags.

        Messages match by a tag of the shard, the context, the content, their type and their shape: where ranks do
        different things, gloo waits for a message that never comes, and ends with the timeout.  NCCL ignores tags:
        there messages match by their order alone.
        """
        here = f"rank {self.rank} of {self.ranks}, {context.description}, {content}"
        peers = ", ".join(map(str, sorted({*send, *receive})))
        self.exchanges += bool(peers)
        operations, descriptions = [], []
        # the part of the tags that all messages share; its hash is the long part of their work
        shared = sha256(f"{self.shard} {context} {content}".encode())
        try:
            for peer, tensor in sorted(receive.items()):
                tag = _tag(shared, tensor)
                operations.append(dist.P2POp(dist.irecv, tensor, group=self.group, tag=tag, group_peer=peer))
                descriptions.append(f"{here}, from rank {peer}")
            for peer, tensor in sorted(send.items()):
                assert tensor.is_contiguous()
                tag = _tag(shared, tensor)
                operations.append(dist.P2POp(dist.isend, tensor, group=self.group, tag=tag, group_peer=peer))
                descriptions.append(f"{here}, to rank {peer}")
                self.traffic.messages += 1
                self.traffic.sent_bytes += tensor.numel() * tensor.element_size()
            works = dist.batch_isend_irecv(operations) if operations else []
        except (RuntimeError, ValueError) as error:  # a ValueError where the group was destroyed
            raise RuntimeError(f"{here}, with ranks {peers}: {error}") from error
        if len(works) < len(descriptions):  # NCCL returns one for all of them
            descriptions = [f"{here}, with ranks {peers}"] * len(works)
        return Pending(list(zip(works, descriptions, strict=True)), (*send.values(), *receive.values()), self)

    def all_gather(self, own: Tensor, step: str) -> Tensor:
        """Gather `own` from all ranks, which call it together; return a tensor (ranks, *own.shape) on the CPU.

        Shards compare arguments and share documents and padding by it (through `all_gather_integers` and
        `all_gather_text`), and `CacheRanks` gathers outs and cached keys.  All ranks pass the same shape and dtype.
        `step` describes the call in errors.
        """
        self._check_failure()
        own = own.to("cuda" if dist.get_backend(self.group) == "nccl" else "cpu").contiguous()
        everywhere = own.new_empty((self.ranks, *own.shape))
        begin = perf_counter()
        try:
            dist.all_gather(list(everywhere.unbind()), own, group=self.group)
        except RuntimeError as error:
            raise RuntimeError(f"rank {self.rank} of {self.ranks}, {step}: {error}") from error
        self.traffic.add_wait(begin, begin)  # a blocking call: the wait begins when the message is sent
        return everywhere.cpu()

    def _check_failure(self) -> None:
        """Raise a RuntimeError if an earlier call failed; `whole_call` and `all_gather` begin with it."""
        if self.failure:
            raise RuntimeError(
                f"{self.failure}, and its messages may still be under way: make a new group and a new shard"
            )


def _tag(shared: _Hash, tensor: Tensor) -> int:
    """Return the tag of a message, an integer of 31 bits, which both sides compute alike.

    `shared` is the hash of what all messages of an exchange have in common.
    """
    whole = shared.copy()
    whole.update(f" {tensor.dtype} {tuple(tensor.shape)}".encode())
    return int.from_bytes(whole.digest()[:4], "big") >> 1  # a tag has 31 bits
