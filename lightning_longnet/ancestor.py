"""The names of dilated_attention_pytorch, the ancestor of this package, that are not here, each with its replacement.

The names that are here are in `lightning_longnet.compat`.  A name is here if one of the layers of this package has its
arguments; the names below stand for another function, or for parts that this package does without.
"""

from __future__ import annotations

_PATTERN = "Pattern.dilated(segment_lengths, dilation_rates)"
_BLOCKS = "DilatedAttention(Pattern.block_sparse(kind, block_size, sparsity_ratio, within=pattern))"

# a replacement, the reason that there is no class or function of the same name, and the names that it replaces
_GROUPS = (
    (
        f"DilatedAttention({_PATTERN}, dropout=..., scale=...)",
        "the ancestor divides the heads among the branches, here every head has every branch under one softmax",
        "DilatedAttention ImprovedDilatedAttention ImprovedDilatedAttentionV2 DistributedDilatedAttention "
        "DistributedImprovedDilatedAttention DilatedAttentionConfig BaseDilatedAttention create_dilated_attention "
        "create_improved_dilated_attention",
    ),
    (
        f"MultiheadDilatedAttention(embed_dim, num_heads, pattern={_PATTERN}, batch_first=True, sub_norm=True)",
        "the ancestor divides the heads among the branches, here every head has every branch under one softmax",
        "MultiheadDilatedAttention ImprovedMultiheadDilatedAttention "
        "DistributedImprovedMultiheadDilatedAttention MultiheadConfig BaseMultiheadDilatedAttention "
        "create_multihead_dilated_attention create_improved_multihead_dilated_attention",
    ),
    (
        f"DilatedAttention({_PATTERN}), with a pattern for the lengths of the data",
        "segment lengths do not depend on the length of a batch here",
        "DynamicDilatedAttention DynamicMultiheadDilatedAttention DynamicSegmentSelector SegmentSelectionConfig "
        "create_dynamic_dilated_attention",
    ),
    (
        'DilatedAttention(pattern, exchange="ring")',
        "one layer has all exchanges, and RingSequenceParallelStrategy or attach_context gives it its ranks",
        "StandardRingAttention DistributedRingAttention RingAttentionWrapper RingDilatedAttentionCorrect "
        "RingDilatedAttentionSDPA RingDilatedAttentionMemoryEfficient RingDilatedAttentionFixedSimple "
        "RingDilatedAttentionV2 RingDilatedAttentionV2Flash RingDilatedAttentionHybridOptimized "
        "RingDilatedAttentionHybridOptimizedV2 RingDistributedDilatedAttention RingAdvancedDistributedDilatedAttention "
        "EnterpriseDistributedDilatedAttention TrueRingDilatedAttention SimulatedRingDilatedAttention "
        "create_ring_attention create_ring_attention_from_preset",
    ),
    (
        "RingMultiheadDilatedAttentionHybrid(embed_dim, num_heads, segment_lengths, dilation_rates, layer_norm=True)",
        "its versions differ in what layer_norm norms",
        "RingMultiheadDilatedAttention",
    ),
    (
        'DilatedAttention(pattern, ordering="hilbert")',
        "each of these classes orders other tokens along its curve",
        "HilbertRingAttention RingDilatedAttentionHilbertCore RingDilatedAttentionHilbertProper "
        "RingDilatedAttentionHilbertGPUOptimized RingDilatedAttentionHybridHilbert",
    ),
    (
        'DilatedAttention(pattern, exchange="swap")',
        "one layer has all exchanges, and RingSequenceParallelStrategy or attach_context gives it its ranks",
        "HeadParallelDilatedAttention HeadParallelDilatedAttentionOptimized",
    ),
    (
        _BLOCKS,
        "sparsity_ratio is the share of the blocks that is kept, and in some of these names the share that is left out",
        "RingBlockSparseAttention BlockSparseRingAttention BlockSparseRingDistributedDilatedAttention "
        "BlockSparseOptimized BlockSparseTorchSparse BlockSparseHierarchical HierarchicalConfig SparseAttentionConfig "
        "DistributedSparseConfig DistributedSparsePattern PatternConfig PatternType SparsePatternGenerator "
        "create_block_sparse_attention create_multihead_block_sparse create_hierarchical_attention "
        "get_block_sparse_preset get_hierarchical_presets",
    ),
    (
        _BLOCKS,
        "no pattern is learned here",
        "BlockSparseAdaptive AdaptiveConfig AdaptiveSparsityTrainer ImportanceScorer PatternOptimizer "
        "PatternQualityAnalyzer create_adaptive_block_sparse create_adaptive_sparse_attention",
    ),
    (
        f"LongNet(LongNetConfig({_PATTERN}, dim=..., heads=..., layers=...))",
        "the ancestor's model has an encoder and a decoder, this one a stack of blocks",
        "LongNet LongNetLM",
    ),
    (
        "MultiheadDilatedAttention as the self_attn of torch's nn.TransformerEncoderLayer",
        "layers of torch take it in place of their attention",
        "DilatedTransformerEncoderLayer DilatedTransformerDecoderLayer",
    ),
    (
        "no argument",
        "torch's allocator reuses buffers, and plans are cached",
        "MemoryPool MemoryPoolConfig SimplifiedMemoryPool UnifiedMemoryPool PatternCache DilatedPatternCache "
        "get_global_memory_pool reset_global_memory_pool get_global_pattern_cache clear_global_cache",
    ),
    (
        "SequenceContext.split and SequenceContext.attend",
        "the rows that a pattern selects travel between ranks, not pieces of the sequence",
        "all_ring_pass split_by_rank RingAttentionFunction StableRingAccumulator memory_efficient_ring_attention",
    ),
    (
        'LongNetConfig(attention={"class_path": ...})',
        "a class is found by its path",
        "register_attention register_multihead_attention",
    ),
)
REPLACEMENTS = {name: (use, reason) for use, reason, names in _GROUPS for name in names.split()}


def replacement(name: str) -> str:
    """Return what replaces a name of the ancestor that is not here, as the text of an error; "" for other names."""
    if name not in REPLACEMENTS:
        return ""
    use, reason = REPLACEMENTS[name]
    return f"{name} of dilated_attention_pytorch is replaced by {use}: {reason}; see MIGRATING.md"
