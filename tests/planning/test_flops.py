"""Operations counted by formulas are those of an enumeration of pairs, and those that torch counts as it runs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_longnet import LongNet, LongNetConfig, MultiheadDilatedAttention, Pattern
from lightning_longnet.planning.flops import ModelFlops, attended_pairs

CAUSAL = Pattern.dilated((16, 64), (1, 4), is_causal=True)
PATTERNS = [
    CAUSAL,
    Pattern.dilated((8, 24, 100), (1, 3, 5)),
    Pattern.dilated((8, 24), (1, 3), multiplicity="set", is_causal=True),
    Pattern.dilated((8, 24), (2, 3), head_offsets="blocked", multiplicity="set"),
    Pattern.window(7, is_causal=True) + Pattern.dilated((32,), (4,), is_causal=True),
    Pattern.dense(),
]


@given(st.sampled_from(PATTERNS), st.lists(st.integers(1, 60), min_size=1, max_size=3), st.sampled_from([1, 2, 4]))
def test_pairs_are_those_of_an_enumeration(pattern, documents, kv_heads):
    cuts = [0]
    for length in documents:
        cuts.append(cuts[-1] + length)
    result = attended_pairs(pattern, 4, kv_heads, tuple(cuts))
    masks = [pattern.mask(length, 4, kv_heads) for length in documents]
    assert result.required == sum(int((mask > 0).sum()) for mask in masks)
    if pattern.multiplicity == "multiset":
        assert result.computed == sum(int(mask.sum()) for mask in masks)
    else:
        assert result.computed >= result.required


def test_pairs_that_are_computed_once_are_fewer():
    pattern = Pattern.dilated((256, 512), (1, 1), is_causal=True)
    whole, once = (attended_pairs(pattern, 4, 4, (0, 4096), distinct) for distinct in (0, 1))
    assert whole.required == once.required == once.computed < whole.computed


def counted(model, labels, **options):
    """Of forward and backward, as torch sees them; attention is an operator that it cannot see into."""
    with FlopCounterMode(display=False) as counter:
        loss, _ = model(labels, labels, **options)
        loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("recompute", ["nothing", "all but attention", "everything"])
def test_linear_maps_are_those_that_torch_counts(recompute):
    config = LongNetConfig(CAUSAL, dim=32, layers=2, heads=4, vocab_size=64, recompute=recompute)
    model, labels = LongNet(config), torch.randint(64, (2, 50))
    flops = ModelFlops.of(model)
    assert flops.token.done * labels.numel() == counted(model, labels)
    assert (flops.token.done == flops.token.required) == (recompute == "nothing")


def test_attention_that_is_computed_again_counts_again():
    def attention(recompute):
        model = LongNet(LongNetConfig(CAUSAL, dim=32, layers=3, heads=4, recompute=recompute))
        return ModelFlops.of(model).rows([(0, 50)] * 2)

    plain, kept, again = map(attention, ("nothing", "all but attention", "everything"))
    required, computed = (int(x) for x in plain.pairs)
    mask = CAUSAL.mask(50, 4)
    assert required == 2 * 3 * int((mask > 0).sum())
    assert computed <= 2 * 3 * int(mask.sum())
    assert plain == kept
    assert plain.flops == (12 * 8 * required, 14 * 8 * computed)
    assert again.flops == (12 * 8 * required, 18 * 8 * computed)


def test_frozen_weights_need_no_gradient():
    model = LongNet(LongNetConfig(CAUSAL, dim=32, layers=1, heads=4))
    before = ModelFlops.of(model).token.required
    model.blocks[0].feed_forward.requires_grad_(False)
    inner = sum(
        x.in_features * x.out_features for x in model.blocks[0].feed_forward.modules() if hasattr(x, "in_features")
    )
    assert before - ModelFlops.of(model).token.required == 2 * inner > 0


def test_layers_of_others_are_counted():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    layer.self_attn = MultiheadDilatedAttention(32, 4, batch_first=True, pattern=Pattern.dilated((8,), (2,)))
    model = nn.Sequential(nn.Conv2d(3, 32, 4, 4), layer)
    flops = ModelFlops.of(model)
    assert flops.token.required == 6 * (3 * 4 * 4 * 32 + 4 * 32 * 32 + 2 * 32 * 64)
    assert flops.rows([(0, 16)]).pairs.required == int(Pattern.dilated((8,), (2,)).mask(16, 4).sum())


def test_dropout_keeps_branches_apart():
    pattern = Pattern.dilated([256 << i for i in range(5)], [1 << i for i in range(5)], is_causal=True)
    plain, dropping = (
        ModelFlops.of(LongNet(LongNetConfig(pattern, dim=32, layers=1, heads=4, attention_dropout=p)))
        for p in (0.0, 0.1)
    )
    once, per_branch = (each.attention[0].work((0, 8192), 1).pairs.computed for each in (plain, dropping))
    assert once < per_branch
