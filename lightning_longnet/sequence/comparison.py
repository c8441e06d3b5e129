"""Comparison of the batches of a step over ranks, by one small message of each rank."""

from __future__ import annotations

from functools import lru_cache
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from lightning_longnet.sequence.agreement import batch_difference, device_of, other_group_fault, warn_of_same_batch
from lightning_longnet.sequence.batches import named_tensors
from lightning_longnet.sequence.parts import SequencePart

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

FAULT, LAST, ENDED, VALIDATES = 1, 2, 4, 8
_BLOCK = 2**15  # 64-bit words of a batch that are summed at a time, with the same weights


class Note(NamedTuple):
    """The message of a rank to the others about its batch, or about the end of its batches.

    Attributes:
        state: a sum of FAULT (the batch does not fit), LAST (no batch follows), ENDED (there is none) and VALIDATES
            (validation follows, and then more batches may).
        kind: a number of the names, shapes and types of its tensors.
        content: a number of their values; of a rank that ended, how many batches it was given.
        rates: a number of the learning rates, where the step is of training.
    """

    state: int
    kind: int
    content: int
    rates: int = 0

    @classmethod
    def of(cls, batch: Any, when: str, state: int, rates: Sequence[float] = ()) -> Note:
        """Return the note of a batch that fits, and that a loop named `when` is given, and of the learning rates."""
        rate_number = _number(str(rates)) if rates else 0
        if isinstance(batch, SequencePart):
            return cls(state, _number(when), batch.digest(), rate_number)
        leaves = list(named_tensors(batch))
        kinds = [(path, tuple(x.shape), x.dtype) for path, x in leaves]
        content = 0
        for _, x in leaves:
            content = (content * 1_000_003 + checksum(x)) % 2**61
        return cls(state, _number(f"{when} {type(batch).__name__} {kinds}"), content, rate_number)


