"""DeepSpeed: ZeRO stages 1, 2 and 3, on GPUs, and on CPUs for tests and trials."""

from __future__ import annotations

import os
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DeepSpeedStrategy, ParallelStrategy

from lightning_longnet.checkpointing.restricted import check_folder, deepspeed_classes, restricted
from lightning_longnet.sequence.agreement import fault_of, fault_of_rank_zero
from lightning_longnet.strategies.averages import has_averages
from lightning_longnet.strategies.base import RingSequenceParallelStrategy
from lightning_longnet.strategies.deepspeed_files import copy_files, write_files
from lightning_longnet.strategies.engines import gathers_parameters
from lightning_longnet.strategies.universal import convert, saved_ranks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning.pytorch import Trainer
    from torch import Tensor
    from torch.optim import Optimizer

    from lightning_longnet.checkpointing.background import MemoryFile
    from lightning_longnet.checkpointing.manifest import FileSum

_STAGES: dict[str, dict[str, Any]] = {
    "deepspeed_stage_1": {"stage": 1},
    "deepspeed_stage_2": {"stage": 2},
    "deepspeed_stage_3": {"stage": 3},
    "deepspeed_stage_3_offload": {"stage": 3, "offload_optimizer": True, "offload_parameters": True},
}


class DeepSpeedSequenceParallelStrategy(RingSequenceParallelStrategy, DeepSpeedStrategy):
    """The strategy of the shardings "deepspeed_stage_1", "_2", "_3" and "_3_offload"."""

    lightning_class = DeepSpeedStrategy
    forms = ("deepspeed",)

    def _init_lightning_strategy(self, engine: dict[str, Any], process_group_backend: str | None) -> None:
        """Check that DeepSpeed can do what the options ask for, and initialise Lightning's strategy for it."""
        if find_spec("deepspeed") is None:
            raise ModuleNotFoundError(
                f"sharding {self.sharding!r} needs deepspeed: pip install 'lightning-longnet[deepspeed]', or take "
                f"'fsdp2', 'hsdp' or 'ddp'"
            )
        if self.accumulate == "tokens":
            raise ValueError(
                "accumulate must be 'batches' with deepspeed, which holds the gradients itself: take 'fsdp2', 'hsdp' "
                "or 'ddp' for 'tokens'"
            )
        options: dict[str, Any] = {
            "process_group_backend": process_group_backend,
            "timeout": timedelta(seconds=self.timeout),
        }
        DeepSpeedStrategy.__init__(self, **options, **_STAGES[self.sharding], **engine)
        assert isinstance(self.config, dict)
        # any optimizer may be offloaded; the one that DeepSpeed requires, DeepSpeedCPUAdam, is compiled at run time
        self.config.setdefault("zero_force_ds_cpu_optimizer", False)

    @property
    def root_device(self) -> torch.device:
        device = super().root_device
        return torch.device("cpu", 0) if device.type == "cpu" else device  # DeepSpeed needs an index

    def setup_environment(self) -> None:
        """Connect the ranks, and make their context; Lightning calls it in each process before `setup`."""
        if self.root_device.type == "cuda":
            super().setup_environment()
        else:
            ParallelStrategy.setup_environment(self)  # Lightning's own raises an error on a CPU
            self._connect_on_cpu()
        self._make_context()

    def _connect_on_cpu(self) -> None:
        """Connect the ranks as DeepSpeed does, on CPUs."""
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed reads it at its first use
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would compile C++ at run time
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @staticmethod
    def _whole_parameter(parameter: Tensor) -> Tensor:
        """Return the whole of a parameter, which stage 3 gathers from all ranks for the split check."""
        if not hasattr(parameter, "ds_id"):  # DeepSpeed marks with it what stage 3 has sharded
            return parameter
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def setup(self, trainer: Trainer) -> None:
        """Refuse averages that stage 3 cannot keep, and let checkpoints leave out parameters that LoRA froze."""
        if gathers_parameters(self.sharding) and has_averages(trainer):
            raise ValueError(
                f"sharding {self.sharding!r} takes no callback that averages weights, such as EMAWeightAveraging: "
                f"stage 3 keeps parameters where the callback finds none; take 'fsdp2', 'hsdp', 'ddp' or "
                f"'deepspeed_stage_2'"
            )
        if getattr(self.lightning_module, "excludes_frozen_parameters", False):
            self.exclude_frozen_parameters = True
        super().setup(trainer)

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Let `configure_model` make whole parameters, which DeepSpeed splits when the run is set up.

        Lightning's own context splits each parameter when its module has made it.  Code that initializes or loads it
        later, as layers of this package and models of transformers do, then finds an empty tensor, and some of it
        raises no error.
        """
        self._init_config_if_needed()
        yield

    def on_train_start(self) -> None:
        """Raise a ValueError if an epoch would end with micro-batches that do not fill a step."""
        super().on_train_start()
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        batches, per_step = trainer.num_training_batches, trainer.accumulate_grad_batches
        if batches != float("inf") and batches % per_step:
            used = int(batches // per_step * per_step)
            raise ValueError(
                f"with deepspeed the batches of an epoch must be a multiple of accumulate_grad_batches, {per_step}, "
                f"got {batches}: what is left over would be lost; set limit_train_batches to {used}"
            )

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        # Lightning has divided by the micro-batches already
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def _writes_folder(self) -> bool:
        return True

    def _write_folder(self, checkpoint: dict[str, Any], folder: Path) -> dict[str, FileSum]:
        return write_files(self.deepspeed_engine, folder, lambda: self._save_engine(checkpoint, folder))

    def _copy_folder(self, checkpoint: dict[str, Any], folder: Path) -> dict[str, MemoryFile]:
        return copy_files(self.deepspeed_engine, folder, lambda: self._save_engine(checkpoint, folder))

    def _save_engine(self, checkpoint: dict[str, Any], folder: Path) -> None:
        DeepSpeedStrategy.save_checkpoint(self, checkpoint, folder)

    def _load_from(self, path: Any, weights_only: bool | None) -> dict[str, Any]:
        """Load a checkpoint of any number of ranks, and convert it first where that is not the number of now.

        DeepSpeed unpickles whatever its files hold, so they are read before, and when it reads them, with the few
        classes alone that it puts there, unless `weights_only` is False.
        """
        path, trust = Path(path), weights_only is False
        if fault := fault_of_rank_zero(self, lambda: fault_of(lambda: check_folder(path, trust))):
            raise ValueError(fault)
        with restricted(*deepspeed_classes(), trust=trust):
            return self._load(path, weights_only)

    def _load(self, path: Path, weights_only: bool | None) -> dict[str, Any]:
        """Load a checkpoint that `_load_from` has checked; that of another number of ranks in DeepSpeed's own format.

        This format, the universal one, is that which `convert` writes into the folder, on rank 0.
        """
        if saved_ranks(path) in (0, self.world_size):  # 0 where there are no optimizer states to convert
            return super()._load_from(path, weights_only)
        if fault := fault_of_rank_zero(self, lambda: convert(path, weights_only is False)):
            raise RuntimeError(f"the checkpoint {path} cannot be made to fit {self.world_size} ranks: {fault}")
        config = self.deepspeed_engine._config
        config.load_universal_checkpoint = True  # for this checkpoint alone
        options = [[_options_of(group) for group in optimizer.param_groups] for optimizer in self.optimizers]
        try:
            checkpoint: dict[str, Any] = super()._load_from(path, weights_only)
        finally:
            config.load_universal_checkpoint = False
        self._restore_groups(options, checkpoint)
        return checkpoint

    def _restore_groups(self, options: list[list[dict[str, Any]]], checkpoint: dict[str, Any]) -> None:
        """Give each group of parameters its own options and counts of steps again.

        DeepSpeed's universal format holds those of one group, and lets all parameters share one tensor that counts.

        Args:
            options: for each optimizer those of its groups before the checkpoint was loaded.
            checkpoint: the states of the schedules, which know the learning rates of now.
        """
        schedules = checkpoint.get("lr_schedulers") or [{}] * len(self.optimizers)
        for optimizer, groups, schedule in zip(self.optimizers, options, schedules, strict=False):
            for group, own in zip(optimizer.param_groups, groups, strict=True):
                group.update(own)
            for group, rate in zip(optimizer.param_groups, schedule.get("_last_lr", ()), strict=False):
                group["lr"] = rate
            for state in getattr(optimizer, "optimizer", optimizer).state.values():
                if torch.is_tensor(state.get("step")):
                    state["step"] = state["step"].clone()


def _options_of(group: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a group of parameters, without the parameters."""
    return {name: value for name, value in group.items() if name != "params"}
