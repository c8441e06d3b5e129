"""Averages of weights, as Lightning's callbacks keep them in copies of the model."""

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
    """Yield the copies of the model in which callbacks average weights, made before the model is sharded."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average = getattr(callback, "_average_model", None)
        if isinstance(average, AveragedModel):
            yield average.module
        elif isinstance(average, nn.Module):
            yield average


def has_averages(trainer: Trainer) -> bool:
    """Return whether a callback averages weights."""
    return any(True for _ in averages(trainer))


def check_averages(trainer: Trainer, module: LightningModule) -> None:
    """Raise a ValueError where a callback is to copy weights that are read after the module is sharded.

    The callback copies them when it is set up, before the strategy shards the module.
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
    """Return a state with whole tensors on the CPU in place of sharded ones, which all ranks gather together.

    FSDP2 saves averages in one file with it.
    """

    def whole(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        on_device: Any = value.to(device)
        return on_device.full_tensor().cpu()

    return {name: whole(value) for name, value in state.items()}


def sharded_state(state: dict[str, Any], module: nn.Module) -> dict[str, Any]:
    """Return a state whose tensors are sharded as those of the same names in a module; each rank gives whole ones.

    FSDP2 loads averages of a checkpoint in one file with it, for a callback that copies parts.
    """
    held = module.state_dict()

    def sharded(name: str, value: Any) -> Any:
        like = held.get(name)
        if not isinstance(like, DTensor) or isinstance(value, DTensor):
            return value
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)

    return {name: sharded(name, value) for name, value in state.items()}
