"""The ranks of a split check: process groups of its own, and agreement of all ranks on what they found."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from lightning_longnet.sequence.agreement import device_of
from lightning_longnet.sequence.position import world_group

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning_longnet.sequence.position import MeshPosition

PATIENCE = 60.0  # seconds that a rank waits in a step for another, which may have ended it
_LEFT = ("imed out", "imeout", "Connection closed", "Connection reset")  # in gloo's errors about a rank that is missing


class Groups:
    """Process groups of one comparison, so that a rank which leaves a step cannot disturb the messages of the run.

    A `Comparison` makes it on all ranks together, again after each error of a step, and calls its methods.  With NCCL
    the groups of the run are used for parts, as new ones would take memory of the device.

    Args:
        position: the position of this rank in the run.

    Attributes:
        parts: the position with the groups in which a step computes parts.
        whole: the position in which a step computes whole sequences.
    """

    def __init__(self, position: MeshPosition) -> None:
        self.parts: Any = position
        self._made: list[Any] = []
        self._world: Any = None
        own: Any = None
        if dist.is_initialized():
            own = dist.new_group([dist.get_rank()], use_local_synchronization=True)
            self._made.append(own)
            if dist.get_backend() == "gloo":
                self._world = self._new(None)
                self.parts = replace(
                    position,
                    sequence_group=self._new(position.sequence_group),
                    data_parallel_group=self._new(position.data_parallel_group),
                )
        self.whole: Any = replace(self.parts, sequence_parallel_size=1, sequence_parallel_rank=0, sequence_group=own)

    def _new(self, group: dist.ProcessGroup | None) -> Any:
        """Return a new group of the ranks of `group`; all ranks make the groups of all, in the same order."""
        timeout = timedelta(seconds=PATIENCE)
        own = None
        for ranks in dict.fromkeys(gathered_objects(tuple(dist.get_process_group_ranks(group)))):
            made = dist.new_group(list(ranks), timeout=timeout)
            if dist.get_rank() in ranks:
                own = made
        self._made.append(own)
        return own

    @contextmanager
    def world(self, position: MeshPosition) -> Iterator[None]:
        """Replace torch's default process group inside the block by one of the ranks that a run has.

        A step on whole sequences runs as in a job with one process for each data-parallel group, and must find that
        number of ranks if it asks torch.distributed for it.

        Args:
            position: `parts` or `whole`.
        """
        world = position.data_parallel_group if position is self.whole else self._world
        if world is None:
            yield
            return
        before = dist.group.WORLD
        dist.group.WORLD = world
        try:
            yield
        finally:
            dist.group.WORLD = before

    def close(self) -> None:
        """Destroy the groups; the object cannot be used any more."""
        while self._made:
            dist.destroy_process_group(self._made.pop())
        self.parts = self.whole = self._world = None

    def leave(self) -> None:
        """Destroy the groups at once after an error on this rank, so that ranks which wait for it get an error."""
        self.close()
        gc.collect()  # connections end with the last reference to them, and modules refer to themselves


def gathered_objects(value: Any) -> list[Any]:
    """Return the value of each rank in their order; all ranks call it together, with objects that can be pickled.

    `Outcome`, `place_of`, `Groups` and the agreements on a fault or a refusal gather values with it.
    """
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def first_fault(fault: str) -> str:
    """Return on all ranks the error message of the first rank that has one; "" if none has.

    Messages of ranks that only waited for others in vain come last.  All ranks call it together: `check_split` for a
    module that cannot be copied, and a `Comparison` after each run of the step.
    """
    faults = [each for each in gathered_objects(fault) if each]
    return next((each for each in faults if not is_of_waiting(each)), next(iter(faults), ""))


def is_of_waiting(fault: str) -> bool:
    """Return whether an error message is that of a rank which waited for another in vain.

    If no rank has another error, a `Comparison` takes it for a verdict, see `parted`.
    """
    return any(text in fault for text in _LEFT)


def from_first(value: Any) -> Any:
    """Return the value of rank 0 on all ranks, which call it together, so that all decide the same by it.

    A `Comparison` calls it for differences that it computes, and for the place.
    """
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def is_first() -> bool:
    """Return whether this is rank 0 of all ranks, or the only process: `check_split` warns there alone."""
    return not dist.is_initialized() or dist.get_rank() == 0


def group_device() -> torch.device:
    """Return the device of the tensors that the default process group takes: CUDA for NCCL, else the CPU.

    The check, `place_of` and `Outcome` ask before they reduce a number over all ranks.
    """
    group = world_group()
    return torch.device("cpu") if group is None else device_of(group)
