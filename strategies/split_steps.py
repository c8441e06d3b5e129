"""The steps of a run on sequences that are split over ranks, with the checks and the split of the batch before each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from lightning.pytorch.trainer.states import TrainerFn

from lightning_longnet.callbacks import Preemption
from lightning_longnet.sequence.attach import attach_context
from lightning_longnet.sequence.batches import checked_dims
from lightning_longnet.split_check.replica import whole_tensor
from lightning_longnet.strategies.checks import (
    check_accumulation,
    check_is_split,
    check_one_token_mean,
    check_predicted_batches,
)
from lightning_longnet.strategies.engines import gathers_parameters
from lightning_longnet.strategies.failures import NamedFailures
from lightning_longnet.strategies.finite import check_anomaly
from lightning_longnet.strategies.launcher import WatchedLauncher
from lightning_longnet.strategies.loops import WatchedLoops
from lightning_longnet.strategies.placements import RunPlacement
from lightning_longnet.strategies.restart import keep_folders
from lightning_longnet.strategies.resume import skip_finished_batches
from lightning_longnet.strategies.samplers import keep_order, restore_order
from lightning_longnet.strategies.saves import CheckpointSaves
from lightning_longnet.strategies.sequence_ranks import SequenceRanks

if TYPE_CHECKING:
    import torch
    from lightning.pytorch import Trainer
    from torch import Tensor

    from lightning_longnet.strategies.changes import ChangeWatch
    from lightning_longnet.strategies.checks import Accumulate
    from lightning_longnet.strategies.finite import LossWatch
    from lightning_longnet.strategies.first_batch import FirstBatchCheck
    from lightning_longnet.strategies.memory import MemoryCheck


class SplitSteps(SequenceRanks, NamedFailures, WatchedLoops, CheckpointSaves):
    """A strategy that checks the first batch, splits each batch, and begins and weights the steps of training.

    It attaches the context to the module when a run is set up, and removes it at the end.  Lightning calls the public
    methods on all ranks, through those of the same names of the class for a sharding.  Inside of them run those of the
    base classes in their order, and then those of Lightning's strategy.
    """

    accumulate: Accumulate
    preemption: bool
    _first_batches: FirstBatchCheck
    _memory: MemoryCheck
    _losses: LossWatch
    _changes: ChangeWatch

    def _make_context(self) -> None:
        """Begin to read what other ranks report, and make the context.

        `setup_environment` of each subclass calls it when the ranks are connected.
        """
        self._begin_reports()
        super()._make_context()

    def setup(self, trainer: Trainer) -> None:
        """Attach the context to the module, and have Lightning's strategy set the module up.

        The Trainer calls it once in a run, after `configure_model` and before the first loop.
        """
        assert self.lightning_module is not None
        check_accumulation(self.accumulate, self.lightning_module)
        if self.preemption and trainer.state.fn == TrainerFn.FITTING:
            _add_preemption(trainer)
        self.sequence_context.token_window.close(1)  # an interrupted run may have left it open
        attach_context(self.lightning_module, self.sequence_context)
        if isinstance(self._placement, RunPlacement):
            self._placement.begin(self.lightning_module)  # `configure_model` may have made its layers
        keep_order(trainer)
        self._begin_split_check()
        super().setup(trainer)

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Split a batch over the ranks, and return the part of this rank on its device.

        Lightning calls it for each batch of a loop, after `on_before_batch_transfer`.  `_loaders.send` starts the
        comparison of the batch with those of other ranks.  The step waits for the result; a check that is due for the
        first batch of a loop waits for it here.
        """
        module = self.lightning_module
        if module is not None:
            repeated = 0 if self._loaders is None else self._loaders.send(module, batch, dataloader_idx)
            dims = checked_dims(getattr(module, "sequence_dims", {}))
            if self._memory.is_due(module.trainer):
                if self._loaders is not None:
                    self._loaders.receive()  # all ranks compare together
                self._memory.check(self, module, batch)
            if self._first_batches.is_due(self, module.trainer):
                if self._loaders is not None:
                    self._loaders.receive()  # the check needs the same batch on all ranks
                self._first_batches.check(self, module, batch, dims)
            batch = self.sequence_context.split(batch, dims)
            self.sequence_context.repeated_samples = repeated
        batch = super().batch_to_device(batch, device, dataloader_idx)
        if module is not None and module.trainer.training:
            self._changes.record(batch)  # `training_step` compares its batch with this one
        return batch

    def _begin_split_check(self) -> None:
        """Have the split check copy the structure of the module, at the first call of a run.

        `setup` calls it before Lightning's strategy sets the module up, and FSDP2's `setup` before it shards the
        module.
        """
        assert self.lightning_module is not None
        self._first_batches.begin(self.lightning_module, self._whole_parameter)

    @staticmethod
    def _whole_parameter(parameter: Tensor) -> Tensor:
        """Return the full tensor of a parameter that may be sharded; all ranks call it together.

        The split check and `CausalLMModule.save_pretrained` use it.
        """
        return whole_tensor(parameter)

    def on_train_start(self) -> None:
        """Skip the batches that a resumed epoch has had; Lightning calls it on all ranks before the first step."""
        assert self.lightning_module is not None
        skip_finished_batches(self.lightning_module.trainer)
        self._losses.begin(self.lightning_module.trainer)
        keep_folders(self.lightning_module.trainer)
        super().on_train_start()

    def on_train_end(self) -> None:
        """Warn if the last loss is not finite; Lightning calls it on all ranks at the end of `fit`."""
        self._losses.check(is_last=True)
        super().on_train_end()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's step on this rank's part of the batch, with checks of what users get wrong before and after.

        Lightning calls it with the batch of `batch_to_device`.
        """
        assert self.lightning_module is not None
        self.settle_saves(is_awaited=False)  # before the limits of a step hold
        context, loop = self.sequence_context, self.lightning_module.trainer.fit_loop.epoch_loop
        context.begin_step(loop.total_batch_idx)  # gives attention dropout its seed
        self._changes.compare(args[0] if args else None)  # what a hook changed since the batch was split
        self._losses.check()  # at the loss of the step before, which the Trainer has read by now where it logs it
        if self.accumulate == "tokens":
            context.token_window.open()
        means = context.token_window.means
        output = super().training_step(*args, **kwargs)
        check_is_split(context)
        self._losses.record(self.lightning_module.trainer, output)
        if self.accumulate == "tokens":
            check_one_token_mean(context.token_window.means - means)
        return output

    def pre_backward(self, closure_loss: Tensor) -> None:
        """Raise an error on all ranks if one has a loss that is not finite and anomalies are detected.

        Lightning calls it on all ranks before each backward.
        """
        check_anomaly(closure_loss)
        super().pre_backward(closure_loss)

    def post_backward(self, closure_loss: Tensor) -> None:
        """Scale the gradients after the last micro-batch of a step, so that micro-batches count by their tokens.

        Lightning calls it after each backward.  Only `accumulate="tokens"` needs it.
        """
        super().post_backward(closure_loss)
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        if self.accumulate == "tokens" and not trainer.fit_loop._should_accumulate():
            factor = self.sequence_context.token_window.close(trainer.accumulate_grad_batches)
            for parameter in self.lightning_module.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)

    def on_predict_start(self) -> None:
        """Check that all groups predict equally many batches, if each forward gathers parameters from all ranks.

        Lightning calls it on all ranks before the first batch of `predict`.
        """
        super().on_predict_start()
        assert self.lightning_module is not None
        if gathers_parameters(self.sharding):
            batches = self.lightning_module.trainer.predict_loop.max_batches
            check_predicted_batches(self.sequence_context, self.sharding, batches)

    def teardown(self) -> None:
        """Detach the context, and end the run; the Trainer calls it at the end of a run, also after an error.

        After an error or Ctrl-C it also ends the ranks that this process has started.
        """
        self._end_batches()
        if self.lightning_module is not None:
            attach_context(self.lightning_module, None)
            if getattr(self.lightning_module, "_trainer", None) is not None:
                restore_order(self.lightning_module.trainer)
        self._first_batches.end()
        super().teardown()
        if not self._is_interrupted():
            self._leave_run()
        elif isinstance(self._launcher, WatchedLauncher):
            self._launcher.end_children()

    def _is_interrupted(self) -> bool:
        """Return whether an error or Ctrl-C ended the run."""
        trainer = getattr(self.lightning_module, "_trainer", None)
        return trainer is not None and bool(trainer.interrupted)


def _add_preemption(trainer: Trainer) -> None:
    """Add the callback `Preemption` to a Trainer that has none, and log it; `SplitSteps.setup` calls it for `fit`."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(callback, Preemption) for callback in callbacks):
        return
    callbacks.append(Preemption())
    rank_zero_info(
        "RingSequenceParallelStrategy: added the callback Preemption, which saves a checkpoint at SIGTERM; "
        "preemption=False leaves it out"
    )
