"""A LongNet with the matrices of a model of transformers, from which `longnet plan` predicts memory and time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lightning_longnet.huggingface.models import created
from lightning_longnet.huggingface.placements import layer_patterns
from lightning_longnet.models.longnet import LongNet, LongNetConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PretrainedConfig

_SHARE = 0.01  # by which the parameters of both models may differ: norms and biases


def planned_config(config: PretrainedConfig, options: Mapping[str, Any]) -> LongNetConfig:
    """Return the configuration of a LongNet with as many layers, heads and weights, and the attention of each layer.

    A model that has other parts, as experts, raises a ValueError with the reason.

    Args:
        config: the configuration of the model.
        options: the arguments of `CausalLMModule`.
    """
    kind, heads, width = config.model_type, config.num_attention_heads, config.hidden_size
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if getattr(config, name, None):
            raise ValueError(f"a plan knows no experts, and the {kind} has {getattr(config, name)} in {name}")
    head_dim = getattr(config, "head_dim", None) or width // heads
    if head_dim * heads != width:
        raise ValueError(
            f"a plan knows heads that divide the width alone, and the {kind} has {heads} heads of {head_dim} in a "
            f"width of {width}"
        )
    planned = LongNetConfig(
        layer_patterns(config),
        dim=width,
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        hidden_dim=config.intermediate_size,
        activation="swiglu" if _is_gated(config) else "gelu",
        sub_norm=False,
        bias=False,
        vocab_size=config.vocab_size,
        tied_embeddings=config.tie_word_embeddings,
        recompute=options["recompute"],
        offload_activations=options["activation_offload"],
        feed_forward_chunk=options["mlp_chunk_tokens"],
        loss_chunk=options["loss_chunk"],
    )
    with torch.device("meta"):
        ours = sum(p.numel() for p in LongNet(planned).parameters())
    theirs = sum(p.numel() for p in _empty(config).parameters())
    if abs(ours - theirs) > _SHARE * theirs:
        raise ValueError(
            f"a plan knows models of attention and a feed-forward in each layer, which would have {ours:,} parameters "
            f"with the sizes of this {kind}, and it has {theirs:,}"
        )
    return planned


def _empty(config: PretrainedConfig) -> Any:
    with torch.device("meta"):
        return created(config, "eager")


def _is_gated(config: PretrainedConfig) -> bool:
    return any("gate" in name for name, _ in _empty(config).named_parameters())
