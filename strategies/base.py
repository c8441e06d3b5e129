"""`RingSequenceParallelStrategy`: what sequence parallelism adds to any engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import _distributed_is_initialized, _sync_ddp_if_available
from lightning.fabric.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.trainer.states import TrainerFn

from lightning_longnet.attention.parallel.placement import Kind  # noqa: TC001  the command line evaluates annotations
from lightning_longnet.attention.parallel.schedule import Exchange  # noqa: TC001
from lightning_longnet.callbacks import Preemption
from lightning_longnet.sequence.attach import attach_context
from lightning_longnet.sequence.batches import checked_dims
from lightning_longnet.sequence.context import SequenceContext
from lightning_longnet.sequence.mesh import check_sizes, sequence_mesh
from lightning_longnet.split_check.check import Action  # noqa: TC001
from lightning_longnet.split_check.replica import whole_tensor
from lightning_longnet.strategies.checks import (
    Accumulate,
    check_accumulation,
    check_background_saves,
    check_is_split,
    check_means,
    check_options,
    check_predicted_batches,
    check_processes,
    check_seconds,
)
from lightning_longnet.strategies.engines import Sharding, checked_engine_options, gathers_parameters, strategy_class
from lightning_longnet.strategies.exits import await_gloo_at_exit
from lightning_longnet.strategies.failures import NamedFailures
from lightning_longnet.strategies.finite import LossWatch, check_anomaly
from lightning_longnet.strategies.first_batch import FirstBatchCheck
from lightning_longnet.strategies.launcher import WatchedLauncher, watch_parent
from lightning_longnet.strategies.loaders import LoaderWatch
from lightning_longnet.strategies.loops import WatchedLoops
from lightning_longnet.strategies.memory import MemoryAction, MemoryCheck
from lightning_longnet.strategies.phases import Progress
from lightning_longnet.strategies.restart import keep_folders
from lightning_longnet.strategies.resume import skip_finished_batches
from lightning_longnet.strategies.samplers import RepeatWarning, keep_order, restore_order
from lightning_longnet.strategies.saves import CheckpointSaves
from lightning_longnet.strategies.seeds import dropout_seed
from lightning_longnet.strategies.timeouts import Timeouts

if TYPE_CHECKING:
    from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
    from lightning.pytorch import Trainer
    from lightning.pytorch.accelerators import Accelerator
    from lightning.pytorch.plugins import Precision
    from lightning.pytorch.strategies import ParallelStrategy
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh

    from lightning_longnet.attention.parallel.shard import SequenceShard


class _ClassBySharding:
    """A base class whose `__new__` makes an instance of the subclass for the sharding.

    A `__new__` of the strategy itself would hide the arguments of `__init__` from the command line, which reads
    signatures.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls is RingSequenceParallelStrategy:
            cls = strategy_class(kwargs.get("sharding", args[1] if len(args) > 1 else "fsdp2"))
        return super().__new__(cls)


