"""The engines, the strategies of Lightning that ours is built on: which one each value of `sharding` selects."""

from __future__ import annotations

from importlib import import_module
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from lightning.pytorch.strategies import ParallelStrategy

    from lightning_longnet.strategies.base import RingSequenceParallelStrategy

Sharding = Literal[
    "fsdp2",
    "fsdp2_offload",
    "hsdp",
    "ddp",
    "deepspeed_stage_1",
    "deepspeed_stage_2",
    "deepspeed_stage_3",
    "deepspeed_stage_3_offload",
]
_FSDP2 = ("fsdp2", "FSDP2SequenceParallelStrategy")
_DEEPSPEED = ("deepspeed", "DeepSpeedSequenceParallelStrategy")
_CLASSES = {
    "ddp": ("ddp", "DDPSequenceParallelStrategy"),
    "hsdp": _FSDP2,
    "fsdp2": _FSDP2,
    "fsdp2_offload": _FSDP2,
}

# The arguments of Lightning's strategies that ours sets itself
_OURS = {"accelerator", "parallel_devices", "cluster_environment", "checkpoint_io", "precision_plugin", "timeout"}
_OURS |= {"process_group_backend", "data_parallel_size", "tensor_parallel_size", "stage", "zero_optimization"}


def strategy_class(sharding: str) -> type[RingSequenceParallelStrategy]:
    """Return the subclass of `RingSequenceParallelStrategy` for a value of `sharding`.

    Its module is imported here, when a strategy is made, so that DeepSpeed need not be installed for the others.  A
    ValueError names the values that are allowed.  `RingSequenceParallelStrategy(...)` calls it, in the `__new__` of its
    base class `_ClassBySharding`.
    """
    if sharding not in get_args(Sharding):
        allowed = ", ".join(map(repr, get_args(Sharding)))
        raise ValueError(f"sharding must be one of {allowed}, got {sharding!r}")
    module, name = _CLASSES.get(sharding, _DEEPSPEED)
    chosen: type[RingSequenceParallelStrategy] = getattr(import_module(f"lightning_longnet.strategies.{module}"), name)
    return chosen


def checked_engine_options(lightning_class: type[ParallelStrategy], options: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of the argument `engine` of the strategy, after checking its names.

    `RingSequenceParallelStrategy.__init__` calls it.

    Args:
        lightning_class: Lightning's strategy, which gets the options as keyword arguments.
        options: the options by name.  Arguments that this package sets itself, such as `timeout`, are not allowed.
    """
    valid = set(signature(lightning_class).parameters) - _OURS
    if "kwargs" in valid:  # Lightning passes these on to DistributedDataParallel
        valid = valid - {"kwargs"} | (set(signature(DistributedDataParallel).parameters) - {"module", "device_ids"})
    if unknown := [name for name in options if name not in valid]:
        allowed = ", ".join(sorted(valid))
        raise ValueError(f"engine must hold arguments of {lightning_class.__name__}, {allowed}, got {unknown}")
    return dict(options)


def gathers_parameters(sharding: str) -> bool:
    """Return whether a sharding splits the parameters, so that all ranks gather them in each forward.

    `SequenceRanks._make_context` and `SplitSteps.on_predict_start` ask, as all ranks must then call the model equally
    often, `FirstBatchCheck.check`, as `check_split` cannot copy such a module itself, and DeepSpeed's `setup`, which
    then refuses averaged weights.
    """
    return sharding not in ("ddp", "deepspeed_stage_1", "deepspeed_stage_2")
