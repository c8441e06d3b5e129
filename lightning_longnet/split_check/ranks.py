"""The ranks of a split check: separate groups, a world for each run, and agreement on the outcomes of all ranks."""

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
_LEFT = ("imed out", "imeout", "Connection closed", "Connection reset")  # what gloo says of a rank that does not come


class Groups:
    """Groups that last for one check, so that a rank which leaves a step cannot disturb the messages of the run.

    Over gloo the parts have separate groups.  NCCL's would take memory of the device for each.

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
        """Return a group of the same ranks; all ranks make all groups, in the same order."""
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
        """Let torch.distributed know no other ranks inside the block than those that a run has.

        A run on whole sequences is that of one process for each of them: a step which asks for its rank must hear that.
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
        """Destroy the groups."""
        while self._made:
            dist.destroy_process_group(self._made.pop())
        self.parts = self.whole = self._world = None

    def leave(self) -> None:
        """Destroy the groups now, so that ranks which still wait for this one get an error."""
        self.close()
        gc.collect()  # connections end with the last reference to them, and modules refer to themselves


def gathered_objects(value: Any) -> list[Any]:
    """Return the value of each rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def first_fault(fault: str) -> str:
    """Return on all ranks the fault of the first that has one, of which those that only waited for others are last."""
    faults = [each for each in gathered_objects(fault) if each]
    return next((each for each in faults if not is_of_waiting(each)), next(iter(faults), ""))


def is_of_waiting(fault: str) -> bool:
    """Whether a fault is that of a rank which waited for another in vain."""
    return any(text in fault for text in _LEFT)


def from_first(value: Any) -> Any:
    """Return the value of rank 0 on all ranks: what is decided by it is decided alike."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def is_first() -> bool:
    """Whether this rank is the first of all."""
    return not dist.is_initialized() or dist.get_rank() == 0


def group_device() -> torch.device:
    """Return the device of the tensors that the group of all ranks takes."""
    group = world_group()
    return torch.device("cpu") if group is None else device_of(group)
