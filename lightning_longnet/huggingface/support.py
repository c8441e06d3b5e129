"""What keeps a model of transformers from being exact where sequences are split over ranks."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from torch import nn

from lightning_longnet.registration import ATTENTION

_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")
_BY_LENGTH = ("dynamic", "longrope")


def split_refusals(model: Any) -> list[str]:
    """Return why a model of transformers is not exact on parts of sequences, a line for each reason; empty if it is.

    Everything but attention must treat each token by itself, or know its position from position_ids.
    """
    config = model.config.get_text_config()
    reasons = []
    if getattr(model.config, "is_encoder_decoder", False):
        reasons.append("the model has an encoder beside its decoder; a decoder alone is served")
    if not _uses_interface(model):
        reasons.append(
            f"{type(model).__name__} computes attention itself, not through transformers' AttentionInterface"
        )
    elif config._attn_implementation != ATTENTION:
        reasons.append(
            f'attn_implementation must be "{ATTENTION}", got {config._attn_implementation!r}: '
            f'from_pretrained(..., attn_implementation="{ATTENTION}")'
        )
    kinds = [kind for kind in dict.fromkeys(getattr(config, "layer_types", None) or ()) if kind not in _LAYER_TYPES]
    if kinds:
        reasons.append(f"layers of the kind {', '.join(map(repr, kinds))} carry a state from token to token")
    reasons += _module_reasons(model)
    if getattr(config, "output_router_logits", False):
        reasons.append(
            "output_router_logits must be False: the loss of the router is a mean over the tokens of one rank"
        )
    return reasons


def _module_reasons(model: nn.Module) -> list[str]:
    """Return the reasons that lie in modules, each once, with the name of the first such module."""
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, (nn.Conv1d, nn.RNNBase)):
            reasons.setdefault(kind, f"{name} ({kind}) computes a token from its neighbours, which other ranks hold")
        if getattr(module, "attn_temperature_tuning", False) and not getattr(module, "use_rope", True):
            reasons.setdefault(
                "temperature",
                f"{name} scales queries by their index on one rank: set attn_temperature_tuning=False in the config",
            )
        types = getattr(module, "rope_type", None)
        for rope in types.values() if isinstance(types, dict) else (types,):
            if rope in _BY_LENGTH:
                reasons.setdefault(
                    rope,
                    f"{name} of rope_type {rope!r} chooses its frequencies by the positions of one rank: rope_type "
                    f"'default', 'linear', 'yarn' and 'llama3' do not",
                )
    return list(reasons.values())


def _uses_interface(model: nn.Module) -> bool:
    """Return whether the attention of a model calls the function that `attn_implementation` selects."""
    modules = {type(module).__module__ for module in model.modules() if "Attention" in type(module).__name__}
    sources = [inspect.getsource(sys.modules[name]) for name in modules if name in sys.modules]
    return bool(sources) and all("ALL_ATTENTION_FUNCTIONS" in source for source in sources)
