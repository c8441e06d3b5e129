"""Comparison of the batches that ranks are given for a step, by one `all_gather` of four integers of each rank."""

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
_FACTOR = -7_046_029_254_386_353_131  # odd, and 2**64 over the golden ratio as an int64: its bits look random


class Note(NamedTuple):
    """The message of a rank to the others about the batch that it was given, or about the end of its batches.

    Attributes:
        state: a sum of FAULT (the batch is wrong), LAST (it is the last one of the loop), ENDED (the loop has had all
            its batches, and this message is of none) and VALIDATES (validation follows, and then more batches may).
        kind: a hash of the loop and of the names, shapes and dtypes of the tensors.
        content: a hash of their values; with ENDED, how many batches the rank was given.
        rates: a hash of the learning rates in training, else 0.
    """

    state: int
    kind: int
    content: int
    rates: int = 0

    @classmethod
    def of(cls, batch: Any, when: str, state: int, rates: Sequence[float] = ()) -> Note:
        """Return the note of a batch in which the rank has found nothing wrong.

        `LoaderWatch` makes one of each batch that a loop is given, and compares it with those of the other ranks.

        Args:
            batch: the whole batch, or a `SequencePart`, of which the names of samples are compared.
            when: the name of the loop and the index of its loader.
            state: LAST, VALIDATES, their sum, or 0.
            rates: the learning rates of all groups of parameters; none outside of training.
        """
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
    """Exchanges the notes of all ranks about a step's batch, and raises errors where they differ.

    A `LoaderWatch` has one where ranks share sequences, and calls its methods on all ranks: `send` when a loop is given
    a batch or has none left, and `receive` and `check` before the step.

    Args:
        ranks: the ranks as a table, (data_parallel_size, sequence_parallel_size): those of a row share sequences.
        group: a process group of all ranks that is used for nothing else.  In another group a rank that is elsewhere
            in the program could answer with a message of another collective.
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
        """Whether `send` was called, and `receive` has not been since."""
        return self._work is not None

    def send(self, note: Note) -> None:
        """Start the `all_gather` of one note of each rank, without waiting; `receive` waits for it."""
        assert self._work is None
        self._own.copy_(torch.tensor(note))
        self._work = dist.all_gather(self._notes, self._own, group=self.group, async_op=True)

    def receive(self) -> Tensor:
        """Wait for the notes of all ranks, and return them: int64, (*ranks.shape, fields of `Note`), on the CPU."""
        assert self._work is not None
        work, self._work = self._work, None
        work.wait()
        notes: Tensor = self._every.cpu()[self.ranks]
        return notes

    def check(self, notes: Tensor, fault: str, batches: int, *, is_alike: bool) -> bool:
        """Raise a ValueError on all ranks if a batch is wrong, batches or learning rates differ, or some ranks end.

        `LoaderWatch.receive` calls it on all ranks before each step.  Each rank gets the same notes, so that either all
        raise an error or none.

        Args:
            notes: what `receive` returned.
            fault: the message of what is wrong with the batch of this rank, or "".
            batches: how many batches this rank was given in this pass of the loop, this one included.
            is_alike: True if all ranks must have equally many batches; False if only those that share sequences must.

        Returns:
            Whether no rank has another batch.
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
        """Raise a ValueError, on all ranks, if one has other learning rates than the first rank that has a batch.

        `check` calls it last.

        Args:
            rates: the field of each rank's `Note`, (*ranks.shape).
            has_batch: in the same shape, False for ranks that have ended, which send no learning rates; if all have
                ended, nothing is compared.
        """
        if not bool(has_batch.any()):
            return
        differs = has_batch & (rates != rates[has_batch][0])
        if bool(differs.any()):
            first = int(self.ranks[has_batch][0])
            others = _rank_list(self.ranks[differs].tolist())
            raise ValueError(
                f"all ranks must have the same learning rates, and those of {others} differ from those of rank {first}"
                f": a scheduler or a callback goes by a number of this rank alone, as a metric that ReduceLROnPlateau "
                f"monitors.  Log the same number on all ranks: a token_mean, or self.log(..., sync_dist=True)"
            )

    def _check_ends(self, ends: Tensor, states: Tensor, contents: Tensor, batches: int, *, is_alike: bool) -> None:
        """Raise a ValueError where the batches of some ranks end before those of ranks that must have as many.

        Args:
            ends: (data_parallel_size, sequence_parallel_size), True where no batch follows on a rank.
            states, contents: those fields of the `Note` of each rank, in the same shape.
            batches, is_alike: those of `check`.
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
    """Return a hash of the bytes of a tensor, below 2**61, that is much faster to compute than SHA-256.

    The bytes are read as 64-bit words, and summed with odd weights that depend on the index of each word.  Shape and
    dtype are not part of it.  A difference in the highest bit of two words would cancel in a sum modulo 2**64, as in
    the signs of two floats: each word is first multiplied, and the high half of the product mixed into its low half.
    `Note.of` calls it for the tensors of a batch.  Ranks that generate text together compare their inputs by it:
    `_Prompts.number` hashes the prompts and their attention_mask, `_number_of` of cached.py the embedded tokens,
    documents and attention_mask of each call with a cache.
    """
    flat = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    words, rest = divmod(flat.numel(), 8)
    total = 0
    if rest:
        total = int.from_bytes(bytes(flat[words * 8 :].tolist()), "little")
    body = flat[: words * 8]
    if body.storage_offset() % 8:
        body = body.clone()
    for block in body.view(torch.int64).split(_BLOCK) if words else ():
        # a prime, so that all 64 bits of the sum count
        total = (total * 1_000_003 + int(torch.dot(_mixed(block), _weights()[: block.numel()]))) % (2**61 - 1)
    return total


@lru_cache(1)
def _weights() -> Tensor:
    """Return the weights of the words of a block: odd int64, (_BLOCK,)."""
    # mixed twice: of weights in an arithmetic series, some sums cancel
    return _mixed(_mixed(torch.arange(1, _BLOCK + 1))) | 1


def _mixed(words: Tensor) -> Tensor:
    """Return int64 words in which each bit of the given ones changes many bits, the lower ones among them."""
    product = words * _FACTOR
    return (product >> 32).bitwise_and_(0xFFFFFFFF).bitwise_xor_(product)


def _number(text: str) -> int:
    """Return a 56-bit hash of a text, the same in all processes, as that of Python's `hash` is not."""
    return int.from_bytes(sha256(text.encode()).digest()[:7], "big")


def _rank_list(ranks: list[int]) -> str:
    """Return "rank 3" or "ranks 1, 3" for an error message."""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
