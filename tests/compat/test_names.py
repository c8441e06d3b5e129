"""The ancestor's names and arguments: what is not here is refused with what replaces it."""

import importlib
import re
import warnings

import pytest
import torch

import lightning_longnet
from lightning_longnet import DilatedAttention, LongNet, MultiheadDilatedAttention, attend, compat
from lightning_longnet.ancestor import REPLACEMENTS

BRANCHES = {"segment_lengths": [8, 16], "dilation_rates": [1, 2]}
CLASSES = [
    name
    for name in compat.__all__
    if isinstance(getattr(compat, name), type) and issubclass(getattr(compat, name), torch.nn.Module)
]
MULTIHEAD = [name for name in CLASSES if issubclass(getattr(compat, name), MultiheadDilatedAttention)]

# what `from dilated_attention_pytorch import` and `from dilated_attention_pytorch.core import` have in the versions
# 0.2 and 0.3, and is not one of the names here
PUBLIC = {
    "AdaptiveConfig",
    "AdaptiveSparsityTrainer",
    "BlockSparseAdaptive",
    "BlockSparseOptimized",
    "BlockSparseRingDistributedDilatedAttention",
    "BlockSparseTorchSparse",
    "DilatedTransformerDecoderLayer",
    "DilatedTransformerEncoderLayer",
    "DistributedImprovedDilatedAttention",
    "DistributedImprovedMultiheadDilatedAttention",
    "DistributedRingAttention",
    "DistributedSparseConfig",
    "DistributedSparsePattern",
    "DynamicDilatedAttention",
    "DynamicMultiheadDilatedAttention",
    "DynamicSegmentSelector",
    "EnterpriseDistributedDilatedAttention",
    "HilbertRingAttention",
    "ImportanceScorer",
    "ImprovedDilatedAttention",
    "ImprovedMultiheadDilatedAttention",
    "PatternConfig",
    "PatternOptimizer",
    "PatternQualityAnalyzer",
    "PatternType",
    "RingBlockSparseAttention",
    "RingDilatedAttentionCorrect",
    "RingDilatedAttentionHilbertGPUOptimized",
    "RingDilatedAttentionSDPA",
    "RingDilatedAttentionV2",
    "SegmentSelectionConfig",
    "SparsePatternGenerator",
    "StandardRingAttention",
    "create_adaptive_block_sparse",
    "create_adaptive_sparse_attention",
    "create_block_sparse_attention",
    "create_dilated_attention",
    "create_dynamic_dilated_attention",
    "create_multihead_block_sparse",
    "create_multihead_dilated_attention",
    "create_ring_attention",
    "get_block_sparse_preset",
}


@pytest.mark.parametrize("module", ["lightning_longnet", "lightning_longnet.compat"])
def test_a_name_that_is_not_here_is_refused_with_its_replacement(module):
    assert set(REPLACEMENTS) >= PUBLIC
    for name, (use, reason) in REPLACEMENTS.items():
        here = importlib.import_module(module)
        if name in here.__all__:  # this package has a class of the same name
            continue
        rule = f"{name} of dilated_attention_pytorch is replaced by {use}: {reason}; see MIGRATING.md"
        with pytest.raises(ImportError, match=f"^{re.escape(rule)}$"):
            exec(f"from {module} import {name}")
        assert not hasattr(here, name)
        with pytest.raises(AttributeError, match=f"^{re.escape(rule)}$"):
            getattr(here, name)


def test_no_name_is_both_here_and_replaced():
    assert set(REPLACEMENTS) & set(lightning_longnet.__all__) == {
        "DilatedAttention",
        "LongNet",
        "MultiheadDilatedAttention",
    }
    assert not set(REPLACEMENTS) & set(compat.__all__)
    with pytest.raises(AttributeError, match="no attribute 'RingDilatedAttentionV4': is it 'RingDilatedAttentionV3'"):
        compat.RingDilatedAttentionV4  # noqa: B018


def test_replacements_name_what_there_is():
    for use, _ in REPLACEMENTS.values():
        words = re.findall(r"\b[A-Z]\w+(?:\.\w+)?", use.replace("nn.TransformerEncoderLayer", "").replace("True", ""))
        for word in words:
            result = lightning_longnet
            for part in word.split("."):
                result = getattr(result, part)
        assert words or use == "no argument"


