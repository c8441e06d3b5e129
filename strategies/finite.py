"""Losses that are not finite: a warning where nothing else says so, and an error where anomalies are detected."""

from __future__ import annotations

import warnings
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from lightning_longnet.callbacks import NonFiniteGuard
from lightning_longnet.callbacks.monitor import is_logging_step
from lightning_longnet.sequence.agreement import all_gather

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from torch import Tensor


class LossWatch:
    """Warns once on each rank if a training loss is NaN or infinite.

    Only losses of steps at which the Trainer logs, and of the last step, are read.  A loss is read when the next step
    begins: the Trainer has read what it logs by then, so that this waits for no device.  NaN on one rank reaches the
    parameters of all ranks, and so the losses of all in the following step.  With the callback `NonFiniteGuard`, which
    checks every step, this does nothing.
    """

    def __init__(self) -> None:
        self._loss: Tensor | None = None
        self._step, self._is_logged, self._is_over = 0, False, False

    def begin(self, trainer: Trainer) -> None:
        """Forget the losses of an earlier run; `SplitSteps.on_train_start` calls it."""
        self._loss, self._is_over = None, any(isinstance(each, NonFiniteGuard) for each in _callbacks(trainer))

    def record(self, trainer: Trainer, output: Any) -> None:
        """Keep the loss that a training step returned, alone or as "loss" of a dictionary, without reading its value.

        `SplitSteps.training_step` calls it after the step of the module.  A step that returns no loss is left out.
        """
        loss = output.get("loss") if isinstance(output, dict) else output
        if not self._is_over and isinstance(loss, torch.Tensor) and loss.numel() == 1:
            self._loss, self._step = loss.detach(), trainer.global_step + 1
            self._is_logged = is_logging_step(trainer)

    def check(self, *, is_last: bool = False) -> None:
        """Read the recorded loss, and warn if it is not finite; a loss of a step that is not logged is not read.

        `SplitSteps` calls it when the next step begins, and at the end of training, with `is_last`, which reads the
        loss in any case.
        """
        if self._loss is None or self._is_over or not (self._is_logged or is_last):
            return
        value, self._loss = float(self._loss), None
        if not isfinite(value):
            self._is_over = True
            rank = dist.get_rank() if dist.is_initialized() else 0
            warnings.warn(
                f"rank {rank}: the training loss of step {self._step} is {value}; where its gradient is, too, the step "
                f"makes the parameters of all ranks NaN: the callback NonFiniteGuard skips such steps and names their "
                f"batches, and detect_anomaly=True of the Trainer ends the run",
                RuntimeWarning,
                stacklevel=2,
            )


def check_anomaly(loss: Tensor) -> None:
    """Raise a FloatingPointError on all ranks if the loss of one is not finite, with `detect_anomaly=True` alone.

    `SplitSteps.pre_backward` calls it on all ranks before each backward.  With anomaly detection torch raises an error
    in the backward of the rank with the bad loss alone, and the others would wait for it.
    """
    if not torch.is_anomaly_enabled() or not dist.is_initialized():
        return
    world: Any = dist.group.WORLD
    bad = all_gather(torch.tensor(not bool(loss.detach().isfinite().all())), world)
    if ranks := bad.nonzero().flatten().tolist():
        raise FloatingPointError(f"the training loss is not finite on ranks {', '.join(map(str, ranks))}")


def _callbacks(trainer: Trainer) -> list[Any]:
    """Return the callbacks of a Trainer, whose attribute has no type."""
    attached: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return attached
