"""Averaged weights, as Lightning's `WeightAveraging` and `StochasticWeightAveraging` keep them in model copies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import AveragedModel

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from lightning.pytorch import LightningModule, Trainer


def averages(trainer: Trainer) -> Iterator[nn.Module]:
    """Yield the copy of the model that each callback of a Trainer averages weights in, its attribute "_average_model".

    The callbacks make the copies in their `setup`, before FSDP2 shards the model.  FSDP2's `setup` therefore shards
    what this yields too, and `has_averages` asks whether there is any.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average = getattr(callback, "_average_model", None)
        if isinstance(average, AveragedModel):
            yield average.module
        elif isinstance(average, nn.Module):
            yield average


def has_averages(trainer: Trainer) -> bool:
    """Return whether a callback of a Trainer has made a copy of the model to average weights in, see `averages`.

    FSDP2 asks in `setup` and `save_checkpoint`, as checkpoints are then one file of whole tensors; in `_load_from`, as
    the callback copies weights shard by shard; and in `_reshard_for_averages`, which frees gathered parameters before
    callbacks copy them.  DeepSpeed's `setup` asks with stage 3, which it refuses then.
    """
    return any(True for _ in averages(trainer))


def check_averages(trainer: Trainer, module: LightningModule) -> None:
    """Raise a ValueError if a callback would copy parameters on the meta device, which have no values yet.

    `WeightAveraging` copies the module in its `setup`, before the strategy shards the module and loads its weights.
    FSDP2's `setup_environment` calls this check, which is before that.
    """
    is_read_later = hasattr(module, "_load_sharded_weights") or not is_overridden("configure_model", module)
    is_copied = trainer.state.fn == TrainerFn.FITTING and any(parameter.is_meta for parameter in module.parameters())
    if not is_read_later or not is_copied:
        return
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging):
            raise ValueError(
                f"{type(callback).__name__} must have weights to copy at set-up, got parameters on the meta device, "
                f"which are read after the model is sharded: set load_sharded=False, or make the parameters in "
                f"__init__, or leave out the callback"
            )


def whole_state(state: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a state dict with full tensors on the CPU in place of each DTensor.

    All ranks call it together, as they gather each tensor.  FSDP2's `save_checkpoint` calls it for a checkpoint with
    averaged weights, which is one file.

    Args:
        state: the state dict.
        device: the device on which to gather; shards that are offloaded are copied to it first.
    """

    def whole(value: Any) -> Any:
        """Return the full tensor of a DTensor on the CPU, and any other value as it is."""
        if not isinstance(value, DTensor):
            return value
        on_device: Any = value.to(device)
        return on_device.full_tensor().cpu()

    return {name: whole(value) for name, value in state.items()}


def sharded_state(state: dict[str, Any], module: nn.Module) -> dict[str, Any]:
    """Return a state dict of full tensors with each sharded as the module's tensor of the same name.

    FSDP2's `_load_from` calls it on all ranks for the entry "current_model_state": the weights in training, which
    `WeightAveraging` saves beside their averages and loads into the sharded module again.  Each rank gives the full
    tensors, and keeps its shards without messages.  Values for which the module has no sharded tensor stay as they are.
    """
    held = module.state_dict()

    def sharded(name: str, value: Any) -> Any:
        """Return this rank's shards of a full tensor as a DTensor; the value itself where the module shards none."""
        like = held.get(name)
        if not isinstance(like, DTensor) or isinstance(value, DTensor):
            return value
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)

    return {name: sharded(name, value) for name, value in state.items()}
