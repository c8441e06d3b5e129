"""The module itself, as FSDP2 or DeepSpeed has sharded it, for a split check of a module that cannot be copied."""

from __future__ import annotations

import copy
import random
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

from lightning_longnet.split_check.replica import shared_objects

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from lightning_longnet.sequence.context import SequenceContext
    from lightning_longnet.split_check.replica import Values

    Step = Callable[[nn.Module, Any], Any]

_SHARED = ("_parameters", "_modules", "__", "ds_", "_external_params")  # begin the names of what engines work on
_CONTAINERS = (list, dict, set, deque)
_ROUNDING = {True: 1e-5, False: 1e-6}  # by which float32 may move gradients, and losses; half types move them by more


class EngineModule:
    """A module that FSDP2 or DeepSpeed has sharded; it stands in for a `Replica`, and finds less.

    `FirstBatchCheck` makes it, as the argument `inside` of `check_split`.  It computes with the present values of its
    parameters and in its own dtype, so a gate that is zero hides what is behind it, and small differences are within
    rounding.

    Args:
        module: the module.
        step: runs a step as the strategy does; called as `step(module, batch)`.
        dtypes: the dtypes that it may compute in, beside those of its parameters.
        has_gradients: whether the backward leaves gradients, averaged over ranks, at the parameters; else a check has
            no backward pass.

    Attributes:
        step: as given.
        has_gradients: as given.
        noise: by how much rounding may move results.
        parameters: the names of the parameters whose values a check may move: none.
        sizes: the sizes of the parameters' dimensions.
    """

    def __init__(self, module: nn.Module, step: Step, dtypes: tuple[torch.dtype, ...], has_gradients: bool) -> None:
        self._module, self.step, self.has_gradients = module, step, has_gradients
        held = {x.dtype for x in module.parameters() if x.is_floating_point()}
        self.noise = max(
            _ROUNDING[has_gradients], *(torch.finfo(dtype).eps / 10 for dtype in {torch.float32, *held, *dtypes})
        )
        self.parameters: set[str] = set()
        self.sizes = {size for x in module.parameters() for size in getattr(x, "ds_shape", x.shape)}

    def values_of(self, *_: Any) -> Values:
        """Return no values, unlike `Replica.values_of`: the parameters have them.  `_verdict` of check.py asks."""
        return {}

    @contextmanager
    def lent(self, _values: Values, modes: Mapping[str, bool], _context: SequenceContext) -> Iterator[nn.Module]:
        """Lend the module to a run: inside the block its buffers and attributes are copies, and it has no gradients.

        After the block, also after an error in the step, it is as before.  `Runner.run` enters it.

        Args:
            modes: whether each module inside is in training mode, by its name.
        """
        modules = [*self._module.modules()]
        for each in modules:
            if isinstance(each, FSDPModule):  # a forward without a backward, of validation, leaves the root gathered
                each.reshard()
        gradients = [(x, x.grad) for x in self._module.parameters()]
        partial = {id(x): x.grad for x in _gathered_parameters(modules)}  # where accumulation does not synchronise
        kept = [dict(each.__dict__) for each in modules]
        memo: dict[int, Any] = shared_objects(self._module)
        memo |= {id(x): x for x in (*modules, *self._module.parameters())}
        try:
            for each in modules:
                for name, value in each.__dict__.items():
                    each.__dict__[name] = _copied_value(name, value, memo)
            for name, each in self._module.named_modules():
                each.training = modes.get(name, each.training)
            for parameter in (*self._module.parameters(), *_gathered_parameters(modules)):
                parameter.grad = None
            yield self._module
        finally:
            for each, attributes in zip(modules, kept, strict=True):
                each.__dict__.clear()
                each.__dict__.update(attributes)
            for parameter, gradient in gradients:
                parameter.grad = gradient
            for each in modules:
                if isinstance(each, FSDPModule):
                    _reset(each)
            for parameter in _gathered_parameters(modules):  # of a backward that an error ended
                parameter.grad = partial.get(id(parameter))


def _groups(module: FSDPModule) -> list[Any]:
    """Return the groups of parameters, of FSDP2's classes, that it gathers together for a module; it may have none."""
    state: Any = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # of torch 2.13, and before
    return [group for group in groups if group is not None]


def _gathered_parameters(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Return FSDP2's unsharded parameters, at which a backward leaves gradients before FSDP2 reduces them."""
    groups = [group for each in modules if isinstance(each, FSDPModule) for group in _groups(each)]
    return [x._unsharded_param for group in groups for x in group.fsdp_params if hasattr(x, "_unsharded_param")]


def _reset(module: FSDPModule) -> None:
    """Reset the state of FSDP2 after a step that an error may have ended, as later steps would leave no gradients."""
    state = module._get_fsdp_state()
    state._training_state = TrainingState.IDLE
    state._modules_to_run_forward.clear()
    state._state_ctx.post_backward_final_callback_queued = False
    state._state_ctx.iter_forward_root = None
    if hasattr(state._comm_ctx, "post_forward_order"):  # FSDP2 makes it in the first forward
        state._comm_ctx.post_forward_order.clear()
    for group in _groups(module):
        group._training_state = TrainingState.IDLE
        group._post_forward_indices.clear()
    module.reshard()


def _copied_value(name: str, value: Any, memo: dict[int, Any]) -> Any:
    """Return a copy of an attribute of a module that a step may change; the attribute itself if it is of another kind.

    Args:
        name: the name of the attribute; what FSDP2 and DeepSpeed work on is not copied.
        value: the attribute.
        memo: the copies by the ids of their originals, as of `copy.deepcopy`; new copies are added.
    """
    if name.startswith(_SHARED):
        return value
    if id(value) in memo:  # another module has it as well
        return memo[id(value)]
    if name.endswith("_hooks"):  # which belong to the engine
        return copy.copy(value)
    if isinstance(value, Tensor):
        return memo.setdefault(id(value), value.detach().clone())
    if isinstance(value, (*_CONTAINERS, torch.Generator, random.Random)) or hasattr(value, "bit_generator"):
        try:
            return copy.deepcopy(value, memo)  # which notes the copy in `memo`
        except Exception:  # noqa: BLE001  it holds what cannot be copied, a lock for instance
            return value
    return value
