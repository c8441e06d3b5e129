"""The ancestor's names: each argument acts, or warns, or is refused with its reason; its documented snippets run."""

import re
import warnings
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from tiers import tiered

import lightning_longnet
from lightning_longnet import MultiheadDilatedAttention, Pattern, attach_context, attend, compat
from lightning_longnet.compat import classes
from lightning_longnet.compat import options as arguments

BRANCHES = {"segment_lengths": [8, 16], "dilation_rates": [1, 2]}
PATTERN = Pattern.dilated((8, 16), (1, 2))
ATTENTIONS = [name for name in compat.__all__ if isinstance(getattr(compat, name), type) and "Attention" in name]
MULTIHEAD = [name for name in ATTENTIONS if issubclass(getattr(compat, name), MultiheadDilatedAttention)]
PLAIN = [name for name in ATTENTIONS if name not in MULTIHEAD and name != "RingAttentionConfig"]


def drawn(tokens=24, heads=4, dim=6):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(3, 2, tokens, heads, dim, generator=generator).unbind()


def test_every_name_is_at_the_top_and_in_the_room():
    for name in compat.__all__:
        assert getattr(lightning_longnet, name) is getattr(compat, name)
        assert name in lightning_longnet.__all__
    assert len(PLAIN) == 12
    assert len(MULTIHEAD) == 4


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", [name for name in PLAIN if "Sparse" not in name and "Hilbert" not in name])
def test_plain_classes_attend_to_their_pattern(name, is_causal):
    q, k, v = drawn()
    pattern = Pattern.dilated((8, 16), (1, 2), is_causal=is_causal)
    layer = getattr(compat, name)(**BRANCHES)
    torch.testing.assert_close(layer(q, k, v, is_causal=is_causal), attend(q, k, v, pattern))
    torch.testing.assert_close(layer(q, k, v, is_causal), layer(q, k, v, is_causal=is_causal))


# Every argument of an attention without weights, a value that the class takes, and what of the layer shows that it acts
ACTS = {
    "segment_lengths": ([4, 16], lambda layer: layer.pattern.branches[0].segment_length == 4),
    "dilation_rates": ([2, 4], lambda layer: [b.dilation_rate for b in layer.pattern.branches] == [2, 4]),
    "dropout": (0.25, lambda layer: layer.dropout == 0.25),
    "ring_size": (3, lambda layer: refuses(layer, "ring_size must be the number of ranks .*, 1 here, got 3")),
    "dim": (7, lambda layer: refuses(layer, "query must have dim 7")),
    "head_dim": (7, lambda layer: refuses(layer, "query must have dim 7")),
    "heads": (3, lambda layer: refuses(layer, "query must have heads 3")),
    "num_heads": (3, lambda layer: refuses(layer, "query must have heads 3")),
    "attention_scale": (0.3, lambda layer: has_scale(layer, 0.3)),
    "enable_error_recovery": (True, lambda layer: layer.guard is not None),
    "use_hilbert": (True, lambda layer: layer.ordering == "hilbert"),
}
SPARSE_ACTS = {
    "sparsity_ratio": (0.5, lambda sparsity: sparsity.sparsity_ratio == 0.5),
    "block_size": (2, lambda sparsity: sparsity.block_size == 2),
    "sparse_config": ({"pattern_type": "strided"}, lambda sparsity: sparsity.kind == "strided"),
    "sparsity_config": ({"sparsity_ratio": 0.3}, lambda sparsity: sparsity.sparsity_ratio == 0.3),
    "sparse_pattern_config": (
        compat.SparsePatternConfig(pattern_type="global_local", global_tokens=9, block_size=4),
        lambda sparsity: (sparsity.kind, sparsity.global_tokens, sparsity.block_size) == ("global_local", 9, 4),
    ),
}
ELSEWHERE = {"embed_dim", "apply_hilbert_to_kv"}  # in tests of their own


def refuses(layer, message):
    with pytest.raises(ValueError, match=message):
        layer(*drawn())
    return True


