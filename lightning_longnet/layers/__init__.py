"""Modules built on `attend`.  They import only torch and the core, and work without Lightning."""

from lightning_longnet.layers.checkpointing import keep_attention
from lightning_longnet.layers.dilated import DilatedAttention
from lightning_longnet.layers.feed_forward import FeedForward
from lightning_longnet.layers.initialization import magneto_gain
from lightning_longnet.layers.multihead import MultiheadDilatedAttention
from lightning_longnet.layers.positions import RotaryPositions
from lightning_longnet.layers.self_attention import DilatedSelfAttention

__all__ = [
    "DilatedAttention",
    "DilatedSelfAttention",
    "FeedForward",
    "MultiheadDilatedAttention",
    "RotaryPositions",
    "keep_attention",
    "magneto_gain",
]
