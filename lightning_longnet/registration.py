"""Registration of the names that `Trainer(strategy=...)` takes, without importing Lightning."""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

LIGHTNING = "lightning.pytorch.strategies"
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
    """Register the names now where Lightning's strategies are loaded, else when they are, as loading takes seconds."""
    if LIGHTNING in sys.modules:
        register_in(sys.modules[LIGHTNING].StrategyRegistry)
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


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
    """A finder that finds no module itself, but makes Lightning's strategies register the names after loading."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != LIGHTNING:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


class _Registering(Loader):
    """A loader that registers the names after the module of Lightning's strategies is executed."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        assert module.__spec__ is not None
        module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        register_in(module.StrategyRegistry)
