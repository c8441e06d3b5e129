"""`RingSequenceParallelStrategy`: its options, and the choice of the subclass for a sharding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch  # noqa: TC002

from lightning_longnet.attention.parallel.schedule import Exchange  # noqa: TC001  the command line reads annotations
from lightning_longnet.sequence.context import SequenceContext
from lightning_longnet.split_check.check import Action  # noqa: TC001
from lightning_longnet.strategies.changes import ChangeWatch
from lightning_longnet.strategies.checks import Accumulate, check_background_saves, check_options, check_seconds
from lightning_longnet.strategies.engines import Sharding, checked_engine_options, strategy_class
from lightning_longnet.strategies.finite import LossWatch
from lightning_longnet.strategies.first_batch import FirstBatchCheck
from lightning_longnet.strategies.memory import MemoryAction, MemoryCheck
from lightning_longnet.strategies.phases import Progress
from lightning_longnet.strategies.placements import RunPlacement, StrategyPlacement, check_placement
from lightning_longnet.strategies.samplers import RepeatWarning
from lightning_longnet.strategies.split_steps import SplitSteps
from lightning_longnet.strategies.timeouts import Timeouts

if TYPE_CHECKING:
    from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
    from lightning.pytorch.accelerators import Accelerator
    from lightning.pytorch.plugins import Precision
    from lightning.pytorch.strategies import ParallelStrategy


class _ClassBySharding:
    """A base class whose `__new__` makes an instance of the subclass for the argument `sharding`.

    A `__new__` of the strategy itself would hide the arguments of `__init__` from the command line, which reads
    signatures.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Return an instance of the subclass for `sharding`, or of `cls` itself if that is such a subclass."""
        if cls is RingSequenceParallelStrategy:
            cls = strategy_class(kwargs.get("sharding", args[1] if len(args) > 1 else "fsdp2"))
        return super().__new__(cls)


class RingSequenceParallelStrategy(_ClassBySharding, SplitSteps):
    """Trains with sequences split over ranks; attention over whole sequences is exact, with any engine.

    The instance is of the engine's class, a subclass of this one and of Lightning's strategy for the engine.

    Args:
        sequence_parallel_size: how many ranks share a sequence (elsewhere called context parallelism); all of them by
            default.  The others form `ranks / sequence_parallel_size` groups that work on different batches.
        sharding: the engine.  "fsdp2" shards parameters over all ranks, "hsdp" over those that share a sequence, "ddp"
            not at all; "fsdp2_offload" and "deepspeed_stage_3_offload" keep them in the host's memory.
        exchange: how keys reach the queries of other ranks: "auto", "gather", "ring", "swap" or "local".  It is
            the default of layers without an `exchange` of their own.
        placement: "contiguous"; "zigzag", which balances dense causal attention; or "auto", which chooses one of them
            by the layers of the model and the length of sequences, and logs it with the reason; see `choose_placement`.
        accumulate: how accumulated micro-batches are weighted: "batches" gives them equal weights, as Lightning does;
            "tokens" weights them by their tokens, so that the gradient is that of one large batch.
        timeout: seconds after which a rank that waits for another one raises an error: outside of steps, in the first
            step, and in the step after a validation or a save.
        engine: further keyword arguments of the Lightning strategy that `sharding` selects.
        preemption: adds the callback `Preemption` when fitting, unless the Trainer has one: SIGTERM to any rank then
            saves one checkpoint of all ranks and ends the run.  False leaves signals to Lightning.
        split_check: what happens if the module computes something else on parts of sequences than on whole ones, which
            is checked on the first batch of training, of validation, of testing, and of prediction by a `predict_step`
            of the user's: "error" ends the run, "warn" only warns, and "off" skips the check; see `check_split`.
        background_saves: a save in training returns when the checkpoint is copied to the memory of the host.  A thread
            writes it, and the checkpoint gets its name when the disk holds it.  An error of writing ends the run at the
            next step, and fitting ends when all is written.
        memory_check: compares, at the first batch, the memory that `longnet plan` predicts for a LongNet (of other
            models the parameters, gradients and optimizer states alone) with the memory of each rank: "error" ends a
            run that cannot fit, and warns if less is free than planned; "warn" warns in both cases, and "off" skips the
            comparison.
        step_timeout: seconds after which a rank that waits for another one raises an error in all other steps of
            training; at most `timeout`.
        accelerator: as for any strategy, like all that follow; the Trainer sets them.
        parallel_devices: the devices of this node.
        cluster_environment: the plugin that knows the number of each rank.
        checkpoint_io: the plugin that writes files.
        precision_plugin: the plugin of the precision.
        process_group_backend: "gloo" on CPUs and "nccl" on GPUs by default.
    """

    lightning_class: type[ParallelStrategy]  # Lightning's strategy for this sharding

    def __init__(
        self,
        sequence_parallel_size: int | None = None,
        sharding: Sharding = "fsdp2",
        exchange: Exchange = "auto",
        placement: StrategyPlacement = "auto",
        accumulate: Accumulate = "batches",
        timeout: float = 1800.0,
        engine: dict[str, Any] | None = None,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        *,
        preemption: bool = True,
        split_check: Action = "error",
        background_saves: bool = False,
        memory_check: MemoryAction = "error",
        step_timeout: float = 300.0,
    ) -> None:
        check_options(accumulate, timeout, preemption, split_check)
        check_seconds("step_timeout", step_timeout)
        check_background_saves(background_saves, checkpoint_io)
        check_placement(placement)
        SequenceContext(exchange=exchange)  # raises an error where it is wrong
        self.sharding, self.accumulate, self.timeout = sharding, accumulate, float(timeout)
        self.preemption, self.background_saves = preemption, background_saves
        self.progress, self.timeouts = Progress(), Timeouts(float(step_timeout))
        self._sequence_parallel_size = sequence_parallel_size
        self._placement = RunPlacement() if placement == "auto" else placement
        self._exchange = exchange
        self.sequence_context = SequenceContext()
        self._first_batches = FirstBatchCheck(split_check)
        self._memory, self._losses = MemoryCheck(memory_check), LossWatch()
        self._repeats, self._changes = RepeatWarning(), ChangeWatch()
        self._init_lightning_strategy(checked_engine_options(self.lightning_class, engine or {}), process_group_backend)
        self._accelerator, self.parallel_devices = accelerator, parallel_devices
        self.cluster_environment, self._checkpoint_io = cluster_environment, checkpoint_io
        self.precision_plugin = precision_plugin

    def _init_lightning_strategy(self, engine: dict[str, Any], process_group_backend: str | None) -> None:
        """Call `__init__` of `lightning_class`; each subclass does it with the options that its sharding needs.

        `RingSequenceParallelStrategy.__init__` calls it, before it sets the attributes that the Trainer may give.

        Args:
            engine: a copy of the argument `engine` of the strategy, with names that were checked.
            process_group_backend: the argument of the strategy.
        """
        raise NotImplementedError
