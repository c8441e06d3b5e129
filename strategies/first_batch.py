"""The split check of a run: the first batch of each loop is computed on split sequences and on whole ones."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch.distributed.fsdp import FSDPModule
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_longnet.sequence.attach import attach_context
from lightning_longnet.split_check import check_split
from lightning_longnet.split_check.check import replica_of
from lightning_longnet.split_check.engine import EngineModule
from lightning_longnet.split_check.isolation import StopStep
from lightning_longnet.strategies.engines import gathers_parameters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from lightning_longnet.sequence.context import SequenceContext
    from lightning_longnet.split_check.check import Action
    from lightning_longnet.split_check.replica import Replica
    from lightning_longnet.strategies.split_steps import SplitSteps

_FIT = {"training", "validation"}
_PACKAGE = "lightning_longnet."


class FirstBatchCheck:
    """Runs `check_split` on the first batch of training, validation, test and prediction of a run.

    Args:
        action: what happens if the results differ: "error", "warn" or "off"; see `check_split`.
    """

    def __init__(self, action: Action) -> None:
        self.action = action
        self._replica: Replica | str | None = None
        self._checked: set[str] = set()

    def begin(self, module: LightningModule, whole: Callable[[Tensor], Tensor]) -> None:
        """Copy the structure of a module at set-up, before FSDP2 or DeepSpeed shards it; once in a run.

        `SplitSteps._begin_split_check` calls it.  With the action "off" nothing is copied.

        Args:
            module: the module.
            whole: returns the full tensor of a parameter that has been sharded since; all ranks call it together.
        """
        if self._replica is None and self.action != "off":
            self._replica = replica_of(module, whole)

    def end(self) -> None:
        """Forget the module and the loops that were checked; `SplitSteps.teardown` calls it."""
        self._replica = None
        self._checked.clear()

    def is_due(self, strategy: SplitSteps, trainer: Trainer) -> bool:
        """Return whether to call `check` with the next batch: the first of its loop, where ranks share sequences.

        It is False if `action` is "off", and for the predict step of this package's modules, which may continue texts
        by thousands of tokens.  `SplitSteps.batch_to_device` asks for each batch.
        """
        stage, size = _stage(trainer), strategy.sequence_context.sequence_parallel_size
        if stage == "predict" and _is_own_predict_step(trainer.lightning_module):
            self._skip_prediction(type(trainer.lightning_module))
            return False
        return bool(stage) and stage not in self._checked and self.action != "off" and size > 1

    def _skip_prediction(self, kind: type[LightningModule]) -> None:
        """Note that prediction is not checked, and log it once if the module is a user's subclass of this package's."""
        if "predict" not in self._checked and not kind.__module__.startswith(_PACKAGE):
            rank_zero_info(
                f"split check of predict: not made, as {kind.__name__} has the predict step of this package, which may "
                f"continue texts by thousands of tokens"
            )
        self._checked.add("predict")

    def check(self, strategy: SplitSteps, module: LightningModule, batch: Any, sequence_dims: Any) -> None:
        """Compute the step of a loop's first batch on split sequences and on whole ones, and compare the results.

        If the results differ, `check_split` raises an error or warns, by `action`.  Otherwise the log says that they
        are equal, or why they were not compared.  `SplitSteps.batch_to_device` calls it on all ranks where `is_due`.

        Args:
            strategy, module: those of the run.
            batch: the whole batch, the same on all ranks that share sequences.
            sequence_dims: which dimensions of the batch's tensors are sequences, as the module declares them.
        """
        trainer = module.trainer
        stage, context = _stage(trainer), strategy.sequence_context
        self._checked.add(stage)
        # `check_split` copies the module itself, with what hooks changed since `begin`, where its parameters are whole
        if not gathers_parameters(strategy.sharding):
            self._replica = None

        def attach(copy: nn.Module, its_context: SequenceContext) -> None:
            """Attach the context of a run of the check to the module or its copy; `check_split` calls it."""
            attach_context(copy, its_context)
            strategy.sequence_context = its_context  # a step may read it, too

        try:
            with _trainer_restored(trainer):
                verdict = check_split(
                    module,
                    partial(_call_step, name=f"{stage}_step"),
                    batch,
                    context,
                    sequence_dims=sequence_dims,
                    action=self.action,
                    training=stage == "training",
                    predicts=stage == "predict",
                    replica=self._replica,
                    attach=attach,
                    inside=_engine_module(strategy, module, stage),
                )
        finally:
            strategy.sequence_context = context  # that of the run again
        if self._checked >= _FIT:
            self._replica = None  # the replica may hold tensors that are plain attributes
        if verdict.kind == "not checked":
            rank_zero_info(f"split check of {stage}: not made, as {verdict.message}")
        elif verdict.kind == "equal":
            rank_zero_info(f"split check of {stage}: {verdict.message}")


@contextmanager
def _trainer_restored(trainer: Trainer) -> Iterator[None]:
    """Restore the attributes of a Trainer after the block; inside it nothing is logged, saved or optimized.

    An optimizer that a step of the module calls itself raises `StopStep`, which ends the step for the check.
    """
    attributes = dict(trainer.__dict__)

    def end(optimizer: Optimizer, *_: Any) -> None:
        """End the step of the check; torch calls it before each step of any optimizer."""
        if optimizer in optimizers:
            raise StopStep

    optimizers = list(trainer.optimizers)
    handle = register_optimizer_step_pre_hook(end)
    trainer.loggers = [DummyLogger()]
    trainer.__dict__["save_checkpoint"] = _do_nothing
    try:
        yield
    finally:
        handle.remove()
        for name in trainer.__dict__.keys() - attributes.keys():
            del trainer.__dict__[name]
        trainer.__dict__.update(attributes)


def _do_nothing(*_: Any, **__: Any) -> None:
    """Do nothing: `_trainer_restored` puts it in place of `Trainer.save_checkpoint`."""


def _stage(trainer: Trainer) -> str:
    """Return the loop that runs now: "training", "validation", "test" or "predict"; "" if none does.

    The sanity check of a fit counts as validation.
    """
    if trainer.training:
        return "training"
    if trainer.testing:
        return "test"
    if trainer.predicting:
        return "predict"
    return "validation" if trainer.sanity_checking or trainer.validating else ""


def _is_own_predict_step(module: LightningModule) -> bool:
    """Return whether a module's predict step is one of this package, and not the user's own."""
    return str(type(module).predict_step.__module__).startswith(_PACKAGE)


def _engine_module(strategy: SplitSteps, module: LightningModule, stage: str) -> EngineModule:
    """Return the module of a run, as FSDP2 or DeepSpeed has sharded it, for `check_split`.

    The check runs the step in it if the module cannot be copied whole: the precision plugin and the sharding are then
    the same as in the run.

    Args:
        strategy, module: those of the run.
        stage: "training", "validation", "test" or "predict".
    """
    precision, name = strategy.precision_plugin, f"{stage}_step"

    def step(module: Any, batch: Any) -> Any:
        """Run the step as the strategy does, in the precision of the run and through the engine's forward."""
        function, model = getattr(module, name), strategy.model
        arguments = _arguments(module, function, precision.convert_input(batch))
        with precision.train_step_context() if stage == "training" else precision.val_step_context():
            if model is None or model is module:
                return function(*arguments)
            return strategy._forward_redirection(model, module, name, *arguments)

    half = str(precision.precision)
    dtypes = (torch.bfloat16,) if "bf16" in half else (torch.float16,) if "16" in half else ()
    is_fsdp = any(isinstance(each, FSDPModule) for each in module.modules())
    return EngineModule(module, step, dtypes, has_gradients=is_fsdp and module.automatic_optimization)


def _call_step(copy: Any, batch: Any, name: str) -> Any:
    """Call the step `name` of a copy of the module with a batch, as Lightning does, and return its result."""
    step = getattr(copy, name)
    return step(*_arguments(copy, step, batch))


def _arguments(copy: Any, step: Callable[..., Any], batch: Any) -> list[Any]:
    """Return the arguments with which Lightning would call a step of a module for the first batch.

    These are the batch, after the hook `on_after_batch_transfer`, and the indices 0 that the step declares.
    """
    hooks = copy.trainer._data_connector._datahook_selector.get_instance("on_after_batch_transfer")
    owner: Any = hooks if hooks is getattr(copy.trainer, "datamodule", None) else copy
    batch = owner.on_after_batch_transfer(batch, 0)
    arguments = [batch]
    if is_param_in_hook_signature(step, "batch_idx", min_args=2):
        arguments.append(0)
    if is_param_in_hook_signature(step, "dataloader_idx", min_args=3):  # of several loaders, this is the first
        arguments.append(0)
    return arguments
