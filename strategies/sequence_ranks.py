"""The part of the strategy that starts and connects the ranks, and makes the context when they are connected."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import _distributed_is_initialized, _sync_ddp_if_available
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from lightning_longnet.sequence.context import SequenceContext
from lightning_longnet.sequence.mesh import checked_sequence_size, sequence_mesh
from lightning_longnet.strategies.checks import check_processes
from lightning_longnet.strategies.engines import gathers_parameters
from lightning_longnet.strategies.exits import await_gloo_at_exit, print_stacks_at_crash
from lightning_longnet.strategies.launcher import WatchedLauncher, watch_parent
from lightning_longnet.strategies.loaders import LoaderWatch
from lightning_longnet.strategies.placements import RunPlacement
from lightning_longnet.strategies.seeds import dropout_seed

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh

    from lightning_longnet.attention.parallel.placement import Kind
    from lightning_longnet.attention.parallel.schedule import Exchange
    from lightning_longnet.attention.parallel.shard import SequenceShard
    from lightning_longnet.strategies.phases import Progress
    from lightning_longnet.strategies.timeouts import Timeouts


class SequenceRanks(ParallelStrategy):
    """A strategy whose ranks form groups that share sequences; the context is made when they are connected.

    Its collectives span all ranks of the run, as those of Lightning's strategies do.
    """

    sharding: str
    timeout: float
    sequence_context: SequenceContext
    progress: Progress
    timeouts: Timeouts
    _sequence_parallel_size: int | None
    _placement: Kind | RunPlacement
    _exchange: Exchange
    _loaders: LoaderWatch | None = None  # made when the ranks are connected

    def _ranks(self) -> int:
        """Return the number of ranks of the run; it is known before any is started.  `NamedFailures` asks, too."""
        nodes: int = self.num_nodes  # type: ignore[attr-defined]  # the subclasses have it
        return nodes * len(self.parallel_devices or ())

    def _configure_launcher(self) -> None:
        """Check the number of ranks, and choose the launcher that starts them and watches over them.

        Lightning calls it when a Trainer is made: the number of ranks is known then, and no process is started yet.
        """
        checked_sequence_size(self._ranks(), self._sequence_parallel_size)
        check_processes(self.parallel_devices or ())
        super()._configure_launcher()
        watch_parent()
        if type(self._launcher) is _SubprocessScriptLauncher:
            stock = self._launcher
            self._launcher = WatchedLauncher(stock.cluster_environment, stock.num_processes, stock.num_nodes)
        self.progress.connect(self.global_rank, self._ranks())

    @property
    def root_device(self) -> torch.device:
        """The device of this rank, to which Lightning moves models and batches; checks and callbacks ask, too."""
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    def _make_context(self) -> None:
        """Make the context and the `LoaderWatch` when the ranks are connected, once for all runs of a Trainer.

        The subclasses for DDP, FSDP2 and DeepSpeed call it at the end of `setup_environment`, on all ranks together,
        through `SplitSteps._make_context`.
        """
        if isinstance(self._placement, RunPlacement):
            self._placement.begin(self.lightning_module)
        if self.sequence_context.mesh is not None:
            return
        if dist.is_initialized():
            await_gloo_at_exit()
            print_stacks_at_crash()
        mesh = sequence_mesh(self._sequence_parallel_size, self.root_device.type, self.timeout)
        self.sequence_context = SequenceContext(
            mesh, placement=self._placement, exchange=self._exchange, seed=self.broadcast(dropout_seed())
        )
        gathers = gathers_parameters(self.sharding)
        self._loaders = LoaderWatch(self.sequence_context, self.timeout, gathers=gathers)
        self.timeouts.kept = self._loaders.groups

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """The arguments of the distributed sampler that Lightning inserts: ranks that share sequences get the same."""
        context = self.sequence_context
        return {"num_replicas": context.data_parallel_size, "rank": context.data_parallel_rank}

    def model_to_device(self) -> None:
        """Move the model to the device of this rank; Lightning's `setup` calls it."""
        assert self.model is not None
        self.model.to(self.root_device)

    def barrier(self, name: str | None = None) -> None:
        """Wait until all ranks of the run, not only those that share a sequence, have called it.

        Lightning calls it, the atomic saves of `Preemption`, and `CausalLMModule.save_pretrained`.
        """
        if not _distributed_is_initialized():
            return
        is_nccl = dist.get_backend() == "nccl"
        dist.barrier(device_ids=[self.root_device.index] if is_nccl else None)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return on all ranks of the run, which call it together, the object that rank `src` has.

        Lightning calls it, and for paths, seeds and errors `CheckpointSaves`, `_make_context`, `Preemption` and
        `fault_of_rank_zero`.
        """
        # the backend "fake" would hang, or return None
        if not _distributed_is_initialized() or dist.get_backend() == "fake":
            return obj
        values = [obj]
        dist.broadcast_object_list(values, src, group=dist.group.WORLD)
        return values[0]

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Return the mean or sum of a tensor over all ranks, which call it together; another object as it is.

        Lightning calls it for `self.log(..., sync_dist=True)`.
        """
        return _sync_ddp_if_available(tensor, group, reduce_op=reduce_op) if torch.is_tensor(tensor) else tensor

    # Attributes and methods of `sequence_context`, for modules that read `self.trainer.strategy`

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
