"""Registration of names in Lightning and transformers, without importing either.

`Trainer(strategy=...)` takes the names of `NAMES`, and `from_pretrained(attn_implementation=...)` takes `ATTENTION`.
"""

from __future__ import annotations

import sys
from functools import wraps
from importlib.abc import Loader, MetaPathFinder
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

LIGHTNING = "lightning.pytorch.strategies"
TRANSFORMERS = "transformers.modeling_utils"
TRANSFORMERS_MASKS = "transformers.masking_utils"
ATTENTION = "ring"
FIELD = "dilated_attention"  # of the configuration of a model of transformers with dilated layers: their patterns
_REFUSES = "_refuses_dilated_layers"
DEFAULT = "ring_sequence_parallel"
NAMES = {
    DEFAULT: "fsdp2",
    f"{DEFAULT}_ddp": "ddp",
    f"{DEFAULT}_fsdp2": "fsdp2",
    f"{DEFAULT}_fsdp2_offload": "fsdp2_offload",
    f"{DEFAULT}_hsdp": "hsdp",
    f"{DEFAULT}_deepspeed_stage_1": "deepspeed_stage_1",
    f"{DEFAULT}_deepspeed_stage_2": "deepspeed_stage_2",
    f"{DEFAULT}_deepspeed_stage_3": "deepspeed_stage_3",
    f"{DEFAULT}_deepspeed_stage_3_offload": "deepspeed_stage_3_offload",
}


def register() -> None:
    """Register the names now where the modules that hold them are loaded, else when they are: loading takes seconds."""
    registrations: dict[str, Callable[[Any], None]] = {
        LIGHTNING: lambda module: register_in(module.StrategyRegistry),
        TRANSFORMERS: lambda module: module.AttentionInterface.register(ATTENTION, attention_forward),
        TRANSFORMERS_MASKS: lambda module: _register_masks(module.AttentionMaskInterface),
    }
    watched = {finder.name for finder in sys.meta_path if isinstance(finder, _Watch)}
    for name, registration in registrations.items():
        if name in sys.modules:
            registration(sys.modules[name])
        elif name not in watched:
            sys.meta_path.insert(0, _Watch(name, registration))


def attention_forward(*arguments: Any, **options: Any) -> Any:
    """Call `ring_attention`, whose module is imported now."""
    from lightning_longnet.huggingface.attention import ring_attention

    return ring_attention(*arguments, **options)


def attention_mask(*arguments: Any, **options: Any) -> Any:
    """Call `ring_mask`, whose module is imported now."""
    from lightning_longnet.huggingface.masks import ring_mask

    return ring_mask(*arguments, **options)


def _register_masks(interface: Any) -> None:
    """Register the mask of `ATTENTION`, and let the masks of all others refuse models with dilated layers.

    `from_pretrained(folder, attn_implementation="sdpa")` of such a model would compute dense layers: the mask is the
    first call in its forward that goes through transformers' registries.
    """
    for name, mask in list(interface._global_mapping.items()):
        if name != ATTENTION and not hasattr(mask, _REFUSES):
            interface.register(name, _refusing_dilated(mask))
    interface.register(ATTENTION, attention_mask)


def _refusing_dilated(mask: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of masks that refuses configurations with dilated layers."""

    @wraps(mask)
    def refusing(*arguments: Any, **options: Any) -> Any:
        config: Any = options.get("config")
        if getattr(config, FIELD, None):
            from lightning_longnet.huggingface.dilation import check_dilated

            check_dilated(config, config._attn_implementation)
        return mask(*arguments, **options)

    setattr(refusing, _REFUSES, True)
    return refusing


def callbacks() -> list[Any]:
    """Return the callbacks of each Trainer: Lightning calls this entry point of the package when it makes one."""
    from lightning_longnet.training.batch_documents import BatchDocuments

    return [BatchDocuments()]


def make_strategy(**arguments: Any) -> Any:
    """Return a `RingSequenceParallelStrategy`, whose module is imported now."""
    from lightning_longnet.strategies import RingSequenceParallelStrategy

    return RingSequenceParallelStrategy(**arguments)


def register_in(registry: Any) -> None:
    """Register the names in the registry of Lightning's strategies."""
    for name, sharding in NAMES.items():
        registry.register(
            name, make_strategy, description=f"Sequences split over ranks, {sharding}", override=True, sharding=sharding
        )


class _Watch(MetaPathFinder):
    """A finder that finds no module itself, but runs a registration after the module `name` is executed."""

    def __init__(self, name: str, registration: Callable[[Any], None]) -> None:
        self.name, self.registration = name, registration

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader, self.registration)
        return spec


class _Registering(Loader):
    """A loader that runs a registration after the module is executed."""

    def __init__(self, loader: Loader, registration: Callable[[Any], None]) -> None:
        self.loader, self.registration = loader, registration

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        assert module.__spec__ is not None
        module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        self.registration(module)
