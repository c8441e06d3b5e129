"""`Ranks`: the processes that share the work of a command, and what they agree on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from lightning_longnet.sequence import SequenceContext, attach_context, sequence_mesh
from lightning_longnet.sequence.agreement import device_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor, nn
    from torch.distributed import ProcessGroup

T = TypeVar("T")
SHORT = 2**16  # bytes of a text up to which one rank computes it


class Ranks:
    """The processes that share the work of a command; by default this process alone.

    The ranks call each method together.  A ValueError, OSError or ModuleNotFoundError of one rank becomes a
    ValueError on all of them.

    Args:
        context: the context of ranks that share sequences.

    Attributes:
        context: as given.
        size: the number of ranks.
        rank: the number of this rank among them.
        group: their group; None for one process.
    """

    def __init__(self, context: SequenceContext | None = None) -> None:
        self.context = SequenceContext() if context is None else context
        self.size, self.rank = self.context.sequence_parallel_size, self.context.sequence_parallel_rank
        self.group: ProcessGroup | None = self.context.sequence_group if self.size > 1 else None

    @classmethod
    def of_all(cls, device_type: str) -> Ranks:
        """Return the ranks of the default group."""
        return cls(SequenceContext(sequence_mesh(device_type=device_type)))

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one that prints and writes."""
        return self.rank == 0

    def attach(self, model: nn.Module) -> None:
        """Let the layers of a model compute parts of sequences within `context.parts_of`."""
        if self.size > 1:
            attach_context(model, self.context)

    def together(self, work: Callable[[], T]) -> T:
        """Return what a function returns on this rank, once it has returned on all."""
        return self._gathered(work, lambda value: None)[0]

    def each(self, work: Callable[[], T]) -> list[T]:
        """Return what a function returns on each rank; the values are pickled."""
        return self._gathered(work, lambda value: value)[1]

    def first(self, work: Callable[[], T]) -> T:
        """Return on all ranks what a function returns on the first one, which alone calls it."""
        if self.size == 1:
            return work()
        values: list[Any] = [_attempt(work) if self.is_first else None]
        dist.broadcast_object_list(values, group=self.group, group_src=0)
        fault, value = values[0]
        _raise([fault])
        result: T = value
        return result

    def shared(self, items: Iterable[T]) -> Iterator[T]:
        """Yield on all ranks the items of the first one, which alone reads them."""
        if self.size == 1:
            yield from items
            return
        iterator = iter(items)
        while (item := self.first(lambda: next(iterator, None))) is not None:
            yield item

    def share(self, count: int) -> slice:
        """Return the share of this rank in consecutive items, as a rank holds tokens of a sequence."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def rounds(self, items: Sequence[T], is_short: Callable[[T], bool]) -> Iterator[Sequence[T]]:
        """Yield consecutive items: up to one for each rank where they are short, and others one by one."""
        at = 0
        while at < len(items):
            end = at + 1
            while end < min(at + self.size, len(items)) and is_short(items[at]) and is_short(items[end]):
                end += 1
            yield items[at:end]
            at = end

    def summed(self, x: Tensor) -> Tensor:
        """Return the sum of the x of all ranks."""
        if self.size == 1:
            return x
        assert self.group is not None
        total = x.to(device_of(self.group))
        dist.all_reduce(total, group=self.group)
        return total.to(x.device)

    def joined(self, own: Tensor, count: int) -> Tensor:
        """Return all of `count` rows, of which each rank has its share; the result is on the CPU."""
        if self.size == 1:
            return own.cpu()
        assert self.group is not None
        most = -(-count // self.size)
        padded = own.new_zeros((most, *own.shape[1:]), device=device_of(self.group))
        padded[: len(own)] = own
        raw = padded.view(len(padded), -1).view(torch.uint8)  # of any dtype, also of those that gloo does not know
        parts = [torch.empty_like(raw) for _ in range(self.size)]
        dist.all_gather(parts, raw, group=self.group)
        cuts = [count * (rank + 1) // self.size - count * rank // self.size for rank in range(self.size)]
        rows = [part.view(own.dtype).view(padded.shape)[:cut] for part, cut in zip(parts, cuts, strict=True)]
        return torch.cat(rows).cpu()

    def _gathered(self, work: Callable[[], T], sent: Callable[[T], Any]) -> tuple[T, list[Any]]:
        """Return the value of this rank, and what is sent of that of each."""
        if self.size == 1:
            value = work()
            return value, [sent(value)]
        fault, own = _attempt(work)
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, (fault, None if fault is not None else sent(own)), group=self.group)
        _raise([fault for fault, _ in values])
        return own, [value for _, value in values]


def _attempt(work: Callable[[], T]) -> tuple[str | None, Any]:
    """Return the message of the error of a user that a function raises, or None, and what it returns."""
    try:
        return None, work()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        return str(error), None


def _raise(faults: list[str | None]) -> None:
    """Raise the first fault of the ranks, with the number of its rank where not all have it."""
    for rank, fault in enumerate(faults):
        if fault is not None:
            is_of_all = all(each == fault for each in faults)
            raise ValueError(fault if is_of_all else f"rank {rank} of {len(faults)}: {fault}")
