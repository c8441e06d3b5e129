"""LoRA through peft: adapters inside of a model of transformers, and the same model with them merged."""

from __future__ import annotations

from hashlib import sha256
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from transformers import PreTrainedModel

_BASE = ".base_layer"  # what peft adds to the names of the weights beside which it puts adapters
_NO_HEAD = "lora.target_modules must not name the output head, whose loss is computed in chunks"
_SAMPLED = 64  # elements of each weight in the digest of the base


def add_adapters(model: PreTrainedModel, lora: Mapping[str, Any]) -> None:
    """Freeze a model, and put adapters of LoRA beside its linear maps, which alone are trained.

    Args:
        model: the model, which keeps its class.
        lora: arguments of `peft.LoraConfig`; `target_modules` is "all-linear" by default, all maps but the output head.
    """
    if find_spec("peft") is None:
        raise ModuleNotFoundError("lora needs peft: pip install 'lightning-longnet[peft]'")
    from peft import LoraConfig, inject_adapter_in_model

    if not isinstance(lora, dict):
        raise ValueError(f"lora must be the arguments of peft.LoraConfig, such as {{'r': 16}}, got {lora!r}")
    try:
        config = LoraConfig(**{"target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora})
    except TypeError as error:
        raise ValueError(f"lora must hold arguments of peft.LoraConfig: {error}") from None
    for name in ("modules_to_save", "trainable_token_indices"):
        if getattr(config, name, None):
            raise ValueError(f"lora must not set {name}: only adapters are trained and saved")
    head = model.get_output_embeddings()
    head_name = next((name for name, module in model.named_modules() if module is head), "")
    targets = config.target_modules
    if not isinstance(targets, str) and head_name.rpartition(".")[2] in (targets or ()):
        raise ValueError(_NO_HEAD)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    inject_adapter_in_model(config, model)
    if model.get_output_embeddings() is not head:
        raise ValueError(_NO_HEAD)


def adapter_state(state: Mapping[str, Tensor], trained: set[str]) -> dict[str, Tensor]:
    """Return the entries of a state_dict that are trained."""
    return {name: value for name, value in state.items() if name in trained}


def base_digest(model: PreTrainedModel) -> str:
    """Return a text that is equal for models with equal frozen weights, read from the first elements of each."""
    content = sha256()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or parameter.is_meta:
            continue
        content.update(f"{name.replace(_BASE, '')} {tuple(parameter.shape)}".encode())
        sample = parameter.detach().flatten()[:_SAMPLED].to("cpu", torch.float32)
        content.update(sample.numpy().tobytes())
    return content.hexdigest()[:16]


@torch.no_grad()
def merge_adapters(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the state_dict of a model as it was before `add_adapters`, with the adapters merged into its weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    for layer in layers.values():
        layer.merge(safe_merge=True)
    plain = {}
    for name, value in model.state_dict().items():
        owner = next((each for each in layers if name.startswith(f"{each}.")), None)
        if owner is None:
            plain[name] = value
        elif name.startswith(f"{owner}{_BASE}."):
            plain[name.replace(f"{owner}{_BASE}.", f"{owner}.", 1)] = value
    return plain
