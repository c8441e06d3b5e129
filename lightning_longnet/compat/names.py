"""Further names of the ancestor for the same classes: subclasses, so that messages name the class that was imported."""

from __future__ import annotations

from lightning_longnet.compat.classes import (
    BlockSparseRingDilatedAttention,
    BlockSparseRingMultiheadDilatedAttention,
    RingDilatedAttention,
    RingDilatedAttentionHilbertOptimized,
    RingDilatedAttentionProduction,
    RingMultiheadDilatedAttentionHybrid,
)


class RingDilatedAttentionV3(RingDilatedAttention):
    """`RingDilatedAttention` under another name."""


class RingDilatedAttentionHybrid(RingDilatedAttention):
    """`RingDilatedAttention` under another name."""


class RingDilatedAttentionHybridFixed(RingDilatedAttention):
    """`RingDilatedAttention` under another name."""


class RingDilatedAttentionTrue(RingDilatedAttention):
    """`RingDilatedAttention` under another name."""


class RingDilatedAttentionProductionFixed(RingDilatedAttentionProduction):
    """`RingDilatedAttentionProduction` under another name."""


class RingDilatedAttentionHilbertOptimizedFixed(RingDilatedAttentionHilbertOptimized):
    """`RingDilatedAttentionHilbertOptimized` under another name."""


class BlockSparseRingDilatedAttentionFixed(BlockSparseRingDilatedAttention):
    """`BlockSparseRingDilatedAttention` under another name."""


class RingMultiheadDilatedAttentionHybridFixed(RingMultiheadDilatedAttentionHybrid):
    """`RingMultiheadDilatedAttentionHybrid` under another name."""


class BlockSparseRingMultiheadDilatedAttentionFixed(BlockSparseRingMultiheadDilatedAttention):
    """`BlockSparseRingMultiheadDilatedAttention` under another name."""
