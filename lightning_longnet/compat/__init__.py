"""The names of dilated_attention_pytorch, the ancestor of this package: its ring classes, each built from a preset.

MIGRATING.md lists each class and argument.  An argument has an effect, or is named in a warning because it has none,
or is refused.  Tensors are (B, N, H, D).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_longnet.ancestor import replacement
from lightning_longnet.compat.classes import (
    BlockSparseRingDilatedAttention,
    BlockSparseRingMultiheadDilatedAttention,
    RingAttention,
    RingDilatedAttention,
    RingDilatedAttentionHilbertOptimized,
    RingDilatedAttentionProduction,
    RingDilatedAttentionV2Collective,
    RingMultiheadAttention,
    RingMultiheadDilatedAttentionHybrid,
    UlyssesAttention,
)
from lightning_longnet.compat.configuration import RingAttentionConfig, SparsePatternConfig, StandardizedRingConfig
from lightning_longnet.compat.names import (
    BlockSparseRingDilatedAttentionFixed,
    BlockSparseRingMultiheadDilatedAttentionFixed,
    RingDilatedAttentionHilbertOptimizedFixed,
    RingDilatedAttentionHybrid,
    RingDilatedAttentionHybridFixed,
    RingDilatedAttentionProductionFixed,
    RingDilatedAttentionTrue,
    RingDilatedAttentionV3,
    RingMultiheadDilatedAttentionHybridFixed,
)
from lightning_longnet.layers.presets import nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

# the types of `create_standardized_ring_attention`: the names of the presets, and those that the ancestor has besides
_TYPES: dict[str, type[RingAttention | RingMultiheadAttention]] = {
    **{
        cls.preset: cls
        for cls in (
            RingDilatedAttention,
            RingDilatedAttentionProduction,
            RingDilatedAttentionHilbertOptimized,
            RingDilatedAttentionV2Collective,
            BlockSparseRingDilatedAttention,
            UlyssesAttention,
        )
    },
    "hybrid": RingDilatedAttentionHybrid,
    "true": RingDilatedAttentionTrue,
    "v3": RingDilatedAttentionV3,
    "v2_collective": RingDilatedAttentionV2Collective,
    "multihead_hybrid": RingMultiheadDilatedAttentionHybrid,
    "block_sparse_multihead": BlockSparseRingMultiheadDilatedAttention,
}

__all__ = [
    "BlockSparseRingDilatedAttention",
    "BlockSparseRingDilatedAttentionFixed",
    "BlockSparseRingMultiheadDilatedAttention",
    "BlockSparseRingMultiheadDilatedAttentionFixed",
    "RingAttentionConfig",
    "RingDilatedAttention",
    "RingDilatedAttentionHilbertOptimized",
    "RingDilatedAttentionHilbertOptimizedFixed",
    "RingDilatedAttentionHybrid",
    "RingDilatedAttentionHybridFixed",
    "RingDilatedAttentionProduction",
    "RingDilatedAttentionProductionFixed",
    "RingDilatedAttentionTrue",
    "RingDilatedAttentionV2Collective",
    "RingDilatedAttentionV3",
    "RingMultiheadDilatedAttentionHybrid",
    "RingMultiheadDilatedAttentionHybridFixed",
    "SparsePatternConfig",
    "StandardizedRingConfig",
    "create_production_ring_attention",
    "create_ring_multihead_attention_hybrid",
    "create_standardized_ring_attention",
]


def create_standardized_ring_attention(attention_type: str, **arguments: Any) -> RingAttention | RingMultiheadAttention:
    """Return an attention layer of the given type.

    Args:
        attention_type: the name of a preset, or a name that the ancestor has for one.
        arguments: arguments of the class of that type.

    >>> arguments = {"segment_lengths": [2048, 4096], "dilation_rates": [1, 2], "dim": 64, "heads": 8}
    >>> create_standardized_ring_attention("ring", **arguments, dropout=0.1)
    RingDilatedAttention(2048/1 + 4096/2, dropout=0.1, exchange='ring', ordering='raster', is_guarded=False)
    """
    if attention_type not in _TYPES:
        rule = f"{', '.join(map(repr, _TYPES))}, got {attention_type!r}{nearest(attention_type, _TYPES)}"
        raise ValueError(f"attention_type must be one of {rule}")
    return _TYPES[attention_type](**arguments)


def create_production_ring_attention(
    segment_lengths: Sequence[int], dilation_rates: Sequence[int], **arguments: Any
) -> RingDilatedAttentionProduction:
    """Return a `RingDilatedAttentionProduction`; see there for the arguments."""
    return RingDilatedAttentionProduction(segment_lengths, dilation_rates, **arguments)


def create_ring_multihead_attention_hybrid(
    embed_dim: int, num_heads: int, segment_lengths: Sequence[int], dilation_rates: Sequence[int], **arguments: Any
) -> RingMultiheadDilatedAttentionHybrid:
    """Return a `RingMultiheadDilatedAttentionHybrid`; see there for the arguments."""
    return RingMultiheadDilatedAttentionHybrid(embed_dim, num_heads, segment_lengths, dilation_rates, **arguments)


def __getattr__(name: str) -> Any:
    unknown = f"module {__name__!r} has no attribute {name!r}{nearest(name, __all__)}"
    raise AttributeError(replacement(name) or unknown, name=name)
