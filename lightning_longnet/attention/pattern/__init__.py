"""Patterns: the keys that a query sees, and the order of the tokens in which a pattern counts them."""

from lightning_longnet.attention.pattern.branch import Branch, HeadOffsets, Ragged
from lightning_longnet.attention.pattern.ordering import (
    Ordering,
    causal_order,
    hilbert_order,
    inverse_order,
    raster_order,
    sequence_hilbert_order,
)
from lightning_longnet.attention.pattern.pattern import Multiplicity, Pattern, Reach, check_heads
from lightning_longnet.attention.pattern.sparsity import Sparsity

__all__ = [
    "Branch",
    "HeadOffsets",
    "Multiplicity",
    "Ordering",
    "Pattern",
    "Ragged",
    "Reach",
    "Sparsity",
    "causal_order",
    "check_heads",
    "hilbert_order",
    "inverse_order",
    "raster_order",
    "sequence_hilbert_order",
]
