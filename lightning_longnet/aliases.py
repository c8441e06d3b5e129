"""Former module paths, which checkpoints, configurations and exports may still name, and the names of the ancestor.

For `from lightning_longnet import NAME` Python looks for a module of that name where the package has no attribute.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING

from lightning_longnet.ancestor import replacement

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

PACKAGE = "lightning_longnet"
MOVED = {
    "attention.branch": "attention.pattern.branch",
    "attention.sparsity": "attention.pattern.sparsity",
    "attention.ordering": "attention.pattern.ordering",
    "attention.placement": "attention.parallel.placement",
    "attention.schedule": "attention.parallel.schedule",
    "attention.shard": "attention.parallel.shard",
    "attention.dropout": "attention.kernels.dropout",
    "blocks": "models.blocks",
    "model": "models.longnet",
    "vision": "models.longvit",
    "generation": "models.generation",
    "presets": "layers.presets",
    "loss": "layers.loss",
    "module": "training.module",
    "vision_module": "training.vision_module",
    "metrics": "training.metrics",
    "optimization": "training.optimization",
    "checkpoints": "checkpointing.checkpoints",
    "exported": "checkpointing.exports",
    "torchscale": "checkpointing.torchscale",
    "flops": "planning.flops",
    "planning.plan": "planning.run",
    "planning.configured": "cli.configured",
    "sequence.handed": "sequence.attach",
    "strategies.ring": "strategies.base",
    "callbacks.whole": "callbacks.atomic_save",
    "callbacks.peak": "planning.devices",
}


def install() -> None:
    """Make `import` of a former path return the module at its present path, and name replacements of the ancestor's."""
    if not any(isinstance(finder, _MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(_MovedModules())


class _MovedModules(MetaPathFinder, Loader):
    """Runs after all other finders, so that it never hides a file."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package == PACKAGE and (text := replacement(name.removeprefix("compat."))):
            raise ImportError(text, name=fullname)
        return ModuleSpec(fullname, self) if package == PACKAGE and name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(f"{PACKAGE}.{MOVED[spec.name.partition('.')[2]]}")
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Give the module back its own spec: it was executed under its present path."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state
