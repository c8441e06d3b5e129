"""The names of dilated_attention_pytorch, the ancestor of this package: its ring classes, each built from a preset.

MIGRATING.md lists each class and argument.  An argument has an effect, or is named in a warning because it has none,
or is refused.  Tensors are (B, N, H, D).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
from lightning_longnet.compat.configuration import RingAttentionConfig, SparsePatternConfig
from lightning_longnet.layers.presets import nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

# further names that the ancestor has for the same classes
StandardizedRingConfig = RingAttentionConfig
RingDilatedAttentionV3 = RingDilatedAttention
RingDilatedAttentionHybrid = RingDilatedAttention
RingDilatedAttentionHybridFixed = RingDilatedAttention
RingDilatedAttentionTrue = RingDilatedAttention
RingDilatedAttentionProductionFixed = RingDilatedAttentionProduction
RingDilatedAttentionHilbertOptimizedFixed = RingDilatedAttentionHilbertOptimized
BlockSparseRingDilatedAttentionFixed = BlockSparseRingDilatedAttention
RingMultiheadDilatedAttentionHybridFixed = RingMultiheadDilatedAttentionHybrid
BlockSparseRingMultiheadDilatedAttentionFixed = BlockSparseRingMultiheadDilatedAttention

# names that `create_standardized_ring_attention` takes besides those of the presets
_ALIASES = {"hybrid": "ring", "true": "ring", "v3": "ring", "v2_collective": "collective"}
_BY_PRESET: dict[str, type[RingAttention]] = {
    cls.preset: cls
    for cls in (
        RingDilatedAttention,
        RingDilatedAttentionProduction,
        RingDilatedAttentionHilbertOptimized,
        RingDilatedAttentionV2Collective,
        BlockSparseRingDilatedAttention,
        UlyssesAttention,
    )
}
_MULTIHEAD: dict[str, type[RingMultiheadAttention]] = {
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
    if attention_type in _MULTIHEAD:
        return _MULTIHEAD[attention_type](**arguments)
    preset = _ALIASES.get(attention_type, attention_type)
    if preset not in _BY_PRESET:
        known = [*_BY_PRESET, *_ALIASES, *_MULTIHEAD]
        rule = f"{', '.join(map(repr, known))}, got {attention_type!r}{nearest(attention_type, known)}"
        raise ValueError(f"attention_type must be one of {rule}")
    return _BY_PRESET[preset](**arguments)


def create_ring_multihead_attention_hybrid(
    embed_dim: int, num_heads: int, segment_lengths: Sequence[int], dilation_rates: Sequence[int], **arguments: Any
) -> RingMultiheadDilatedAttentionHybrid:
    """Return a `RingMultiheadDilatedAttentionHybrid`; see there for the arguments."""
    return RingMultiheadDilatedAttentionHybrid(embed_dim, num_heads, segment_lengths, dilation_rates, **arguments)
