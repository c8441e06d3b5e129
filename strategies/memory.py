"""The comparison of the memory that a run is predicted to need with that of each rank, before the first step."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import RunningStage
from torch.distributed.tensor import DTensor

from lightning_longnet.models.longnet import LongNet
from lightning_longnet.planning.job import Job
from lightning_longnet.planning.preflight import Finding, compare
from lightning_longnet.planning.room import room_of
from lightning_longnet.sequence.agreement import all_gather
from lightning_longnet.sequence.parts import SequencePart

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer

    from lightning_longnet.planning.room import Room
    from lightning_longnet.strategies.split_steps import SplitSteps

MemoryAction = Literal["error", "warn", "off"]


class MemoryCheck:
    """Compares the planned memory of a run with that of each rank, once, at the first training batch.

    Args:
        action: "error" ends the run where it cannot fit into the memory that there is, and warns where less is free
            than planned; "warn" warns of both; "off" compares nothing.
    """

    def __init__(self, action: MemoryAction) -> None:
        if action not in get_args(MemoryAction):
            allowed = ", ".join(map(repr, get_args(MemoryAction)))
            raise ValueError(f"memory_check must be one of {allowed}, got {action!r}")
        self.action = action
        self._is_done = False

    def is_due(self, trainer: Trainer) -> bool:
        """Return whether to call `check` with the next batch: the first of training, unless `action` is "off".

        `SplitSteps.batch_to_device` asks for each batch.
        """
        return self.action != "off" and not self._is_done and trainer.state.stage == RunningStage.TRAINING

    def check(self, strategy: SplitSteps, module: LightningModule, batch: Any) -> None:
        """Raise a ValueError on all ranks if one of them has too little memory for the run.

        With `action` "warn", or if only less memory is free than planned, the first rank concerned warns instead.
        `SplitSteps.batch_to_device` calls it on all ranks together, with the first training batch.

        Args:
            strategy, module: those of the run.
            batch: the whole batch or a `SequencePart`, of the same shapes on all ranks.
        """
        self._is_done = True
        room = room_of(strategy.root_device, len(strategy.parallel_devices or (0,)))
        finding = Finding() if room is None else _memory_finding(strategy, module, batch, room)
        known = torch.tensor([[bool(finding.error), bool(finding.warning)]])
        is_alone = not dist.is_initialized() or dist.get_backend() == "fake"
        world: Any = dist.group.WORLD
        gathered = known if is_alone else all_gather(known[0], world)
        errors, warned = ([i for i, each in enumerate(column) if each] for column in gathered.T.tolist())
        if errors and self.action == "error":
            raise ValueError(finding.error or f"rank {errors[0]} has too little memory: its own message says for what")
        first = (errors or warned or [-1])[0]
        if first == (0 if is_alone else dist.get_rank()):
            warnings.warn(finding.error or finding.warning, stacklevel=2)


def _memory_finding(strategy: SplitSteps, module: LightningModule, batch: Any, room: Room) -> Finding:
    """Return the error or warning for a run that may not fit into this rank's memory; an empty `Finding` if it fits.

    The memory is predicted by the planner, if it knows the model.  Otherwise only parameters, gradients and optimizer
    states are counted, which is less than the run needs; with DeepSpeed not even these.
    """
    optimizers: list[Optimizer] = strategy.optimizers
    job = _job_of(strategy, module, batch, optimizers)
    if job is not None:
        return compare(job, room)
    least = _least_bytes(module, optimizers, strategy.root_device)
    if strategy.sharding.startswith("deepspeed") or least <= room.total:
        return Finding()
    return Finding(
        error=f"parameters, gradients and the optimizer's states hold at least {least / 2**30:.1f} GiB on a rank, and "
        f"there are {room.total / 2**30:.1f} GiB for each: split the model over more ranks with 'fsdp2'; "
        f"memory_check='off' of the strategy leaves this out"
    )


def _job_of(strategy: SplitSteps, module: LightningModule, batch: Any, optimizers: Iterable[Optimizer]) -> Job | None:
    """Return the `Job` of a run, for which the planner predicts the memory; None if it cannot.

    It can if the module's attribute `model` is a LongNet, and the batch has `input_ids`, (B, N).
    """
    model, trainer = getattr(module, "model", None), module.trainer
    tensors = batch.tensors if isinstance(batch, SequencePart) else batch
    ids = tensors.get("input_ids") if isinstance(tensors, Mapping) else None
    if not isinstance(model, LongNet) or not isinstance(ids, torch.Tensor) or ids.dim() != 2:
        return None
    placement = strategy.sequence_context.placement
    try:
        return Job(
            model.config,
            tokens=batch.length if isinstance(batch, SequencePart) else ids.shape[1],
            batch=len(ids),
            nodes=trainer.num_nodes,
            per_node=trainer.world_size // trainer.num_nodes,
            sequence_parallel_size=strategy.sequence_context.sequence_parallel_size,
            sharding=strategy.sharding,
            exchange=strategy.sequence_context.exchange,
            placement="auto" if callable(placement) else placement,
            precision=str(trainer.precision),
            accumulate=trainer.accumulate_grad_batches,
            optimizer_copies=min(map(_states_per_parameter, optimizers), default=0.0),
            is_packed="documents" in tensors,
        )
    except ValueError:  # the planner does not know such a run
        return None


def _states_per_parameter(optimizer: Optimizer) -> float:
    """Return how many numbers an optimizer keeps for each element of a parameter, at least: 2 for Adam."""
    if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        return 2.0
    return float(isinstance(optimizer, torch.optim.SGD) and bool(optimizer.defaults.get("momentum")))


def _least_bytes(module: LightningModule, optimizers: Iterable[Optimizer], device: torch.device) -> float:
    """Return the bytes that this rank needs at least, on its device: its shards of parameters, gradients and states."""

    def size(parameter: torch.Tensor) -> int:
        """Return the bytes of this rank's shard of a parameter; 0 if it is on another device, as with offload."""
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        return local.numel() * local.element_size() if local.device.type == device.type else 0

    held: float = sum(map(size, module.parameters()))
    for optimizer in optimizers:
        trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        held += (1 + _states_per_parameter(optimizer)) * sum(map(size, trained))
    return held
