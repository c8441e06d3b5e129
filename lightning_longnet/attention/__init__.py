"""Exact dilated attention: imports torch alone, and is usable without Lightning."""

from lightning_longnet.attention.attend import attend, explain
from lightning_longnet.attention.guard import Guard
from lightning_longnet.attention.parallel.document_placement import balanced_placement
from lightning_longnet.attention.parallel.sequence_plan import SequencePlan, sequence_plan
from lightning_longnet.attention.parallel.shard import SequenceShard
from lightning_longnet.attention.pattern.ordering import (
    causal_order,
    hilbert_order,
    inverse_order,
    raster_order,
    sequence_hilbert_order,
)
from lightning_longnet.attention.pattern.pattern import Branch, Pattern, Reach
from lightning_longnet.attention.pattern.sparsity import Sparsity

__all__ = [
    "Branch",
    "Guard",
    "Pattern",
    "Reach",
    "SequencePlan",
    "SequenceShard",
    "Sparsity",
    "attend",
    "balanced_placement",
    "causal_order",
    "explain",
    "hilbert_order",
    "inverse_order",
    "raster_order",
    "sequence_hilbert_order",
    "sequence_plan",
]
