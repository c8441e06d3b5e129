"""The split check of a run: the first training batch and the first validation batch are proven on parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lightning_longnet.sequence.attach import hand_down
from lightning_longnet.split_check import check_split
from lightning_longnet.split_check.replica import Replica
from lightning_longnet.strategies.engines import gathers_parameters

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor, nn

    from lightning_longnet.sequence.context import SequenceContext
    from lightning_longnet.split_check.check import Action
    from lightning_longnet.strategies.base import RingSequenceParallelStrategy


class FirstBatchCheck:
    """Checks the first batches of a run, each on all ranks together.

    Args:
        action: what happens where parts differ from whole sequences; see `check_split`.
    """

    def __init__(self, action: Action) -> None:
        self.action = action
        self._replica: Replica | None = None
        self._fault = ""
        self._checked: set[str] = set()

    def begin(self, module: LightningModule, whole: Callable[[Tensor], Tensor]) -> None:
        """Take the structure of a module before the engine shards it; once in a run.

        Args:
            module: the module.
            whole: returns the whole of a parameter that the engine shards after that.
        """
        if self._replica is not None or self._fault or self.action == "off":
            return
        try:
            self._replica = Replica(module, whole)
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:  # what copies of attributes raise
            self._fault = f"the module cannot be copied: {error}"

    def end(self) -> None:
        """Forget the module."""
        self._replica, self._fault = None, ""
        self._checked.clear()

    def is_due(self, strategy: RingSequenceParallelStrategy, trainer: Trainer) -> bool:
        """Whether the batch that a loop was given is the first of training or of validation."""
        stage, size = _stage(trainer), strategy.sequence_context.sequence_parallel_size
        return bool(stage) and stage not in self._checked and self.action != "off" and size > 1

    def check(self, strategy: RingSequenceParallelStrategy, module: LightningModule, batch: Any, dims: Any) -> None:
        """Check a first batch, which `is_due`."""
        trainer = module.trainer
        stage, context = _stage(trainer), strategy.sequence_context
        self._checked.add(stage)
        replica = self._replica
        if not gathers_parameters(strategy.sharding):  # hooks of the run may have changed the module since
            replica = None
        elif self._fault:
            rank_zero_info(f"split check of {stage}: not made, as {self._fault}")
            return

        def attach(copy: nn.Module, its_context: SequenceContext) -> None:
            hand_down(copy, its_context)
            strategy.sequence_context = its_context  # which a step may ask, too

        loggers, trainer.loggers = trainer.loggers, [DummyLogger()]
        try:
            verdict = check_split(
                module,
                _training_step if stage == "training" else _validation_step,
                batch,
                context,
                sequence_dims=dims,
                action=self.action,
                training=stage == "training",
                replica=replica,
                attach=attach,
            )
        finally:
            strategy.sequence_context, trainer.loggers = context, loggers
        if verdict.kind == "not checked":
            rank_zero_info(f"split check of {stage}: not made, as {verdict.message}")
        elif verdict.kind == "equal":
            rank_zero_info(f"split check of {stage}: {verdict.message}")


def _stage(trainer: Trainer) -> str:
    if trainer.training:
        return "training"
    return "validation" if trainer.sanity_checking or trainer.validating else ""


def _training_step(copy: Any, batch: Any) -> Any:
    return _called(copy, copy.training_step, batch)


def _validation_step(copy: Any, batch: Any) -> Any:
    return _called(copy, copy.validation_step, batch)


def _called(copy: Any, step: Callable[..., Any], batch: Any) -> Any:
    """Return the result of a step of a module, called as Lightning calls it."""
    hooks = copy.trainer._data_connector._datahook_selector.get_instance("on_after_batch_transfer")
    owner: Any = hooks if hooks is getattr(copy.trainer, "datamodule", None) else copy
    batch = owner.on_after_batch_transfer(batch, 0)
    arguments = [batch]
    if is_param_in_hook_signature(step, "batch_idx", min_args=2):
        arguments.append(0)
    return step(*arguments)
