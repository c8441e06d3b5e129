"""FSDP2: parameters, gradients and optimizer states sharded over all ranks, or over those that share a sequence."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from lightning_longnet.sequence.buckets import in_buckets
from lightning_longnet.strategies.averages import averages, check_averages, has_averages, sharded_state, whole_state
from lightning_longnet.strategies.base import RingSequenceParallelStrategy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning.pytorch import Trainer
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh

    from lightning_longnet.checkpointing.background import MemoryFile
    from lightning_longnet.checkpointing.manifest import FileSum

_ENTRY_METHODS = ("training_step", "validation_step", "test_step", "predict_step", "generate")


class FSDP2SequenceParallelStrategy(RingSequenceParallelStrategy, ModelParallelStrategy):
    """The strategy of the shardings "fsdp2", "fsdp2_offload" and "hsdp".

    A module whose `configure_model` applies `fully_shard` stays as it is.  Of others each block, an entry of an
    `nn.ModuleList` or `nn.Sequential`, is sharded as a unit, and then the whole module with all that is left.  An entry
    without a `forward`, as an `nn.ModuleDict`, is no block: its own entries are.

    Lightning calls the public methods on all ranks: `setup_environment` and `setup` once in a run, `*_step` for each
    batch, `pre_backward` and `post_backward` around each backward, and `optimizer_step` for each step of an optimizer.
    """

    lightning_class = ModelParallelStrategy
    forms = ("file", "fsdp2")
    _is_freed = False  # whether a backward that a step called itself has freed parameters that it may need again
    shards_before_loading = True  # calls `_load_sharded_weights` of the module, where it has one, after sharding it

    def _init_lightning_strategy(self, engine: dict[str, Any], process_group_backend: str | None) -> None:
        """Call `__init__` of `ModelParallelStrategy`, whose own mesh is not used.

        `RingSequenceParallelStrategy.__init__` calls it.
        """
        options: dict[str, Any] = {
            "process_group_backend": process_group_backend,
            "timeout": timedelta(seconds=self.timeout),
        }
        ModelParallelStrategy.__init__(self, data_parallel_size=1, tensor_parallel_size=1, **options, **engine)

    def setup_environment(self) -> None:
        """Connect the ranks, and make their context; Lightning calls it in each process before `configure_model`.

        The module's `device_mesh`, which `configure_model` may read, is that of the context.
        """
        assert self.lightning_module is not None
        check_averages(self.lightning_module.trainer, self.lightning_module)
        ParallelStrategy.setup_environment(self)  # without the mesh of data and tensor parallelism
        self._setup_distributed()
        self._make_context()
        self._device_mesh = self.lightning_module._device_mesh = self.sequence_context.mesh

    def setup(self, trainer: Trainer) -> None:
        """Shard the module and its averaged copies; the Trainer calls it after `configure_model`.

        A module in which the user has called `fully_shard` stays as it is.  Lightning then makes the optimizers of the
        sharded parameters, and a checkpoint is restored.
        """
        module = self.lightning_module
        assert module is not None
        self._begin_split_check()
        roots = (module, *averages(trainer))
        if any(isinstance(child, FSDPModule) for child in module.modules()):
            _check_sharding(module)  # sharded by the user, in `configure_model`
        else:
            for root in roots:
                self._shard(root)
        if isinstance(module, FSDPModule) and not module.automatic_optimization:
            # a step that calls its backward itself may go on with a forward, for which these parameters were freed
            for each in _outside_of_blocks(module):
                each.register_forward_pre_hook(self._unshard_after_backward, prepend=True)
        for root in roots:
            # a module that loads weights into the parts of each rank, so that no rank ever holds all of them
            if (load := getattr(root, "_load_sharded_weights", None)) is not None:
                load(torch.device("cpu") if self.sharding == "fsdp2_offload" else self.root_device)
        if has_averages(trainer) and self._save_distributed_checkpoint:
            self._save_distributed_checkpoint = False
            rank_zero_info(
                "RingSequenceParallelStrategy: a callback averages weights, so checkpoints are saved in one file each"
            )
        if not is_overridden("configure_model", module):
            setattr(module, "configure_model", MethodType(lambda _: None, module))  # noqa: B010  Lightning requires one
        super().setup(trainer)

    def _shard(self, module: nn.Module) -> None:
        """Shard the parameters of a module over the ranks, block by block, with the values that they have on rank 0.

        Parameters on the meta device have no values yet, and are sharded without.  All ranks call it together, in
        `setup`: for the module, and for each copy of it in which a callback averages weights.
        """
        tensors = [x.data for x in (*module.parameters(), *module.buffers()) if not x.is_meta]
        # each rank may have initialized its own; NCCL takes no values of the host
        in_buckets(partial(dist.broadcast, src=0), tensors, self.root_device)
        settings: dict[str, Any] = {"mesh": self._shard_mesh()}
        if self.sharding == "fsdp2_offload":
            settings["offload_policy"] = CPUOffloadPolicy(pin_memory=self.root_device.type == "cuda")
        for block in _blocks(module):
            fully_shard(block, **settings)
        fully_shard(module, **settings)
        for name in _ENTRY_METHODS:
            if hasattr(module, name):  # a method that calls parts of the module needs their whole parameters
                register_fsdp_forward_method(module, name)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Save a checkpoint; the Trainer calls it on all ranks together.

        If a callback averages weights, the checkpoint gets full tensors in place of sharded ones, for one file.
        """
        assert self.lightning_module is not None
        if has_averages(self.lightning_module.trainer):
            for name in ("state_dict", "averaging_state"):
                if name in checkpoint:
                    checkpoint[name] = whole_state(checkpoint[name], self.root_device)
        super().save_checkpoint(checkpoint, filepath, storage_options)

    # `CheckpointSaves` calls the next four when a checkpoint is saved or loaded

    def _saves_folders(self) -> bool:
        """Return whether each rank writes its files into a folder, and not rank 0 all into one file.

        It does unless the user has set save_distributed_checkpoint=False, or a callback averages weights.
        """
        return self._save_distributed_checkpoint

    # torch.distributed.checkpoint is imported where a checkpoint is written or read: that takes a while at each start

    def _write_folder(self, checkpoint: dict[str, Any], folder: Path) -> dict[str, FileSum]:
        """Write this rank's shards into a folder, on all ranks together; return the checksum of each file."""
        from lightning_longnet.strategies.shards import write_shards

        return write_shards(checkpoint, folder, is_first=self.is_global_zero)

    def _copy_folder(self, checkpoint: dict[str, Any], folder: Path) -> dict[str, MemoryFile]:
        """Copy this rank's shards to files in memory, on all ranks together; return these files."""
        from lightning_longnet.strategies.shards import copy_shards

        return copy_shards(checkpoint, folder, is_first=self.is_global_zero)

    def _load_from(self, path: Any, weights_only: bool | None) -> dict[str, Any]:
        """Load a checkpoint into the sharded module and the optimizers, and return the rest of it.

        It is one file, as any sharding but DeepSpeed saves it, or a folder of FSDP2.  All ranks call it together.
        """
        from lightning_longnet.strategies.full_checkpoint import load_folder, load_full_checkpoint

        path, module = Path(path), self.lightning_module
        assert self.model is not None
        assert module is not None
        loading = load_full_checkpoint if path.is_file() else load_folder
        trust = weights_only is False
        checkpoint = loading(path, self.model, self.optimizers, module.strict_loading, trust)
        if has_averages(module.trainer):  # the callback copies its average, and the weights again, shard by shard
            checkpoint["state_dict"] = module.state_dict()
            if "current_model_state" in checkpoint:
                checkpoint["current_model_state"] = sharded_state(checkpoint["current_model_state"], module)
        return checkpoint

    # Manual optimisation: the backward runs inside of the step, which is the model's forward to FSDP

    def pre_backward(self, closure_loss: Tensor) -> None:
        """Prepare FSDP for a backward that a step calls itself, with manual optimisation alone."""
        super().pre_backward(closure_loss)
        if self._is_manual():
            # FSDP gathers parameters in hooks on what the forward returns, and the step has returned nothing yet
            self._root()._get_fsdp_state()._register_pre_backward_hook(closure_loss)

    def post_backward(self, closure_loss: Tensor) -> None:
        """Free the parameters that FSDP gathered for a backward that a step called itself by `manual_backward`."""
        super().post_backward(closure_loss)
        if self._is_manual():
            # the gradients are sharded, and the step may clip those of `self.parameters()`
            self._root().reshard()
            self._is_freed = True

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        """Step the optimizer; with manual optimisation the parameters are gathered for the rest of the step."""
        result = super().optimizer_step(*args, **kwargs)
        self._unshard_after_optimizer()
        return result

    # Averaged weights: callbacks copy them between hooks of Lightning, from and to the shards that this rank holds

    def on_validation_start(self) -> None:
        """Free gathered parameters before a callback swaps in its averaged weights for the validation.

        Lightning calls it at the start of each validation, before `on_validation_epoch_start` of callbacks.
        """
        super().on_validation_start()
        self._reshard_for_averages()

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the step, and free gathered parameters for callbacks that average weights."""
        output = super().validation_step(*args, **kwargs)
        self._reshard_for_averages()
        return output

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the step; with manual optimisation free gathered parameters for callbacks that average weights."""
        self._is_freed = False
        output = super().training_step(*args, **kwargs)
        self._is_freed = False
        if self._is_manual():
            self._reshard_for_averages()
        return output

    def _reshard_for_averages(self) -> None:
        """Free gathered parameters, which FSDP keeps after a forward, if a callback averages weights."""
        assert self.lightning_module is not None
        if has_averages(self.lightning_module.trainer) and isinstance(self._root(), FSDPModule):
            self._root().reshard()

    def _unshard_after_optimizer(self) -> None:
        """Gather the parameters that an optimizer changed, as a step that called it itself may go on with them."""
        if self._is_manual():
            self._root().reshard()
            self._root().unshard()
            self._is_freed = False

    def _unshard_after_backward(self, *_: Any) -> None:
        """Gather the parameters that are in no block, if a backward of the same step has freed them.

        torch calls it before the forward of each module outside of blocks, as `setup` registers it with manual
        optimisation.  The blocks gather their parameters themselves.
        """
        if self._is_freed:  # not outside of a step, where a forward of one rank alone would wait for the others
            self._root().unshard()
            self._is_freed = False

    def _is_manual(self) -> bool:
        """Return whether FSDP shards the module as a whole, and the module calls backward and optimizers itself."""
        assert self.lightning_module is not None
        return isinstance(self._root(), FSDPModule) and not self.lightning_module.automatic_optimization

    def _root(self) -> Any:
        """Return the module that Lightning trains, without a type, as FSDP adds methods to it."""
        return self.model

    def _shard_mesh(self) -> DeviceMesh:
        """Return the mesh that `fully_shard` takes: all ranks in one axis, over which it shards parameters.

        For "hsdp" it is that of the context: parameters are sharded over the ranks that share a sequence, and equal on
        the data-parallel groups.
        """
        mesh = self.sequence_context.mesh
        assert mesh is not None
        return mesh if self.sharding == "hsdp" else mesh._flatten("ranks")

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Keep gradients on this rank inside the block, without a reduction over ranks.

        Lightning enters it for the micro-batches before the last one of an optimizer step.
        """
        model: Any = self.model
        if not isinstance(model, FSDPModule):
            yield
            return
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)


def _check_sharding(module: nn.Module) -> None:
    """Raise a ValueError if the user sharded over some ranks only, as gradients would be averaged over those alone."""
    for name, parameter in module.named_parameters():
        if isinstance(parameter, DTensor) and parameter.device_mesh.size() != dist.get_world_size():
            raise ValueError(
                f"{name} is sharded over {parameter.device_mesh.size()} of {dist.get_world_size()} ranks: in "
                f"configure_model call fully_shard with the whole of self.device_mesh, or with none, as what shares "
                f"a sequence must average gradients too"
            )


def _blocks(module: nn.Module) -> list[nn.Module]:
    """Return the modules to shard as units: the outermost entries of an `nn.ModuleList` or `nn.Sequential`.

    Entries without a forward, without children, or with a parameter that modules outside of the entry share are left
    out: their parameters are sharded with the whole module.
    """
    owned = Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))

    def is_unit(entry: nn.Module) -> bool:
        """Return whether an entry has parameters, and none that a module outside of it has too."""
        inside = Counter(id(parameter) for _, parameter in entry.named_parameters(remove_duplicate=False))
        return bool(inside) and all(owned[key] == times for key, times in inside.items())

    entries = [entry for entry in _container_entries(module) if any(True for _ in entry.children())]
    return [entry for entry in dict.fromkeys(entries) if is_unit(entry)]


def _outside_of_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules inside of a sharded one that are not in a unit, which FSDP gathers with the whole module."""
    for child in module.children():
        if not isinstance(child, FSDPModule):
            yield child
            yield from _outside_of_blocks(child)


def _container_entries(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the entries of the outermost `nn.ModuleList` or `nn.Sequential` on each path below a module.

    The module itself is not looked at as one.  For an entry without `forward` the outermost modules inside it that have
    one come instead.  A module may come twice.  `_blocks` calls it.
    """
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            for entry in child:
                yield from _with_forward(entry)
        else:
            yield from _container_entries(child)


def _with_forward(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a module that defines `forward`, or else the outermost modules inside it that do.

    FSDP gathers parameters in hooks of `forward`, which would never run for a container without one.
    """
    if type(module).forward is nn.Module.forward:
        for child in module.children():
            yield from _with_forward(child)
    else:
        yield module
