"""Key/value caches of texts in files, to continue a text in another process."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lightning_longnet.attention.pattern.pattern import Pattern
from lightning_longnet.checkpointing.checkpoints import need_safetensors
from lightning_longnet.inference.cache import DilatedCache
from lightning_longnet.sequence.agreement import fault_of

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

    from lightning_longnet.models.longnet import LongNet

# The kind of file that the metadata name
_KIND = "lightning-longnet cache"
# what a model's configuration may differ in while its keys stay the same; patterns are compared by themselves
_SAME_KEYS = {
    *("pattern", "dropout", "attention_dropout", "recompute", "offload_activations", "feed_forward_chunk"),
    *("mix", "kernel", "exchange", "preset", "loss_chunk"),
}
_SAMPLES = 16  # values of each parameter that tell one model from another


def save_cache(cache: DilatedCache, path: str | Path, model: LongNet) -> None:
    """Write a cache to a file of safetensors.

    Ranks that share the cache call it together, and the first one writes all rows, which any number of ranks can read.

    Args:
        cache: the cache.
        path: the file, which is replaced.
        model: the model that the cache is of; `load_cache` refuses it for another.
    """
    need_safetensors()
    from safetensors.torch import save_file

    cache.check(model.config, cache.batch, cache.device)
    state = cache.state()
    tensors = {name: x.cpu().contiguous() for name, x in state.tensors.items()}
    about = {**state.about, "patterns": [pattern.to_dict() for pattern in cache.patterns], "model": _digest(model)}
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")

    def write() -> None:
        save_file(tensors, partial, metadata={"kind": _KIND, "about": json.dumps(about)})
        partial.replace(path)  # whole or not at all

    if cache.ranks.size == 1:
        write()
        return
    fault = fault_of(write) if cache.ranks.rank == 0 else ""
    cache.ranks.check_same(fault, cache.number, 0)


def load_cache(path: str | Path, model: LongNet, *, group: ProcessGroup | None = None) -> DilatedCache:
    """Return the cache that `save_cache` wrote, on the device of the model.

    A ValueError is raised for a file that is damaged, that holds something else, or that is of another model.

    Args:
        path: the file.
        model: the model that the cache is of.
        group: the ranks over which the rows are split; each takes its own from the file.
    """
    need_safetensors()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dictionary
    except SafetensorError as error:
        raise ValueError(f"path must be a file of save_cache, got {path}, which cannot be read: {error}") from None
    if metadata.get("kind") != _KIND:
        raise ValueError(f"path must be a file of save_cache, got {path}, which holds other tensors")
    try:
        about = json.loads(metadata["about"])
        patterns, digest = tuple(Pattern(**each) for each in about["patterns"]), about["model"]
        if patterns == model.config.patterns and digest == _digest(model):
            dtype = getattr(torch, about["dtype"])
            device = model.embedding.weight.device
            cache = DilatedCache(model.config, about["batch"], dtype=dtype, device=device, group=group)
            cache.restore(tensors, about)
            return cache
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"path must be a file of save_cache, got {path}, which lacks some of it: {error}") from None
    what = "patterns" if patterns != model.config.patterns else "weights or configuration"
    raise ValueError(f"path must be a cache of this model, got {path}, which is of one with other {what}")


def _digest(model: LongNet) -> str:
    """Return a hash of a model's configuration and of `_SAMPLES` values of each parameter, as hexadecimal text."""
    config = {each.name: getattr(model.config, each.name) for each in fields(model.config)}
    hasher = hashlib.sha256(repr([(name, x) for name, x in config.items() if name not in _SAME_KEYS]).encode())
    for name, parameter in model.named_parameters():
        x: Tensor = parameter.detach().flatten()
        some = x[torch.linspace(0, len(x) - 1, _SAMPLES, device=x.device).long()] if len(x) else x
        hasher.update(f"{name} {tuple(parameter.shape)} {some.double().tolist()}".encode())
    return hasher.hexdigest()