@pytest.mark.parametrize("name", CLASSES)
def test_messages_have_the_name_that_was_imported(name):
    cls = getattr(compat, name)
    sizes = {"embed_dim": 24, "num_heads": 4} if name in MULTIHEAD else {}
    assert cls.__name__ == name
    assert str(cls(**sizes, **BRANCHES)).startswith(f"{name}(")
    with pytest.raises(ValueError, match=f"^{name} takes no 'ring_siz': is it 'ring_size'"):
        cls(**sizes, **BRANCHES, ring_siz=2)
    with pytest.raises(ValueError, match=f"^{name} needs dilation_rates"):
        cls(**sizes, segment_lengths=[8])
    with pytest.warns(UserWarning, match=f"^{name} has no use for use_tf32: "):
        cls(**sizes, **BRANCHES, use_tf32=True)


def test_configurations_are_named_as_they_were_imported():
    for name in ("RingAttentionConfig", "StandardizedRingConfig"):
        with pytest.raises(ValueError, match=f"^{name} takes no 'segment_length': is it 'segment_lengths'"):
            getattr(compat, name)(segment_length=[8])


def test_former_names_of_arguments_are_read_where_they_are_exact():
    q, k, v = torch.randn(3, 2, 24, 4, 6, dtype=torch.float64).unbind()
    with warnings.catch_warnings(action="error"):
        layer = compat.RingDilatedAttentionHybrid(**BRANCHES, softmax_scale=0.3, attention_dropout=0.25)
    assert layer.dropout == 0.25
    torch.testing.assert_close(layer.eval()(q, k, v), attend(q, k, v, layer.pattern, scale=0.3))
    with pytest.raises(ValueError, match="was given dropout twice"):
        compat.RingDilatedAttentionHybrid(**BRANCHES, dropout=0.1, attention_dropout=0.25)
    by_place = compat.BlockSparseRingDilatedAttention([8, 16], [1, 2], compat.SparsePatternConfig(block_size=2))
    assert [branch.sparsity.block_size for branch in by_place.pattern.branches] == [2, 2]
    ring = compat.RingMultiheadDilatedAttentionHybrid
    assert ring(24, 4, **BRANCHES, layer_norm=True, layer_norm_eps=1e-5).sub_norm.eps == 1e-5
    assert not ring(24, 4, **BRANCHES, sequence_first=True).batch_first
    for given, message in (
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps must be 1e-05, that of sub_norm, got 1e-06"),
        ({"sequence_first": True, "batch_first": True}, "given batch_first and sequence_first, which must differ"),
        ({"sequence_first": 1}, "sequence_first must be True or False, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            ring(24, 4, **BRANCHES, **given)
    for name, message in (("batch_first", "tensors are"), ("op", "kernel="), ("use_adaptive_sparsity", "no pattern")):
        with pytest.raises(ValueError, match=f"RingDilatedAttentionV3 takes no '{name}': .*{message}"):
            compat.RingDilatedAttentionV3(**BRANCHES, **{name: True})


def test_a_multihead_layer_takes_its_query_for_key_and_value():
    layer = compat.RingMultiheadDilatedAttentionHybrid(24, 4, **BRANCHES)
    x = torch.randn(2, 30, 24)
    torch.testing.assert_close(layer(x, is_causal=True)[0], layer(x, x, x, is_causal=True)[0])


def test_the_factories_make_the_class_of_the_type():
    made = compat.create_standardized_ring_attention
    assert type(made("hybrid", **BRANCHES)) is compat.RingDilatedAttentionHybrid
    assert type(made("v3", **BRANCHES)) is compat.RingDilatedAttentionV3
    production = compat.create_production_ring_attention([8, 16], [1, 2], dropout=0.1)
    assert type(production) is compat.RingDilatedAttentionProduction
    assert (production.dropout, production.guard is not None) == (0.1, True)


def test_classes_of_the_same_name_refuse_the_ancestors_arguments():
    for make, message in (
        (
            lambda: DilatedAttention(**BRANCHES, softmax_scale=1.0),
            "segment_lengths, dilation_rates, softmax_scale, .*scale",
        ),
        (lambda: DilatedAttention([8], [1]), "lists by place: use pattern=Pattern.dilated"),
        (lambda: MultiheadDilatedAttention(24, 4, [1], [8]), "lists by place: use pattern=Pattern.dilated"),
        (lambda: MultiheadDilatedAttention(24, 4, **BRANCHES, gamma_init=2.0), "gamma_init, .* gain of Multihead"),
        (lambda: LongNet(d_model=24, nhead=4), "d_model, nhead, .* dim, heads of LongNetConfig"),
    ):
        with pytest.raises(TypeError, match=message):
            make()
