"""Exact attention over millions of tokens, for Lightning."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_longnet.aliases import install
from lightning_longnet.ancestor import replacement
from lightning_longnet.registration import register

if TYPE_CHECKING:
    from lightning_longnet.attention import (
        Branch,
        Guard,
        Pattern,
        Reach,
        SequencePlan,
        SequenceShard,
        Sparsity,
        attend,
        balanced_placement,
        causal_order,
        explain,
        hilbert_order,
        inverse_order,
        raster_order,
        sequence_hilbert_order,
        sequence_plan,
    )
    from lightning_longnet.checkpointing.caches import load_cache, save_cache
    from lightning_longnet.checkpointing.checkpoint_io import ManifestCheckpointIO
    from lightning_longnet.checkpointing.checkpoints import Checkpoint, read_checkpoint
    from lightning_longnet.checkpointing.exports import export_model, load_model
    from lightning_longnet.checkpointing.newest import newest_checkpoint
    from lightning_longnet.compat import (
        BlockSparseRingDilatedAttention,
        BlockSparseRingDilatedAttentionFixed,
        BlockSparseRingMultiheadDilatedAttention,
        BlockSparseRingMultiheadDilatedAttentionFixed,
        RingAttentionConfig,
        RingDilatedAttention,
        RingDilatedAttentionHilbertOptimized,
        RingDilatedAttentionHilbertOptimizedFixed,
        RingDilatedAttentionHybrid,
        RingDilatedAttentionHybridFixed,
        RingDilatedAttentionProduction,
        RingDilatedAttentionProductionFixed,
        RingDilatedAttentionTrue,
        RingDilatedAttentionV2Collective,
        RingDilatedAttentionV3,
        RingMultiheadDilatedAttentionHybrid,
        RingMultiheadDilatedAttentionHybridFixed,
        SparsePatternConfig,
        StandardizedRingConfig,
        create_production_ring_attention,
        create_ring_multihead_attention_hybrid,
        create_standardized_ring_attention,
    )
    from lightning_longnet.data import ByteData, HubData, ImageFolderData, LongRangeData, TokenData, TokenFileData
    from lightning_longnet.huggingface.dilation import dilate
    from lightning_longnet.huggingface.placements import choose_placement
    from lightning_longnet.huggingface.support import split_refusals
    from lightning_longnet.inference.cache import DilatedCache
    from lightning_longnet.layers import (
        DilatedAttention,
        DilatedSelfAttention,
        FeedForward,
        MultiheadDilatedAttention,
        RotaryPositions,
        keep_attention,
        magneto_gain,
    )
    from lightning_longnet.layers.loss import chunked_cross_entropy
    from lightning_longnet.layers.presets import available_presets
    from lightning_longnet.models.longnet import LongNet, LongNetConfig
    from lightning_longnet.models.longvit import LongViT, LongViTConfig
    from lightning_longnet.planning.flops import ModelFlops, attended_pairs
    from lightning_longnet.report import write_report
    from lightning_longnet.sequence import (
        SequenceContext,
        SequencePart,
        attach_context,
        sequence_context,
        sequence_mesh,
    )
    from lightning_longnet.sequence import hand_down as hand_down  # the former name of attach_context
    from lightning_longnet.split_check import SplitMismatch, Verdict, check_split
    from lightning_longnet.training.causal_lm_module import CausalLMModule
    from lightning_longnet.training.module import LongNetModule
    from lightning_longnet.training.optimization import decay_groups, warmup_cosine
    from lightning_longnet.training.vision_module import LongViTModule

__version__ = "0.1.0"
__all__ = [
    "BlockSparseRingDilatedAttention",
    "BlockSparseRingDilatedAttentionFixed",
    "BlockSparseRingMultiheadDilatedAttention",
    "BlockSparseRingMultiheadDilatedAttentionFixed",
    "Branch",
    "ByteData",
    "CausalLMModule",
    "Checkpoint",
    "DilatedAttention",
    "DilatedCache",
    "DilatedSelfAttention",
    "FeedForward",
    "Guard",
    "HubData",
    "ImageFolderData",
    "LongNet",
    "LongNetConfig",
    "LongNetModule",
    "LongRangeData",
    "LongViT",
    "LongViTConfig",
    "LongViTModule",
    "ManifestCheckpointIO",
    "ModelFlops",
    "MultiheadDilatedAttention",
    "Pattern",
    "Reach",
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
    "RotaryPositions",
    "SequenceContext",
    "SequencePart",
    "SequencePlan",
    "SequenceShard",
    "SparsePatternConfig",
    "Sparsity",
    "SplitMismatch",
    "StandardizedRingConfig",
    "TokenData",
    "TokenFileData",
    "Verdict",
    "attach_context",
    "attend",
    "attended_pairs",
    "available_presets",
    "balanced_placement",
    "causal_order",
    "check_split",
    "choose_placement",
    "chunked_cross_entropy",
    "create_production_ring_attention",
    "create_ring_multihead_attention_hybrid",
    "create_standardized_ring_attention",
    "decay_groups",
    "dilate",
    "explain",
    "export_model",
    "hilbert_order",
    "inverse_order",
    "keep_attention",
    "load_cache",
    "load_model",
    "magneto_gain",
    "newest_checkpoint",
    "raster_order",
    "read_checkpoint",
    "save_cache",
    "sequence_context",
    "sequence_hilbert_order",
    "sequence_mesh",
    "sequence_plan",
    "split_refusals",
    "warmup_cosine",
    "write_report",
]

# A module is imported at the first use of one of its names: importing torch takes seconds, and `longnet --help` needs
# no torch
_MODULES = {
    "attention": (
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
    ),
    "data": ("ByteData", "HubData", "ImageFolderData", "LongRangeData", "TokenData", "TokenFileData"),
    "huggingface.dilation": ("dilate",),
    "huggingface.placements": ("choose_placement",),
    "huggingface.support": ("split_refusals",),
    "planning.flops": ("ModelFlops", "attended_pairs"),
    "layers": (
        "DilatedAttention",
        "DilatedSelfAttention",
        "FeedForward",
        "MultiheadDilatedAttention",
        "RotaryPositions",
        "keep_attention",
        "magneto_gain",
    ),
    "inference.cache": ("DilatedCache",),
    "layers.loss": ("chunked_cross_entropy",),
    "models.longnet": ("LongNet", "LongNetConfig"),
    "training.causal_lm_module": ("CausalLMModule",),
    "training.module": ("LongNetModule",),
    "sequence": ("SequenceContext", "SequencePart", "attach_context", "hand_down", "sequence_context", "sequence_mesh"),
    "split_check": ("SplitMismatch", "Verdict", "check_split"),
    "training.optimization": ("decay_groups", "warmup_cosine"),
    "checkpointing.caches": ("load_cache", "save_cache"),
    "checkpointing.checkpoint_io": ("ManifestCheckpointIO",),
    "checkpointing.newest": ("newest_checkpoint",),
    "checkpointing.checkpoints": ("Checkpoint", "read_checkpoint"),
    "checkpointing.exports": ("export_model", "load_model"),
    "models.longvit": ("LongViT", "LongViTConfig"),
    "training.vision_module": ("LongViTModule",),
    "report": ("write_report",),
    "layers.presets": ("available_presets",),
    "compat": (
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
    ),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            value = getattr(import_module(f"lightning_longnet.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(replacement(name) or f"module 'lightning_longnet' has no attribute {name!r}", name=name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


install()
register()