def has_scale(layer, scale):
    q, k, v = drawn()
    torch.testing.assert_close(layer(q, k, v), attend(q, k, v, PATTERN, scale=scale))
    return True


def test_every_argument_that_is_taken_is_tested():
    assert {*ACTS, *SPARSE_ACTS, *ELSEWHERE} == set(arguments._ACTING)


@pytest.mark.parametrize("name", ACTS)
def test_an_argument_acts(name):
    value, shows = ACTS[name]
    with warnings.catch_warnings(action="error"):
        assert shows(compat.RingDilatedAttentionHybrid(**{**BRANCHES, name: value}))
        if name in compat.RingAttentionConfig.__dataclass_fields__:
            config = compat.RingAttentionConfig(**{**BRANCHES, name: value})
            assert shows(compat.RingDilatedAttentionHybrid(config))


@pytest.mark.parametrize("name", SPARSE_ACTS)
def test_an_argument_of_blocks_acts(name):
    value, shows = SPARSE_ACTS[name]
    layer = compat.BlockSparseRingDilatedAttention(**BRANCHES, **{name: value})
    assert all(shows(branch.sparsity) for branch in layer.pattern.branches)
    if name != "block_size":
        with pytest.raises(ValueError, match="RingDilatedAttentionHybrid attends to all of its pattern"):
            compat.RingDilatedAttentionHybrid(**BRANCHES, **{name: value})


def test_blocks_are_said_once_and_by_known_names():
    with pytest.raises(ValueError, match="one of sparse_config, sparsity_ratio must say which blocks"):
        compat.BlockSparseRingDilatedAttention(**BRANCHES, sparse_config={}, sparsity_ratio=0.2)
    with pytest.raises(ValueError, match="SparsePatternConfig takes no 'block_sise': is it 'block_size'"):
        compat.BlockSparseRingDilatedAttention(**BRANCHES, sparse_config={"block_sise": 3})
    with pytest.raises(ValueError, match="sparse_config must be a SparsePatternConfig or its dictionary, got 3"):
        compat.BlockSparseRingDilatedAttention(**BRANCHES, sparse_config=3)
    for name in ("window_size", "local_window_size", "dilation_rates"):
        with pytest.warns(UserWarning, match=f"no use for {name}: as many blocks are kept as sparsity_ratio") as caught:
            compat.BlockSparseRingDilatedAttention(**BRANCHES, sparse_config={name: 256})
        assert caught[0].filename == __file__


VOID = arguments.WITHOUT_MEANING | arguments.WITHOUT_WEIGHTS | {"block_size": "tiles"}


@pytest.mark.parametrize("name", VOID)
def test_an_argument_without_meaning_warns_once_and_changes_nothing(name):
    with pytest.warns(UserWarning, match="has no use for") as caught:
        layer = compat.RingDilatedAttentionHybrid(**BRANCHES, **{name: 1})
    assert len(caught) == 1
    assert str(caught[0].message).startswith(f"RingDilatedAttentionHybrid has no use for {name}: ")
    assert caught[0].filename == __file__
    assert str(layer) == str(compat.RingDilatedAttentionHybrid(**BRANCHES))


def test_all_of_them_are_named_in_one_warning():
    with pytest.warns(UserWarning, match="has no use for") as caught:
        compat.RingDilatedAttentionHybrid(**BRANCHES, enable_memory_pool=True, use_tf32=False)
    assert len(caught) == 1
    assert "no use for enable_memory_pool, use_tf32: there is no memory pool" in str(caught[0].message)


@pytest.mark.parametrize("name", ["use_memory_pool", "mixed_precision", "use_flash", "hilbert_chunk_size"])
def test_a_configuration_warns_where_it_is_used(name):
    config = compat.StandardizedRingConfig(**BRANCHES, **{name: True})
    with pytest.warns(UserWarning, match=f"no use for {name}"):
        compat.RingDilatedAttentionProductionFixed(config)


