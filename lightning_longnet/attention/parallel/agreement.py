"""Integers and texts that the ranks of a group compare, in steps that all of them reach together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch

if TYPE_CHECKING:
    from lightning_longnet.attention.parallel.comm import Comm

_WORDS = 24  # every comparison between ranks has so many: gathering tensors of unequal sizes would end the process
_LETTERS = 400  # an error message shows so many bytes of the value of another rank

Step = Literal[
    "makes a shard",
    "compares a call",
    "agrees on kernels",
    "looks a shard up",
    "agrees on a seed",
    "compares positions",
]


class OtherRankError(ValueError):
    """Another rank of the group has refused its arguments, and raises the error that has the reason.

    `split_check` reports the reason of that rank and not this error.
    """

    def __init__(self, rank: int) -> None:
        super().__init__(
            f"rank {rank} of the group was given arguments that do not fit, or no memory: its own message says which"
        )


def all_gather_integers(comm: Comm, values: list[int], step: Step, fault: str = "") -> list[list[int]]:
    """Return the integers of each rank, padded with zeros to equal lengths.

    `SequenceShard` calls it when it is made and where it compares calls and values; all ranks of the group call it
    together, with at most 22 values.  The message names the step, so that ranks in different steps raise a ValueError
    instead of reading each other's values.  To a rank with a `fault` it returns, and its caller raises that error; on
    the others it raises an `OtherRankError`, which names the rank.
    """
    steps = get_args(Step)
    padded = [steps.index(step), int(bool(fault)), *values] + [0] * (_WORDS - 2 - len(values))
    assert len(padded) == _WORDS
    everywhere: list[list[int]] = comm.all_gather(torch.tensor(padded), step).tolist()
    if not fault:
        if faulty := [r for r, theirs in enumerate(everywhere) if theirs[1]]:
            raise OtherRankError(faulty[0])
        if others := [r for r, theirs in enumerate(everywhere) if theirs[0] != padded[0]]:
            other = f"rank {comm.rank} of the group {step}, rank {others[0]} {steps[everywhere[others[0]][0]]}"
            raise ValueError(f"all ranks of a group must do the same, in one order: {other}")
    return [theirs[2:] for theirs in everywhere]


def all_gather_text(comm: Comm, text: str, step: Step) -> list[str]:
    """Return the text of each rank, cut to its first 400 bytes.

    `SequenceShard.check` calls it on all ranks when their calls differ, for the error that all of them raise.
    """
    own = text.encode()[:_LETTERS].ljust(_LETTERS)
    rows = comm.all_gather(torch.tensor(list(own), dtype=torch.uint8), step)
    return [bytes(row.tolist()).decode(errors="ignore").rstrip() for row in rows]