class BatchComparison:
    """Compares what all ranks are given in a step.

    Args:
        ranks: the numbers of the ranks, (groups, ranks that share sequences).
        group: a group of all ranks that serves nothing else, so that no message of a rank which is elsewhere in the
            program is taken for one of these.
    """

    def __init__(self, ranks: Tensor, group: dist.ProcessGroup) -> None:
        self.ranks, self.group = ranks, group
        self.data_rank = int((ranks == dist.get_rank()).nonzero()[0, 0])
        # the tensors of all messages: threads of the group may hold on to them for longer than `wait` takes
        self._own = torch.zeros(len(Note._fields), dtype=torch.int64, device=device_of(group))
        self._every = self._own.new_zeros((ranks.numel(), len(self._own)))
        self._notes = list(self._every.unbind())
        self._work: Any = None

    @property
    def is_pending(self) -> bool:
        """Whether a note was sent, and not compared with those of the others."""
        return self._work is not None

    def send(self, note: Note) -> None:
        """Begin to exchange notes; each rank sends one."""
        assert self._work is None
        self._own.copy_(torch.tensor(note))
        self._work = dist.all_gather(self._notes, self._own, group=self.group, async_op=True)

    def receive(self) -> Tensor:
        """Wait for the notes of all ranks, and return them: (groups, ranks that share sequences, fields)."""
        assert self._work is not None
        work, self._work = self._work, None
        work.wait()
        notes: Tensor = self._every.cpu()[self.ranks]
        return notes

    def check(self, notes: Tensor, fault: str, batches: int, *, is_alike: bool) -> bool:
        """Raise a ValueError on all ranks where the notes do not fit together; return whether no batch follows on any.

        `LoaderWatch.receive` calls it before each step, with what `receive` returned.

        Args:
            notes: those of all ranks.
            fault: what is wrong with the batch of this rank.
            batches: how many batches this rank was given.
            is_alike: whether all groups must have equally many batches, or only the ranks of a group.
        """
        states, kinds, contents, rates = notes.unbind(-1)
        first = int(states[0, 0])
        is_alike_in_groups = bool((notes == notes[:, :1]).all()) and bool((rates == rates[0, 0]).all())
        if not first & (FAULT | ENDED) and is_alike_in_groups and bool((states == first).all()):
            if batches == 1:
                warn_of_same_batch(contents[:, 0].tolist())
            return bool(first & LAST)
        if fault:
            raise ValueError(fault)
        faulty = ((states & FAULT) != 0).any(1)
        if bool(faulty.any()):
            raise ValueError(other_group_fault(int(faulty.nonzero()[0])))
        ends = (states & (LAST | ENDED)) != 0
        self._check_ends(ends, states, contents, batches, is_alike=is_alike)
        validates = (states & VALIDATES) != 0
        if bool(validates.any()) and not bool(validates.all()):
            early = _rank_list(self.ranks[validates].tolist())
            raise ValueError(
                f"all ranks must begin validation after the same batch, and {early} would after {batches}, and others "
                f"not: the lengths of their loaders differ, of which "
                f"val_check_interval may be a share; make them the same, or give a number of batches"
            )
        has_batch = (states & ENDED) == 0
        # of ranks that share sequences, as those have batches or not together
        differs = ((kinds != kinds[:, :1]) | (contents != contents[:, :1])) & has_batch
        others = differs[self.data_rank].nonzero().flatten().tolist()
        if others:
            is_kind = bool((kinds[self.data_rank] != kinds[self.data_rank, 0]).any())
            detail = ", of other names, shapes or types" if is_kind else ""
            raise ValueError(batch_difference(others, (self.data_rank, len(self.ranks)), detail))
        if bool((wrong := differs.any(1)).any()):
            raise ValueError(other_group_fault(int(wrong.nonzero()[0])))
        self._check_rates(rates, has_batch)
        if batches == 1 and bool(has_batch.all()):
            warn_of_same_batch(contents[:, 0].tolist())
        return bool(ends.all())

    def _check_rates(self, rates: Tensor, has_batch: Tensor) -> None:
        """Raise a ValueError where ranks have different learning rates."""
        differs = has_batch & (rates != rates[has_batch].view(-1, 1)[:1]) if bool(has_batch.any()) else has_batch
        if bool(differs.any()):
            raise ValueError(
                f"all ranks must have the same learning rates, and {_rank_list(self.ranks[differs].tolist())} have "
                f"others than the first: a scheduler or a callback goes by a number of this rank alone, as a metric "
                f"that ReduceLROnPlateau monitors.  Log the same number on all ranks: a token_mean, or "
                f"self.log(..., sync_dist=True)"
            )

    def _check_ends(self, ends: Tensor, states: Tensor, contents: Tensor, batches: int, *, is_alike: bool) -> None:
        """Raise a ValueError where the batches of some ranks end before those of ranks that must have as many.

        Args:
            ends: (groups, ranks that share sequences), True where no batch follows on a rank.
            states, contents: those fields of the `Note` of each rank, in the same shape.
            batches: how many batches this rank was given.
            is_alike: whether all groups must have equally many batches, or only the ranks of a group.
        """
        # each row of `ends` and `ranks` now has the ranks that must end together
        ends, ranks = (x.flatten()[None] if is_alike else x for x in (ends, self.ranks))
        differs = ends.any(1) & ~ends.all(1)
        if not bool(differs.any()):
            return
        row = int(differs.nonzero()[0])  # the message is about the first of them
        ended, others = ranks[row][ends[row]].tolist(), ranks[row][~ends[row]].tolist()
        group, member = (self.ranks == ended[0]).nonzero()[0].tolist()
        # a rank without a batch sends how many it was given; one with its last batch was given as many as this rank
        is_ended = bool(states[group, member] & ENDED)
        count = int(contents[group, member]) if is_ended else batches
        subject = "all ranks" if is_alike else "ranks that share sequences"
        raise ValueError(
            f"{subject} must be given equally many batches, and those of {_rank_list(ended)} end after {count}, while "
            f"{_rank_list(others)} are given more: make the number of samples and the length of an iterable dataset "
            f"the same for each data_parallel_rank (there are {len(self.ranks)}), or limit the batches to {count}"
        )


def checksum(x: Tensor) -> int:
    """Return a number of the bytes of a tensor, which depends on the place of each: a sum with odd weights."""
    flat = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    words, rest = divmod(flat.numel(), 8)
    total = 0
    if rest:
        total = int.from_bytes(bytes(flat[words * 8 :].tolist()), "little")
    body = flat[: words * 8]
    if body.storage_offset() % 8:
        body = body.clone()
    for block in body.view(torch.int64).split(_BLOCK) if words else ():
        total = (total * 1_000_003 + int(torch.dot(block, _weights()[: block.numel()]))) % 2**61
    return total


@lru_cache(1)
def _weights() -> Tensor:
    return (torch.arange(1, _BLOCK + 1) * -7_046_029_254_386_353_131) | 1


def _number(text: str) -> int:
    return int.from_bytes(sha256(text.encode()).digest()[:7], "big")


def _rank_list(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
