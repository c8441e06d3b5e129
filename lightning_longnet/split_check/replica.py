"""Copies of a module in which a split check runs steps, so that nothing that a step does reaches the module itself."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]
from torch.utils._pytree import tree_leaves

from lightning_longnet.sequence.buckets import in_buckets
from lightning_longnet.sequence.context import SequenceContext
from lightning_longnet.split_check.functions import rebind

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

_SHARED_NAMES = ("_trainer", "_fabric")  # objects of a run, not of a module
_SHARED_KINDS = (dist.ProcessGroup, DeviceMesh, ModuleType)

Values = Mapping[str, Tensor]


def is_whole_module(module: nn.Module) -> bool:
    """Return whether a module's parameters and buffers are whole on this rank: not sharded, and with values."""
    return not any(
        tensor.is_meta or isinstance(tensor, (DTensor, UninitializedTensorMixin)) or hasattr(tensor, "ds_id")
        for tensor in (*module.parameters(), *module.buffers())
    )


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor of a DTensor, which all ranks gather together, or the tensor itself if it is none.

    A `Replica` calls it for each parameter and buffer, and `SplitSteps._whole_parameter`.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    # shards may be kept in the host's memory, which the ranks do not exchange
    here: Any = tensor.detach().to(tensor.device_mesh.device_type)
    whole: Tensor = here.full_tensor()
    return whole


def _copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Return a deep copy of a module, whose hooks use the copies; `memo` has what is not to be copied, by its id."""
    memo = _detached(module) | memo
    result = copy.deepcopy(module, memo)
    rebind(result, memo)
    for each, original in zip(result.modules(), module.modules(), strict=True):
        for name in _SHARED_NAMES:  # which a LightningModule leaves out of its state
            if name in original.__dict__:
                each.__dict__[name] = original.__dict__[name]
    return result


def _detached(module: nn.Module) -> dict[int, Any]:
    """Return detached copies, by id, of the tensors with a `grad_fn` that modules keep: `deepcopy` refuses these."""
    kept = [tree_leaves(value) for each in module.modules() for value in each.__dict__.values()]
    tensors = [x for leaves in kept for x in leaves if isinstance(x, Tensor) and x.grad_fn is not None]
    return {id(x): x.detach().clone() for x in tensors}


def shared_objects(module: nn.Module) -> dict[int, Any]:
    """Return the objects that a copy of a module shares with it, by their ids: Trainer, process groups and meshes.

    A `Replica` and an `EngineModule` give them to `copy.deepcopy` as its memo.
    """
    return {
        id(value): value
        for each in module.modules()
        for name, value in each.__dict__.items()
        if name in _SHARED_NAMES or isinstance(value, _SHARED_KINDS)
    }


class Replica:
    """A copy of a module with parameters and buffers on the meta device, from which copies for each run are made.

    It is made before FSDP2 or DeepSpeed shards the module, and needs next to no memory.

    Args:
        module: the module, whole on this rank.
        whole: returns the full tensor of a parameter that is sharded after that; all ranks call it together.

    Attributes:
        parameters: the names of the parameters.
        sizes: the sizes of their dimensions.
        numbers: the number of their elements.
    """

    has_gradients, noise = True, 0.0  # as of an `EngineModule`

    def __init__(self, module: nn.Module, whole: Callable[[Tensor], Tensor] = whole_tensor) -> None:
        if not is_whole_module(module):
            raise ValueError("its parameters are sharded or empty already")
        tensors = (*module.parameters(), *module.buffers())
        memo = {id(tensor): _placeholder(tensor) for tensor in tensors} | shared_objects(module)
        self._structure = _copied(module, memo)
        self._whole = whole
        self.parameters = {name for name, _ in module.named_parameters()}
        self.sizes = {size for parameter in module.parameters() for size in parameter.shape}
        self.numbers = sum(parameter.numel() for parameter in module.parameters())

    def values_of(self, module: nn.Module, dtype: torch.dtype | None, device: torch.device) -> Values:
        """Return the present values of a module's parameters and buffers by name, those of rank 0 on all ranks.

        All ranks call it together: `_verdict` of check.py for each length and dtype that it tries.

        Args:
            module: the module; it may have been sharded since the replica was made.
            dtype: the dtype of values that are not integers; None keeps their own.
            device: the device of the values.
        """
        values = {
            name: self._whole(tensor).detach().to(device, copy=True).contiguous()  # as messages must be
            for name, tensor in (*module.named_parameters(), *module.named_buffers())
        }
        if dist.is_initialized():
            in_buckets(partial(dist.broadcast, src=0), values.values())
        return values if dtype is None else {name: in_dtype(value, dtype) for name, value in values.items()}

    @contextmanager
    def lent(self, values: Values, modes: Mapping[str, bool], context: SequenceContext) -> Iterator[nn.Module]:
        """Lend a new copy, `module_with` of these arguments, to a run inside the block; `Runner.run` enters it."""
        yield self.module_with(values, modes, context)

    def module_with(self, values: Values, modes: Mapping[str, bool], context: SequenceContext) -> nn.Module:
        """Return a copy of the module with these values.

        Args:
            values: the values of its parameters and buffers, by their names.
            modes: whether each module inside is in training mode, by its name.
            context: stands in for each context that modules keep as an attribute.
        """
        memo = shared_objects(self._structure)
        for each in self._structure.modules():
            # a metric may keep a method of it
            kept = [getattr(value, "__self__", value) for value in each.__dict__.values()]
            memo |= {id(value): context for value in kept if isinstance(value, SequenceContext)}
        for name, tensor in (*self._structure.named_parameters(), *self._structure.named_buffers()):
            memo[id(tensor)] = _like(tensor, values[name].clone())
        module = _copied(self._structure, memo)
        for name, each in module.named_modules():
            each.training = modes.get(name, each.training)
        return module


def _placeholder(tensor: Tensor) -> Tensor:
    """Return a tensor or parameter like `tensor` on the meta device, without memory."""
    return _like(tensor, torch.empty_like(tensor, device="meta"))


def _like(tensor: Tensor, value: Tensor) -> Tensor:
    """Return `value` as a parameter with the attributes of `tensor`, if that is a parameter, else as it is."""
    if not isinstance(tensor, nn.Parameter):
        return value
    result = nn.Parameter(value, tensor.requires_grad)
    result.__dict__.update(tensor.__dict__)
    return result


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in a floating dtype, or in the complex one of its width; integers stay as they are.

    Values of a `Replica` and tensors of batches (`to_device`) are converted with it.
    """
    if x.is_complex():
        return x.to(torch.promote_types(dtype, torch.complex64))
    return x.to(dtype) if x.is_floating_point() else x


def perturbed(values: Values, size: float, seed: int, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """Return values with random noise of about `size` times each element, the same on all ranks, for floating dtypes.

    Elements that are 0 get noise of `size / 10`.  A `Comparison` moves parameters by it: by a tenth, so that no gate is
    zero, and by a rounding error to measure what that does.

    Args:
        values: the values by name.
        size: the relative size of the noise; 0 returns the values.
        seed: the seed of the noise.
        names: the names whose values get noise; by default all.
    """
    generator = torch.Generator().manual_seed(seed)
    moved = {}
    for name, x in values.items():
        if not x.is_floating_point() or size == 0 or (names is not None and name not in names):
            moved[name] = x
            continue
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device, x.dtype)
        moved[name] = torch.where(x == 0, 0.1 * size * noise, x * (1 + size * noise.clamp(-3, 3)))
    return moved
