"""`dilate`: chosen layers of a model of transformers get patterns, which its configuration saves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lightning_longnet.attention.pattern.pattern import Pattern
from lightning_longnet.registration import ATTENTION, FIELD

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

_GUARDED = "_refuses_other_attention"


def dilate(model: Any, pattern: Pattern, layers: Iterable[int] | None = None) -> Any:
    """Give layers of a model of transformers a pattern in place of their own, and return the model.

    The pattern becomes part of the model's config: `save_pretrained` writes it with `attn_implementation="ring"`, by
    which `from_pretrained` loads the model again.  Other layers keep what they see.

    Args:
        model: a causal model, which gets `attn_implementation="ring"`.
        pattern: which keys a query sees; it must be causal.
        layers: the numbers of the layers, from 0; all of them by default.
    """
    if not isinstance(pattern, Pattern) or not pattern.is_causal:
        raise ValueError(f"pattern must be a causal Pattern, got {pattern!r}: see Pattern.dilated(..., is_causal=True)")
    config = model.config.get_text_config()
    count = config.num_hidden_layers
    numbers = list(range(count) if layers is None else layers)
    for number in numbers:
        if not isinstance(number, int) or not 0 <= number < count:
            raise ValueError(f"layers must be numbers of layers, 0 to {count - 1}, got {number!r}")
    patterns = dict(getattr(config, FIELD, None) or {})
    patterns.update({str(number): pattern.to_dict() for number in numbers})
    setattr(config, FIELD, dict(sorted(patterns.items(), key=lambda item: int(item[0]))))
    model.set_attn_implementation(ATTENTION)
    for each in (model.config, config):
        each.attn_implementation = ATTENTION  # which configurations read, but do not write
    for module in model.modules():
        if getattr(module, "layer_idx", None) in numbers and getattr(module, "config", None) is config:
            guard_layer(module)
    return model


def guard_layer(module: nn.Module) -> None:
    """Let a dilated layer refuse other implementations of attention, which would be dense, and its config say so."""
    if _GUARDED in module.__dict__ or torch.compiler.is_compiling():
        return
    module.__dict__[_GUARDED] = True
    module.register_forward_pre_hook(_refuse_others)
    config: Any = module.config
    config.attn_implementation = ATTENTION


def _refuse_others(module: nn.Module, args: Any) -> None:
    config: Any = module.config
    if layer_pattern(module) is not None:
        check_dilated(config, config._attn_implementation)


def has_dilated_layers(config: Any) -> bool:
    """Return whether the configuration of a model has patterns that `dilate` gave to layers."""
    return bool(getattr(config.get_text_config(), FIELD, None))


def keep_ring(config: Any) -> None:
    """Let a configuration with dilated layers be saved with `attn_implementation="ring"`, which reading removes."""
    if has_dilated_layers(config):
        config.attn_implementation = ATTENTION


def check_dilated(config: Any, attention: str) -> None:
    """Raise a ValueError where a configuration has dilated layers, and another implementation is to compute them."""
    if attention != ATTENTION and has_dilated_layers(config):
        raise ValueError(
            f"attn_implementation must be {ATTENTION!r} for a model with dilated layers, got {attention!r}, which "
            f"would compute them as dense ones: model.set_attn_implementation({ATTENTION!r}), or for dense layers, "
            f"from_pretrained(..., {FIELD}=None)"
        )


def layer_pattern(module: nn.Module) -> Pattern | None:
    """Return the pattern that `dilate` gave a layer, or None."""
    patterns = getattr(getattr(module, "config", None), FIELD, None)
    if not patterns:
        return None
    number = getattr(module, "layer_idx", None)
    if number is None:
        raise ValueError(f"{type(module).__name__} has no layer_idx, so its pattern in config.{FIELD} is unknown")
    values = patterns.get(str(number))
    return None if values is None else Pattern(**values)
