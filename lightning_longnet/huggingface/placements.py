"""The attention of all layers of a module, of this package or of transformers, and the placement that serves them."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from lightning_longnet.attention.parallel.placement_choice import LayerAttention, PlacementChoice, placement_choice
from lightning_longnet.attention.pattern.pattern import Pattern
from lightning_longnet.layers.attending import AttentionLayer
from lightning_longnet.registration import ATTENTION, FIELD

if TYPE_CHECKING:
    from torch import nn


def layer_patterns(config: Any) -> list[Pattern]:
    """Return the pattern of each layer of a causal model: that of `dilate`, or the layer's own window, chunk or all.

    Args:
        config: the configuration of the model.
    """
    config = config.get_text_config()
    dilated = getattr(config, FIELD, None) or {}
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    default = "sliding_attention" if window else "full_attention"
    kinds = getattr(config, "layer_types", None) or [default] * config.num_hidden_layers
    own = {
        "sliding_attention": Pattern.window(window, is_causal=True) if window else None,
        "chunked_attention": Pattern.dilated((chunk,), (1,), is_causal=True) if chunk else None,
        "full_attention": Pattern.dense(is_causal=True),
    }
    patterns = []
    for number, kind in enumerate(kinds):
        pattern = Pattern(**dilated[str(number)]) if str(number) in dilated else own.get(kind)
        if pattern is None:
            raise ValueError(f"layer {number} is of the kind {kind!r}, which no pattern describes")
        patterns.append(pattern)
    return patterns


def attention_layers(module: nn.Module) -> tuple[tuple[LayerAttention, int], ...]:
    """Return the attention of a module's layers, each with the number of layers that have it.

    These are the layers of this package, other modules with a `pattern` and `num_heads`, and those of models of
    transformers with `attn_implementation="ring"`.
    """
    counts, counted = Counter[LayerAttention](), tuple[str, ...]()
    for name, child in module.named_modules():
        if any(name == outer or name.startswith(outer) for outer in counted):
            continue
        if _is_ring(child):
            counted = (*counted, f"{name}." if name else "")
            counts.update(_layers_of_config(child.config))
        elif (layer := _layer_of(child)) is not None:
            counts[layer] += 1
    return tuple(counts.items())


def choose_placement(model: nn.Module, length: int, ranks: int) -> PlacementChoice:
    """Return the placement with which all layers of a model together are fastest over some ranks, and why.

    Dense causal layers are faster with "zigzag", with which ranks compute equally many pairs; dilated ones with
    "contiguous", which keeps their segments on one rank.  "zigzag" is chosen where the busiest rank would compute much
    more without it, summed over all layers.

    Args:
        model: a model of transformers with `attn_implementation="ring"`, or any module of layers with patterns.
        length: the number of tokens of a sequence.
        ranks: the number of ranks that share it.
    """
    return placement_choice(attention_layers(model), length, ranks)


def _is_ring(module: nn.Module) -> bool:
    """Whether a module is a model of transformers that attends by `attn_implementation="ring"`."""
    config: Any = getattr(module, "config", None)
    return getattr(config, "_attn_implementation", None) == ATTENTION and hasattr(module, "get_input_embeddings")


def _layers_of_config(config: Any) -> list[LayerAttention]:
    text = config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    return [LayerAttention(pattern, heads, kv_heads) for pattern in layer_patterns(config)]


def _layer_of(module: nn.Module) -> LayerAttention | None:
    """Return the attention of a layer that has a pattern, or None."""
    pattern: Any = getattr(module, "pattern", None)
    heads: Any = getattr(module, "num_heads", None)
    if not isinstance(pattern, Pattern) or not (isinstance(module, AttentionLayer) or isinstance(heads, int)):
        return None
    if heads is None:  # the layer is given heads: as many as there are residues, which all count then
        heads = max(branch.dilation_rate for branch in pattern.branches)
    is_ordered = getattr(module, "ordering", "raster") == "raster"
    return LayerAttention(pattern, heads, getattr(module, "num_kv_heads", None) or heads, is_ordered)
