"""The checks of a run: wrong options and batches become errors before they become wrong numbers or a hang."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from lightning_longnet.sequence.agreement import all_gather
from lightning_longnet.split_check.check import check_action

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import LightningModule

    from lightning_longnet.sequence.context import SequenceContext

Accumulate = Literal["batches", "tokens"]

_PROCESSES_PER_CORE = 16  # on a CPU they are of use for tests alone


def check_options(accumulate: Any, timeout: Any, preemption: Any, split_check: Any) -> None:
    """Raise a ValueError if one of these arguments of the strategy's `__init__`, which calls it, has a wrong value."""
    if accumulate not in get_args(Accumulate):
        allowed = ", ".join(map(repr, get_args(Accumulate)))
        raise ValueError(f"accumulate must be one of {allowed}, got {accumulate!r}")
    check_seconds("timeout", timeout)
    if not isinstance(preemption, bool):
        raise ValueError(f"preemption must be True or False, got {preemption!r}")
    check_action(split_check)


def check_background_saves(background_saves: Any, checkpoint_io: Any) -> None:
    """Raise a ValueError if `background_saves` is no boolean, or True together with a `checkpoint_io` of the user.

    `RingSequenceParallelStrategy.__init__` calls it, and the setter of `checkpoint_io`, for a plugin that a Trainer
    sets later.
    """
    if not isinstance(background_saves, bool):
        raise ValueError(f"background_saves must be True or False, got {background_saves!r}")
    if background_saves and checkpoint_io is not None:
        raise ValueError(f"background_saves must be False with a checkpoint_io, got {type(checkpoint_io).__name__}")


def check_seconds(name: str, seconds: Any) -> None:
    """Raise a ValueError unless an argument of the strategy, `name`, is a positive number of seconds.

    `check_options` calls it for the argument `timeout`, and `RingSequenceParallelStrategy.__init__` for `step_timeout`.
    """
    if not isinstance(seconds, (int, float)) or seconds <= 0:
        raise ValueError(f"{name} must be a number of seconds, more than 0, got {seconds!r}")


def check_processes(devices: Sequence[torch.device]) -> None:
    """Raise a ValueError if a node is to run far more CPU processes than it has cores, before any is started.

    A thousand of them, by a slip in the number of devices, would take minutes to start and all of the memory.
    `SequenceRanks._configure_launcher` calls it when a Trainer is made.

    Args:
        devices: the devices of this node, one for each process.
    """
    most = _PROCESSES_PER_CORE * (os.cpu_count() or 1)
    if len(devices) > most and all(device.type == "cpu" for device in devices):
        raise ValueError(
            f"devices must be at most {most} on the CPU of this node, {_PROCESSES_PER_CORE} processes for each of its "
            f"{os.cpu_count()} cores, got {len(devices)}"
        )


def check_accumulation(accumulate: str, module: LightningModule) -> None:
    """Raise a ValueError for `accumulate="tokens"` with manual optimisation; `SplitSteps.setup` calls it."""
    if accumulate == "tokens" and not module.automatic_optimization:
        raise ValueError("accumulate must be 'batches' with manual optimisation, which weights its losses itself")


def check_is_split(context: SequenceContext) -> None:
    """Raise a ValueError if a step ran on a batch without sequences, so that ranks repeated each other's work.

    `SplitSteps.training_step` calls it after the step.  A batch may stay whole if the model makes the sequences itself,
    and calls `SequenceContext.begin_sequences` in the step.
    """
    size = context.sequence_parallel_size
    if size > 1 and context.length is None:
        raise ValueError(
            f"sequence_parallel_size must be 1 where no tensor of a batch is a sequence and the model begins none "
            f"(see SequenceContext.begin_sequences), got {size}"
        )


def check_one_token_mean(means: int) -> None:
    """Raise a ValueError unless a training step called `token_mean` with a gradient exactly once.

    `accumulate="tokens"` needs that, as the gradient of one loss is scaled.  `SplitSteps.training_step` calls it after
    the module's step.

    Args:
        means: the number of these calls.
    """
    if means != 1:
        raise ValueError(
            f"accumulate='tokens' needs one token_mean with a gradient in each training_step, got {means}: detach "
            f"what is only logged"
        )


def check_predicted_batches(context: SequenceContext, sharding: str, batches: Sequence[int | float]) -> None:
    """Raise a ValueError on all ranks if data-parallel groups are to predict unequal numbers of batches.

    `SplitSteps.on_predict_start` calls it on all ranks together, with a sharding whose ranks gather parameters in each
    forward: a group with more batches would wait for the others.  The numbers can differ, as Lightning repeats no
    samples in prediction.

    Args:
        context: the context of the strategy.
        sharding: the argument of the strategy, for the message.
        batches: the number of batches of each loader; infinity if it is not known.
    """
    if context.data_parallel_group is None:
        return
    own = torch.tensor(int(min(sum(batches), 2**62)))
    counts = all_gather(own, context.data_parallel_group).tolist()
    if len(set(counts)) > 1:
        raise ValueError(
            f"with {sharding!r} all data-parallel groups must predict as many batches, as their ranks "
            f"gather parameters together, got {', '.join(map(str, counts))}: make the number of samples a "
            f"multiple of {len(counts)} times the batch size, or take 'ddp'"
        )
