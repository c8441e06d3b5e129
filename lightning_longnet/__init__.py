"""Exact attention over millions of tokens, for Lightning."""

from lightning_longnet.attention import (
    Branch,
    Pattern,
    Reach,
    SequencePlan,
    SequenceShard,
    attend,
    explain,
    sequence_plan,
)
from lightning_longnet.layers import (
    DilatedSelfAttention,
    FeedForward,
    MultiheadDilatedAttention,
    RotaryPositions,
    keep_attention,
    magneto_gain,
)
from lightning_longnet.registration import register
from lightning_longnet.sequence import SequenceContext, hand_down, sequence_context, sequence_mesh

__version__ = "0.1.0"
__all__ = [
    "Branch",
    "DilatedSelfAttention",
    "FeedForward",
    "MultiheadDilatedAttention",
    "Pattern",
    "Reach",
    "RotaryPositions",
    "SequenceContext",
    "SequencePlan",
    "SequenceShard",
    "attend",
    "explain",
    "hand_down",
    "keep_attention",
    "magneto_gain",
    "sequence_context",
    "sequence_mesh",
    "sequence_plan",
]

register()
