"""Exact attention over millions of tokens, for Lightning."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_longnet.registration import register

if TYPE_CHECKING:
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
    from lightning_longnet.loss import chunked_cross_entropy
    from lightning_longnet.model import LongNet, LongNetConfig
    from lightning_longnet.sequence import SequenceContext, hand_down, sequence_context, sequence_mesh

__version__ = "0.1.0"
__all__ = [
    "Branch",
    "DilatedSelfAttention",
    "FeedForward",
    "LongNet",
    "LongNetConfig",
    "MultiheadDilatedAttention",
    "Pattern",
    "Reach",
    "RotaryPositions",
    "SequenceContext",
    "SequencePlan",
    "SequenceShard",
    "attend",
    "chunked_cross_entropy",
    "explain",
    "hand_down",
    "keep_attention",
    "magneto_gain",
    "sequence_context",
    "sequence_mesh",
    "sequence_plan",
]

# Loaded when first asked for: torch takes seconds, and a command line's help needs none of it
_ROOMS = {
    "attention": (
        "Branch",
        "Pattern",
        "Reach",
        "SequencePlan",
        "SequenceShard",
        "attend",
        "explain",
        "sequence_plan",
    ),
    "layers": (
        "DilatedSelfAttention",
        "FeedForward",
        "MultiheadDilatedAttention",
        "RotaryPositions",
        "keep_attention",
        "magneto_gain",
    ),
    "loss": ("chunked_cross_entropy",),
    "model": ("LongNet", "LongNetConfig"),
    "sequence": ("SequenceContext", "hand_down", "sequence_context", "sequence_mesh"),
}


def __getattr__(name: str) -> Any:
    for room, names in _ROOMS.items():
        if name in names:
            found = getattr(import_module(f"lightning_longnet.{room}"), name)
            globals()[name] = found
            return found
    raise AttributeError(f"module 'lightning_longnet' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register()
