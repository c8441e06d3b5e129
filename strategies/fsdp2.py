"""FSDP2: parameters, gradients and optimiser states sharded over all ranks, or over those that share a sequence."""

from __future__ import annotations

from contextlib import contextmanager
from datetime import timedelta
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard, register_fsdp_forward_method
from torch.optim.swa_utils import AveragedModel

from lightning_longnet.strategies.ring import RingSequenceParallelStrategy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning.pytorch import Trainer
    from torch.distributed.device_mesh import DeviceMesh

_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


class FSDP2SequenceParallelStrategy(RingSequenceParallelStrategy, ModelParallelStrategy):
    """`RingSequenceParallelStrategy(sharding="fsdp2")`, "fsdp2_offload" and "hsdp".

    A module whose `configure_model` applies `fully_shard` keeps its own way; else each block, an entry of an
    `nn.ModuleList` or `nn.Sequential`, is sharded as a unit, and then the whole.
    """

    def _start_engine(self, engine: dict[str, Any], process_group_backend: str | None) -> None:
        told: dict[str, Any] = {
            "process_group_backend": process_group_backend,
            "timeout": timedelta(seconds=self.timeout),
        }
        ModelParallelStrategy.__init__(self, data_parallel_size=1, tensor_parallel_size=1, **told, **engine)

    def setup_environment(self) -> None:
        ParallelStrategy.setup_environment(self)  # without the mesh of data and tensor parallelism
        self._setup_distributed()
        self._make_context()
        assert self.lightning_module is not None
        self._device_mesh = self.lightning_module._device_mesh = self.sequence_context.mesh

    def setup(self, trainer: Trainer) -> None:
        module = self.lightning_module
        assert module is not None
        if not any(isinstance(each, FSDPModule) for each in module.modules()):
            for each in (module, *_averages(trainer)):
                self._shard(each)
        if not is_overridden("configure_model", module):
            setattr(module, "configure_model", MethodType(lambda _: None, module))  # noqa: B010  Lightning wants one
        super().setup(trainer)

    def _shard(self, module: nn.Module) -> None:
        for tensor in (*module.parameters(), *module.buffers()):
            if not tensor.is_meta:
                dist.broadcast(tensor.data, src=0)  # each rank may have drawn its own
        settings: dict[str, Any] = {"mesh": self._shard_mesh()}
        if self.sharding == "fsdp2_offload":
            settings["offload_policy"] = CPUOffloadPolicy(pin_memory=self.root_device.type == "cuda")
        for block in _blocks(module):
            fully_shard(block, **settings)
        fully_shard(module, **settings)
        for name in _STEPS:
            # a step that calls parts of the module must find their parameters whole
            register_fsdp_forward_method(module, name)

    def _shard_mesh(self) -> DeviceMesh:
        mesh = self.sequence_context.mesh
        assert mesh is not None
        return mesh if self.sharding == "hsdp" else mesh._flatten("ranks")

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        model: Any = self.model
        if not isinstance(model, FSDPModule):
            yield
            return
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)


def _averages(trainer: Trainer) -> Iterator[nn.Module]:
    """The copies of the model in which Lightning's callbacks average weights, made before anything is sharded."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average = getattr(callback, "_average_model", None)
        if isinstance(average, AveragedModel):
            yield average.module
        elif isinstance(average, nn.Module):
            yield average


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost entries of lists of modules that are made of modules and have parameters."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            composed = (entry for entry in child if any(True for _ in entry.children()))
            yield from (entry for entry in composed if any(True for _ in entry.parameters()))
        else:
            yield from _blocks(child)
