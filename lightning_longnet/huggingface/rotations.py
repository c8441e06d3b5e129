"""`replaced_rotations`: the `rope_parameters` that replace those of a configuration, as for YaRN."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# what the weights were trained with, and every type of rotation keeps
_OF_WEIGHTS = ("rope_theta", "partial_rotary_factor")
_SCALED = ("yarn", "llama3", "longrope")  # which count from the length of the training
_LENGTH = "original_max_position_embeddings"


def replaced_rotations(config: PretrainedConfig, given: Any) -> dict[str, Any]:
    """Return `rope_parameters` with the base of the rotations, which values that replace others need not repeat.

    Args:
        config: the configuration of a model, before any value of it is replaced.
        given: the values, by the kinds of layers where those of the configuration are.
    """
    own = getattr(config, "rope_parameters", None)
    if not isinstance(own, dict) or not isinstance(given, dict):
        raise ValueError(
            f"rope_parameters must be a dictionary, of a model with rotary positions, got {given!r} for a "
            f"{config.model_type}"
        )
    kinds = [kind for kind, values in own.items() if isinstance(values, dict)]
    if not kinds:
        return _replaced(config, own, given)
    if unknown := [name for name in given if name not in kinds]:
        raise ValueError(
            f"rope_parameters of a {config.model_type} must be by the kinds of its layers, {', '.join(kinds)}, got "
            f"{unknown[0]!r}"
        )
    return {**own, **{kind: _replaced(config, own[kind], values) for kind, values in given.items()}}


def _replaced(config: PretrainedConfig, own: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return the values of one kind of layers; a type that is not known, or without a factor, raises a ValueError."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = given.get("rope_type", "default")
    kinds = ["default", *ROPE_INIT_FUNCTIONS]
    if kind not in kinds:
        raise ValueError(f"rope_type must be one of {', '.join(dict.fromkeys(kinds))}, got {kind!r}")
    if kind in ("yarn", "linear", "dynamic", "llama3") and not given.get("factor"):
        raise ValueError(f"rope_parameters of rope_type {kind!r} must have a factor, by which the context is longer")
    kept = {name: own[name] for name in _OF_WEIGHTS if own.get(name) is not None}
    if kind in _SCALED:
        kept[_LENGTH] = own.get(_LENGTH) or config.max_position_embeddings
    return {**kept, "rope_type": kind, **given}
