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
    """The strategy of the shardings "deepspeed_stage_1", "_2", "_3" and "_3_offload".

    Lightning calls the public methods on all ranks: `setup_environment`, then `model_sharded_context` around
    `configure_model`, then `setup`; `on_train_start` before the first step and `backward` in each.
    """

    lightning_class = DeepSpeedStrategy
    forms = ("deepspeed",)

    def _init_lightning_strategy(self, engine: dict[str, Any], process_group_backend: str | None) -> None:
        """Check that DeepSpeed is installed and serves the options, and call `__init__` of `DeepSpeedStrategy`.

        `RingSequenceParallelStrategy.__init__` calls it.
        """
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
        """The `root_device` of `SequenceRanks`; on a CPU with the index 0, which DeepSpeed needs."""
        device = super().root_device
        return torch.device("cpu", 0) if device.type == "cpu" else device

    def setup_environment(self) -> None:
        """Connect the ranks, and make their context; Lightning calls it in each process before `setup`."""
        if self.root_device.type == "cuda":
            super().setup_environment()
        else:
            ParallelStrategy.setup_environment(self)  # Lightning's own raises an error on a CPU
            self._connect_on_cpu()
        self._make_context()

    def _connect_on_cpu(self) -> None:
        """Connect the ranks on CPUs, with the parts of Lightning's `setup_environment` that need no GPU."""
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed reads it at its first use
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would compile C++ at run time
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @staticmethod
    def _whole_parameter(parameter: Tensor) -> Tensor:
        """Return the full tensor of a parameter; all ranks call it together, as stage 3 must gather it.

        The split check and `CausalLMModule.save_pretrained` use it.  With stages 1 and 2 it is the parameter itself.
        """
        if not hasattr(parameter, "ds_id"):  # DeepSpeed marks with it what stage 3 has sharded
            return parameter
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def setup(self, trainer: Trainer) -> None:
        """Set the run up; the Trainer calls it when the model is made, and before it restores a checkpoint.

        A ValueError is raised for callbacks that average weights with stage 3.  Checkpoints of a module that excludes
        frozen parameters, as one with LoRA, are to leave them out.
        """
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
        """Let `configure_model`, around which Lightning enters this block, make full parameters.

        DeepSpeed shards them when the run is set up.  Lightning's own context shards each parameter when its module has
        made it.  Code that initializes or loads it later, as layers of this package and models of transformers do, then
        finds an empty tensor, and some of it raises no error.
        """
        self._init_config_if_needed()
        yield

    def on_train_start(self) -> None:
        """Raise a ValueError if an epoch would end with fewer micro-batches than an optimizer step takes.

        Lightning calls it before the first step of `fit`.
        """
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
        """Run the backward.

        DeepSpeed must not divide the loss by the number of micro-batches, because Lightning has already done it.
        """
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    # `CheckpointSaves.save_checkpoint` calls the next three

    def _saves_folders(self) -> bool:
        """Return True: each rank writes its files into a folder."""
        return True

    def _write_folder(self, checkpoint: dict[str, Any], folder: Path) -> dict[str, FileSum]:
        """Let DeepSpeed write a folder, on all ranks together; return the checksum of each file of this rank."""
        return write_files(self.deepspeed_engine, folder, lambda: self._save_engine(checkpoint, folder))

    def _copy_folder(self, checkpoint: dict[str, Any], folder: Path) -> dict[str, MemoryFile]:
        """Let DeepSpeed write a folder to memory, on all ranks together; return the files of this rank."""
        return copy_files(self.deepspeed_engine, folder, lambda: self._save_engine(checkpoint, folder))

    def _save_engine(self, checkpoint: dict[str, Any], folder: Path) -> None:
        """Save as Lightning's strategy does; `write_files` and `copy_files` call it, in place of DeepSpeed's writer."""
        DeepSpeedStrategy.save_checkpoint(self, checkpoint, folder)

    def _load_from(self, path: Any, weights_only: bool | None) -> dict[str, Any]:
        """Load a checkpoint that DeepSpeed saved with any number of ranks into the engine, and return the rest of it.

        `CheckpointSaves.load_checkpoint` calls it on all ranks.  DeepSpeed unpickles whatever its files hold.  Unless
        `weights_only` is False, only the classes that DeepSpeed itself writes are allowed: rank 0 checks the files
        first, and the restriction holds while DeepSpeed reads them.
        """
        path, trust = Path(path), weights_only is False
        if fault := fault_of_rank_zero(self, lambda: fault_of(lambda: check_folder(path, trust))):
            raise ValueError(fault)
        with restricted(*deepspeed_classes(), trust=trust):
            return self._load(path, weights_only)

    def _load(self, path: Path, weights_only: bool | None) -> dict[str, Any]:
        """Load a checkpoint that `_load_from` has checked.

        If another number of ranks saved it, rank 0 converts it to DeepSpeed's universal format first, once, in files
        inside the checkpoint's folder.
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
        """Give each parameter group its options again, and each parameter its own count of steps.

        After loading the universal format, which holds the options of one group, all groups have these, and all
        parameters share one tensor as their count.

        Args:
            options: for each optimizer the options of its groups before the checkpoint was loaded.
            checkpoint: the checkpoint, whose states of learning rate schedulers hold the current learning rates.
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
    """Return the options of an optimizer's parameter group, such as "lr" and "weight_decay", without the parameters."""
    return {name: value for name, value in group.items() if name != "params"}