class RingSequenceParallelStrategy(_ClassBySharding, NamedFailures, WatchedLoops, CheckpointSaves):
    """Trains with sequences split over ranks; attention over whole sequences is exact, with any engine.

    The instance is of the engine's class, a subclass of this one and of Lightning's strategy for the engine.

    Args:
        sequence_parallel_size: how many ranks share a sequence (elsewhere called context parallelism); all of them by
            default.  The others form `ranks / sequence_parallel_size` groups that work on different batches.
        sharding: the engine.  "fsdp2" shards parameters over all ranks, "hsdp" over those that share a sequence, "ddp"
            not at all; "fsdp2_offload" and "deepspeed_stage_3_offload" keep them in the host's memory.
        exchange: how keys reach the queries of other ranks: "auto", "gather", "ring", "swap" or "local".  A layer's own
            wins.
        placement: "contiguous", or "zigzag", which balances dense causal attention.
        accumulate: "batches": micro-batches that are accumulated count alike, as Lightning has it; "tokens": they count
            by their tokens, so that the gradient is that of one large batch.
        timeout: seconds after which a rank that waits for another gives up: outside of steps, in the first step, and in
            the one after a validation or a save.
        engine: further options of Lightning's strategy for the engine.
        preemption: adds the callback `Preemption` when fitting, unless the Trainer has one: SIGTERM to any rank then
            saves one checkpoint of all ranks and ends the run.  False leaves signals to Lightning.
        split_check: what happens where the module computes something else on parts of sequences than on whole ones,
            which is tried on the first training batch and the first validation batch: "error" ends the run, "warn"
            goes on, "off" does not try; see `check_split`.
        background_saves: a save in training returns when its content is copied to the memory of the host, and a thread
            writes it; the pointer moves when the disk holds it.  An error of writing ends the run at the next step, and
            fitting ends when all is written.  Not with deepspeed.
        memory_check: compares the memory that `longnet plan` predicts with what each rank has, at the first batch:
            "error" ends a run that cannot fit, and warns where less is free than planned; "warn" warns of both, "off"
            compares nothing.
        step_timeout: as `timeout`, inside of the other steps of training; where `timeout` is less, this is what counts.
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
        placement: Kind = "contiguous",
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
        check_background_saves(background_saves, sharding, checkpoint_io)
        SequenceContext(placement=placement, exchange=exchange)  # raises an error where they are wrong
        self.sharding, self.accumulate, self.timeout = sharding, accumulate, float(timeout)
        self.preemption, self.background_saves = preemption, background_saves
        self.progress, self.timeouts = Progress(), Timeouts(float(step_timeout))
        self._sequence_parallel_size = sequence_parallel_size
        self._placement, self._exchange = placement, exchange
        self.sequence_context = SequenceContext()
        self._first_batches = FirstBatchCheck(split_check)
        self._memory, self._losses = MemoryCheck(memory_check), LossWatch()
        self._repeats = RepeatWarning()
        self._init_lightning_strategy(checked_engine_options(self.lightning_class, engine or {}), process_group_backend)
        self._accelerator, self.parallel_devices = accelerator, parallel_devices
        self.cluster_environment, self._checkpoint_io = cluster_environment, checkpoint_io
        self.precision_plugin = precision_plugin

    def _init_lightning_strategy(self, engine: dict[str, Any], process_group_backend: str | None) -> None:
        """Call the initialiser of `lightning_class` with its options, the argument `engine`."""
        raise NotImplementedError

    # Ranks and groups

    def _ranks(self) -> int:
        """Return the number of ranks, before any is started."""
        nodes: int = self.num_nodes  # type: ignore[attr-defined]  # which the engines have
        return nodes * len(self.parallel_devices or ())

    def _configure_launcher(self) -> None:
        # here the number of ranks is known for the first time, before processes are started and data is read
        check_sizes(self._ranks(), self._sequence_parallel_size)
        check_processes(self.parallel_devices or ())
        super()._configure_launcher()
        watch_parent()
        if type(self._launcher) is _SubprocessScriptLauncher:
            stock = self._launcher
            self._launcher = WatchedLauncher(stock.cluster_environment, stock.num_processes, stock.num_nodes)
        self.progress.connect(self.global_rank, self._ranks())

    @property
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    def _make_context(self) -> None:
        """Make the context when the ranks are connected, once for all runs of a Trainer."""
        if self.sequence_context.mesh is not None:
            return
        if dist.is_initialized():
            await_gloo_at_exit()
        mesh = sequence_mesh(self._sequence_parallel_size, self.root_device.type, self.timeout)
        self.sequence_context = SequenceContext(
            mesh, placement=self._placement, exchange=self._exchange, seed=self.broadcast(dropout_seed())
        )
        gathers = gathers_parameters(self.sharding)
        self._loaders = LoaderWatch(self.sequence_context, self.timeout, gathers=gathers)
        self.timeouts.kept = self._loaders.groups

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        context = self.sequence_context
        return {"num_replicas": context.data_parallel_size, "rank": context.data_parallel_rank}

    def model_to_device(self) -> None:
        assert self.model is not None
        self.model.to(self.root_device)

    def barrier(self, name: str | None = None) -> None:
        if not _distributed_is_initialized():
            return
        is_nccl = dist.get_backend() == "nccl"
        dist.barrier(device_ids=[self.root_device.index] if is_nccl else None)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if not _distributed_is_initialized() or dist.get_backend() == "fake":  # which would hang, or return None
            return obj
        values = [obj]
        dist.broadcast_object_list(values, src, group=dist.group.WORLD)
        return values[0]

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        return _sync_ddp_if_available(tensor, group, reduce_op=reduce_op) if torch.is_tensor(tensor) else tensor

    # The same as of `sequence_context(module)`

    @property
    def mesh(self) -> DeviceMesh | None:
        return self.sequence_context.mesh

    @property
    def sequence_group(self) -> dist.ProcessGroup | None:
        return self.sequence_context.sequence_group

    @property
    def shard(self) -> SequenceShard | None:
        return self.sequence_context.shard

    @property
    def positions(self) -> Tensor | None:
        return self.sequence_context.positions

    def token_mean(self, loss_sum: Tensor, token_count: Tensor | float) -> Tensor:
        return self.sequence_context.token_mean(loss_sum, token_count)

    def gather_sequence(self, x: Tensor, dim: int = 1) -> Tensor:
        return self.sequence_context.gather_sequence(x, dim)

    # A run

    def setup(self, trainer: Trainer) -> None:
        assert self.lightning_module is not None
        check_accumulation(self.accumulate, self.lightning_module)
        if self.preemption and trainer.state.fn == TrainerFn.FITTING:
            _add_preemption(trainer)
        self.sequence_context.window.close(1)  # an interrupted run may have left it open
        attach_context(self.lightning_module, self.sequence_context)
        keep_order(trainer)
        self._begin_split_check()
        super().setup(trainer)

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
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
        return super().batch_to_device(batch, device, dataloader_idx)

    def _begin_split_check(self) -> None:
        """Let the split check take the structure of the module, while it is whole."""
        assert self.lightning_module is not None
        self._first_batches.begin(self.lightning_module, self._whole_parameter)

    @staticmethod
    def _whole_parameter(parameter: Tensor) -> Tensor:
        """Return the whole of a parameter that the engine has sharded; all ranks call this together."""
        return whole_tensor(parameter)

    def on_train_start(self) -> None:
        assert self.lightning_module is not None
        skip_finished_batches(self.lightning_module.trainer)
        self._losses.begin(self.lightning_module.trainer)
        keep_folders(self.lightning_module.trainer)
        super().on_train_start()

    def on_train_end(self) -> None:
        self._losses.look(is_last=True)
        super().on_train_end()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self.lightning_module is not None
        self.settle_saves(is_awaited=False)  # before the limits of a step hold
        context, loop = self.sequence_context, self.lightning_module.trainer.fit_loop.epoch_loop
        context.begin_step(loop.total_batch_idx)
        self._losses.look()
        if self.accumulate == "tokens":
            context.window.open()
        means = context.window.means
        output = super().training_step(*args, **kwargs)
        check_is_split(context)
        self._losses.take(self.lightning_module.trainer, output)
        if self.accumulate == "tokens":
            check_means(context.window.means - means)
        return output

    def pre_backward(self, closure_loss: Tensor) -> None:
        check_anomaly(closure_loss)
        super().pre_backward(closure_loss)

    def post_backward(self, closure_loss: Tensor) -> None:
        super().post_backward(closure_loss)
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        if self.accumulate == "tokens" and not trainer.fit_loop._should_accumulate():
            factor = self.sequence_context.window.close(trainer.accumulate_grad_batches)
            for parameter in self.lightning_module.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)

    def on_predict_start(self) -> None:
        super().on_predict_start()
        assert self.lightning_module is not None
        if gathers_parameters(self.sharding):
            batches = self.lightning_module.trainer.predict_loop.max_batches
            check_predicted_batches(self.sequence_context, self.sharding, batches)

    def teardown(self) -> None:
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
        trainer = getattr(self.lightning_module, "_trainer", None)
        return trainer is not None and bool(trainer.interrupted)


def _add_preemption(trainer: Trainer) -> None:
    """Add the callback `Preemption` to a Trainer that has none."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(callback, Preemption) for callback in callbacks):
        return
    callbacks.append(Preemption())
    rank_zero_info(
        "RingSequenceParallelStrategy: added the callback Preemption, which saves a checkpoint at SIGTERM; "
        "preemption=False leaves it out"
    )