def test_configurations_are_frozen_and_checked():
    config = compat.StandardizedRingConfig(dim=64, heads=8, **BRANCHES)
    assert config.embed_dim == 512
    assert compat.RingAttentionConfig(embed_dim=512, heads=8, **BRANCHES).dim == 64
    with pytest.raises(FrozenInstanceError):
        config.dim = 3
    for wrong, message in (
        ({"segment_length": [8]}, "RingAttentionConfig takes no 'segment_length': is it 'segment_lengths'"),
        ({**BRANCHES, "dropout": 1.5}, "dropout must be at least 0 and less than 1, got 1.5"),
        ({**BRANCHES, "ring_size": 0}, "ring_size must be a positive integer, got 0"),
        ({"segment_lengths": [8], "dilation_rates": [1, 2]}, "must have the same count"),
        ({"segment_lengths": [8]}, "dilation_rates must be a sequence of integers, got None"),
        ({**BRANCHES, "embed_dim": 10, "heads": 4}, "embed_dim must be heads times dim, got 10, 4 and None"),
    ):
        with pytest.raises(ValueError, match=message):
            compat.RingAttentionConfig(**wrong)


def test_what_has_another_meaning_is_refused():
    ring, q = compat.RingDilatedAttentionHybrid, drawn()
    for given, message in (
        ({"ring_siz": 2, **BRANCHES}, "RingDilatedAttentionHybrid takes no 'ring_siz': is it 'ring_size'"),
        ({"segment_lengths": [8]}, "RingDilatedAttentionHybrid needs dilation_rates"),
        ({"apply_hilbert_to_kv": False, **BRANCHES}, "apply_hilbert_to_kv must be True, got False"),
        ({"embed_dim": 25, "heads": 4, **BRANCHES}, "embed_dim must be heads times dim, got 25, 4 and None"),
        ({"config": compat.RingAttentionConfig(**BRANCHES), **BRANCHES}, "was given segment_lengths twice"),
        ({"heads": 4, "num_heads": 2, **BRANCHES}, "heads and num_heads must be equal, got 4 and 2"),
        ({"dim": 4, "head_dim": 2, **BRANCHES}, "dim and head_dim must be equal, got 4 and 2"),
        ({"config": 3, **BRANCHES}, "config must be a RingAttentionConfig, got 3"),
        ({"use_hilbert": "false", **BRANCHES}, "use_hilbert must be True or False, got 'false'"),
        ({"enable_error_recovery": "no", **BRANCHES}, "enable_error_recovery must be True or False, got 'no'"),
        ({"apply_hilbert_to_kv": 0, **BRANCHES}, "apply_hilbert_to_kv must be True or False, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ring(**given)
    with pytest.raises(ValueError, match="attention_mask must be None"):
        ring(**BRANCHES)(*q, attention_mask=torch.ones(24, 24))
    with pytest.raises(ValueError, match="return_attention_weights must be False"):
        ring(**BRANCHES)(*q, return_attention_weights=True)
    assert ring(embed_dim=24, heads=4, apply_hilbert_to_kv=True, **BRANCHES)(*q).shape == q[0].shape


MULTIHEAD_ACTS = {
    "bias": (False, lambda layer: layer.in_proj_bias is None),
    "kdim": (10, lambda layer: layer.kdim == 10),
    "vdim": (10, lambda layer: layer.vdim == 10),
    "batch_first": (False, lambda layer: not layer.batch_first),
    "device": ("meta", lambda layer: layer.out_proj.weight.is_meta),
    "dtype": (torch.float64, lambda layer: layer.out_proj.weight.dtype == torch.float64),
    "layer_norm": (True, lambda layer: layer.sub_norm is not None),
    "gamma_init": (0.5, lambda layer: layer.gain == 0.5),
}
MULTIHEAD_REFUSED = {
    "add_bias_kv": (True, "add_bias_kv must be False"),
    "add_zero_attn": (True, "add_zero_attn must be False"),
    "layer_norm": ("yes", "layer_norm must be True or False, got 'yes'"),
    "gamma_init": (-1, "gamma_init must be a positive, finite number, got -1"),
    "gate_fn": ("sigmoid", "gate_fn must be None .*, got 'sigmoid'"),
    "attention_scale": (0.3, "attention_scale must be None"),
}


@pytest.mark.parametrize("name", MULTIHEAD)
def test_multihead_classes_are_our_own(name):
    layer = getattr(compat, name)(24, 4, [8, 16], [1, 2], 0.1)
    assert (layer.batch_first, layer.dropout, layer.exchange) == (True, 0.1, None if "Sparse" in name else "ring")
    own = MultiheadDilatedAttention(24, 4, batch_first=True, pattern=layer.pattern)
    own.load_state_dict(layer.state_dict())
    x = torch.randn(2, 30, 24)
    out, weights = layer.eval()(x, x, x, is_causal=True)
    assert weights is None
    torch.testing.assert_close(out, own(x, x, x, is_causal=True)[0])


def test_multihead_arguments_act_or_are_refused_or_warn():
    ring = compat.RingMultiheadDilatedAttentionHybrid
    assert {*MULTIHEAD_ACTS, *MULTIHEAD_REFUSED} == {
        *classes._MULTIHEAD,
        *classes._MAGNETO,
        "gate_fn",
        "attention_scale",
    }
    for name, (value, shows) in MULTIHEAD_ACTS.items():
        assert shows(ring(24, 4, **BRANCHES, **{name: value})), name
    for name, (value, message) in MULTIHEAD_REFUSED.items():
        with pytest.raises(ValueError, match=message):
            ring(24, 4, **BRANCHES, **{name: value})
    for wrong in (24.0, np.int64(24)):
        with pytest.raises(ValueError, match="embed_dim must be a positive integer, got"):
            ring(wrong, 4, **BRANCHES)
    for name in arguments.WITHOUT_GATE:
        with pytest.warns(UserWarning, match=f"no use for {name}: it has no gate"):
            ring(24, 4, **BRANCHES, **{name: 2.0})
    with pytest.raises(ValueError, match="needs embed_dim and num_heads"):
        ring(**BRANCHES)
    with pytest.raises(ValueError, match="ring_size must be the number of ranks"):
        ring(24, 4, **BRANCHES, ring_size=2)(*[torch.zeros(1, 8, 24)] * 3)
    assert ring(dim=6, heads=4, **BRANCHES).embed_dim == 24


def test_magneto_is_a_norm_before_the_output_and_a_gain():
    layer = compat.RingMultiheadDilatedAttentionHybrid(256, 4, **BRANCHES, layer_norm=True, gamma_init=0.5)
    # Xavier: the variance of a weight is that of its gain, divided by the mean of the widths
    weights = [*layer.in_proj_weight.chunk(3), layer.out_proj.weight]
    for weight, gain in zip(weights, (1.0, 1.0, 0.5, 0.5), strict=True):
        assert weight.std().item() == pytest.approx(gain * 256**-0.5, rel=0.02)
        assert weight.abs().max() > 3 * gain * 256**-0.5  # normal: uniform weights end at 1.73 times that
    assert not layer.in_proj_bias.any()
    assert not layer.out_proj.bias.any()
    torch.nn.init.normal_(layer.sub_norm.weight)
    torch.nn.init.normal_(layer.sub_norm.bias)
    x = torch.randn(2, 30, 256)
    q, k, v = (x @ layer.in_proj_weight.T).unflatten(-1, (3, 4, 64)).unbind(2)
    heads = attend(q, k, v, Pattern.dilated((8, 16), (1, 2), is_causal=True)).flatten(2)
    centred = heads - heads.mean(-1, keepdim=True)
    normed = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * layer.sub_norm.weight
    expected = (normed + layer.sub_norm.bias) @ layer.out_proj.weight.T
    torch.testing.assert_close(layer(x, x, x, is_causal=True)[0], expected, rtol=1e-4, atol=1e-4)
    plain = compat.RingMultiheadDilatedAttentionHybrid(256, 4, **BRANCHES)
    assert plain.sub_norm is None
    assert plain.in_proj_weight.abs().max() <= (6 / (4 * 256)) ** 0.5  # torch's own initialisation


LONG = {"segment_lengths": [2048, 4096], "dilation_rates": [1, 2]}
SIZES = {"dim": 64, "heads": 8}
SPARSE = compat.SparsePatternConfig(pattern_type="dilated_sparse", sparsity_ratio=0.1, block_size=128)

# the layers that the ancestor's documents make
DOCUMENTED = {
    "hybrid": lambda: compat.RingDilatedAttentionHybrid(
        **LONG,
        dropout=0.1,
        device="cpu",
        dtype=torch.float32,
        ring_size=1,
        enable_memory_pool=True,
        use_flash_attention=True,
    ),
    "hybrid with MAGNETO": lambda: compat.RingMultiheadDilatedAttentionHybrid(
        embed_dim=768, num_heads=12, **LONG, layer_norm=True, gamma_init=0.5
    ),
    "hybrid with projections": lambda: compat.create_ring_multihead_attention_hybrid(512, 8, [2048, 4096], [1, 2]),
    "hilbert": lambda: compat.create_standardized_ring_attention("hilbert", **SIZES, **LONG, dropout=0.1),
    "hilbert, bare": lambda: compat.create_standardized_ring_attention("hilbert", **LONG),
    "hilbert, cached": lambda: compat.RingDilatedAttentionHilbertOptimized(
        **LONG, dropout=0.0, cache_hilbert_mappings=True, apply_hilbert_to_kv=True, enable_memory_pool=True
    ),
    "hilbert, chunked": lambda: compat.RingDilatedAttentionHilbertOptimized(
        segment_lengths=[2048, 4096, 8192],
        dilation_rates=[1, 2, 4],
        dropout=0.1,
        use_flash_attention=True,
        hilbert_chunk_size=4096,
    ),
    "hilbert, configured": lambda: compat.RingDilatedAttentionHilbertOptimizedFixed(
        compat.StandardizedRingConfig(**SIZES, **LONG, dropout=0.1)
    ),
    "production": lambda: compat.RingDilatedAttentionProduction(compat.RingAttentionConfig(**LONG, dropout=0.1)),
    "production, configured": lambda: compat.RingDilatedAttentionProductionFixed(
        compat.StandardizedRingConfig(**LONG, use_memory_pool=True, use_gradient_checkpointing=True)
    ),
    "block-sparse": lambda: compat.BlockSparseRingDilatedAttention(**LONG, sparsity_ratio=0.1, dropout=0.1),
    "block-sparse, configured": lambda: compat.BlockSparseRingDilatedAttentionFixed(
        compat.StandardizedRingConfig(**SIZES, **LONG, sparsity_ratio=0.1)
    ),
    "block-sparse with projections": lambda: compat.BlockSparseRingMultiheadDilatedAttention(
        embed_dim=768, num_heads=12, **LONG, sparse_config=SPARSE, batch_first=True
    ),
    **{
        f"the factory's {name}": lambda name=name: compat.create_standardized_ring_attention(name, **SIZES, **LONG)
        for name in ("production", "hybrid", "hilbert", "block_sparse", "multihead_hybrid", "block_sparse_multihead")
    },
}


@pytest.mark.filterwarnings("ignore:.* has no use for:UserWarning")
@pytest.mark.parametrize(
    ("tokens", "name"),
    tiered(
        [(n, name) for n in (300, 4500) for name in DOCUMENTED],
        quick=[(300, name) for name in DOCUMENTED],
        full=[(4500, name) for number, name in enumerate(DOCUMENTED) if number % 8],
    ),
)
def test_what_the_ancestors_documents_show_runs_causal_and_not(tokens, name):
    torch.manual_seed(0)
    layer = DOCUMENTED[name]()
    shape = (1, tokens, layer.embed_dim) if isinstance(layer, MultiheadDilatedAttention) else (1, tokens, 8, 64)
    rows = list(torch.randn(3, *shape).unbind())
    later = [torch.cat([x[:, :200], torch.randn_like(x[:, 200:])], 1) for x in rows]

    def out(given, is_causal):
        result = layer(*given, is_causal=is_causal)
        return result[0] if isinstance(result, tuple) else result

    assert out(rows, False).isfinite().all()  # in training, with dropout
    assert out(rows, True).isfinite().all()
    layer.eval()
    assert out(rows, False).shape == shape
    torch.testing.assert_close(out(rows, True)[:, :200], out(later, True)[:, :200])
    if "sparse" not in name:
        assert not torch.allclose(out(rows, False)[:, :200], out(later, False)[:, :200])


def test_the_factory_knows_presets_and_the_ancestors_words():
    made = compat.create_standardized_ring_attention
    assert isinstance(made("hybrid", **BRANCHES), compat.RingDilatedAttentionHybrid)
    assert isinstance(made("multihead_hybrid", dim=6, heads=4, **BRANCHES), compat.RingMultiheadDilatedAttentionHybrid)
    with pytest.raises(ValueError, match=re.escape("got 'prodution': is it 'production'?")):
        made("prodution", **BRANCHES)


def on_ranks(group, ring_size):
    from contexts import made

    layer = compat.RingDilatedAttentionHybrid(**BRANCHES, ring_size=ring_size)
    context = made(group)
    attach_context(layer, context)
    parts = [context.split({"x": x}, {"x": 1})["x"] for x in drawn()]
    try:
        return context.positions_of(parts[0]), layer(*parts)
    except ValueError as error:
        return str(error)


def test_a_ring_size_is_held_to_or_refused_on_all_ranks(pool):
    truth = attend(*drawn(), PATTERN)
    for at, out in pool.run(2, on_ranks, 2):
        torch.testing.assert_close(out, truth[:, at])
    for result in pool.run(2, on_ranks, 4):
        assert "ring_size must be the number of ranks that share a sequence, 2 here, got 4" in result


def test_a_configuration_and_arguments_beside_it_say_each_thing_once():
    ring, config = compat.RingDilatedAttentionHybrid, compat.RingAttentionConfig(**BRANCHES)
    assert ring(config=config, dropout=0.1).dropout == 0.1
    with pytest.raises(ValueError, match="was given dropout twice"):
        ring(config=compat.RingAttentionConfig(**BRANCHES, dropout=0.2), dropout=0.1)
    with pytest.raises(ValueError, match="was given segment_lengths twice"):
        ring([4], [1], config=config)


def wrong_on_the_last(group, name, given):
    from contexts import made

    layer = getattr(compat, name)(**BRANCHES, heads=4)
    context = made(group)
    attach_context(layer, context)
    parts = [context.split({"x": x}, {"x": 1})["x"] for x in drawn(heads=2 if "heads" in given and group.rank() else 4)]
    given = {name: value for name, value in given.items() if name != "heads"}
    with pytest.raises(ValueError, match=r".") as caught:
        layer(*parts, **(given if group.rank() else {}))
    return str(caught.value)


@pytest.mark.parametrize("given", [{"heads": 2}, {"attention_mask": 0}, {"return_attention_weights": True}])
@pytest.mark.parametrize("name", ["RingDilatedAttentionHybrid", "RingDilatedAttentionProduction"])  # the latter guarded
def test_what_is_refused_on_one_rank_is_reported_on_all(pool, name, given):
    other, own = pool.run(2, wrong_on_the_last, name, given)
    assert re.match("query must have heads 4|attention_mask must be|return_attention_weights must be", own)
    assert other.startswith("rank 1 of the group was given arguments that do not fit")


def whole_on_ranks(group):
    from contexts import made

    layer = compat.RingDilatedAttentionHybrid(**BRANCHES, ring_size=2)
    context = made(group)
    attach_context(layer, context)
    with context.whole():
        return layer(*drawn())


def test_a_ring_may_be_given_whole_sequences(pool):
    for result in pool.run(2, whole_on_ranks):
        torch.testing.assert_close(result, attend(*drawn(), PATTERN))
