"""Inside torch's nn.TransformerEncoder and its layers: what is trained is what is evaluated."""

import copy

import pytest
import torch
from masks import causal_mask
from tiers import tiered
from torch import nn

from lightning_longnet import MultiheadDilatedAttention, Pattern

PATTERN = Pattern.dilated((4, 16), (1, 2))


def encoder(when, norm_first=False, batch_first=True, **settings):
    """An encoder of torch with our attention, put in before the encoder is built, or into each of its layers."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, norm_first=norm_first, batch_first=batch_first)

    def ours():
        return MultiheadDilatedAttention(16, 4, batch_first=batch_first, pattern=PATTERN, **settings)

    if when == "before":
        layer.self_attn = ours()
    result = nn.TransformerEncoder(layer, 2)
    if when == "after":
        for each in result.layers:
            each.self_attn = ours()
    return result


@pytest.fixture
def no_fast_path(monkeypatch):
    def refused(*_, **__):
        raise AssertionError("torch's own operator was called: the pattern is bypassed")

    for name in ("_transformer_encoder_layer_fwd", "_native_multi_head_attention"):
        monkeypatch.setattr(torch, name, refused)


# that torch's nested tensors will change, and that the encoder uses none where ours is there when it is built
IGNORED = pytest.mark.filterwarnings("ignore:.*nested.tensor:UserWarning")


@IGNORED
@pytest.mark.usefixtures("no_fast_path")
@pytest.mark.parametrize("mask", [None, "left aligned", "scattered"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("batch_first", tiered([False, True], quick=[True]))
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_encoder_computes_in_evaluation_what_it_trains(when, norm_first, batch_first, causal, mask):
    model, x = encoder(when, norm_first, batch_first), torch.randn(3, 10, 16)
    hidden = None
    if mask is not None:
        kept = torch.tensor([10, 7, 1])[:, None] > torch.arange(10)
        hidden = ~kept if mask == "left aligned" else torch.rand(3, 10) > 0.6
    kept = torch.ones(3, 10, dtype=torch.bool) if hidden is None else ~hidden
    words = {"src_key_padding_mask": hidden}
    if causal:
        words["mask"] = causal_mask(10)

    def outcome():
        out = model(x if batch_first else x.transpose(0, 1), **words)
        return out if batch_first else out.transpose(0, 1)

    truth = outcome()
    with torch.no_grad():
        assert torch.equal(outcome(), truth)
    model.eval()
    torch.testing.assert_close(outcome(), truth)
    with torch.no_grad():  # here torch would make nested tensors, whose padding comes back as 0
        torch.testing.assert_close(outcome()[kept], truth[kept])


@IGNORED
@pytest.mark.usefixtures("no_fast_path")
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_padded_batch_in_evaluation_is_nested_and_right(is_causal):
    """Built of torch's layers, the encoder packs a padded batch; each sequence comes out as it does alone."""
    model, x, nested = encoder("after").eval(), torch.randn(3, 10, 16), []
    model.layers[0].self_attn.register_forward_pre_hook(lambda _, arguments: nested.append(arguments[0].is_nested))
    hidden = torch.tensor([10, 7, 1])[:, None] <= torch.arange(10)
    with torch.no_grad():
        out = model(x, src_key_padding_mask=hidden, is_causal=is_causal)
        assert nested == [True]
        for b, length in enumerate((10, 7, 1)):
            torch.testing.assert_close(out[b : b + 1, :length], model(x[b : b + 1, :length], is_causal=is_causal))


@IGNORED
def test_torchs_encoder_would_bypass_a_layer_that_says_otherwise(no_fast_path):
    """The attribute is what keeps torch's operator away: this test fails when it no longer does."""
    model = encoder("after").eval()
    for layer in model.layers:
        layer.self_attn._qkv_same_embed_dim = True
    with torch.no_grad(), pytest.raises((AssertionError, AttributeError)):
        model(torch.randn(2, 10, 16))


@IGNORED
@pytest.mark.usefixtures("no_fast_path")
@pytest.mark.parametrize("training", [False, True])
def test_an_encoder_layer_with_a_causal_mask_is_the_causal_pattern(training):
    layer, x = encoder("after").layers[0].train(training), torch.randn(2, 10, 16)
    causal = copy.deepcopy(layer)
    causal.self_attn.pattern = causal.self_attn.causal_pattern
    with torch.no_grad():
        truth = causal(x)
        assert not torch.allclose(layer(x), truth)
        for mask in (None, causal_mask(10), causal_mask(10, x.dtype), torch.zeros(10, 10)):
            assert torch.equal(layer(x, mask, is_causal=True), truth)
            if mask is not None and mask.any():
                assert torch.equal(layer(x, mask), truth)


def test_a_decoders_self_attention():
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    x, memory = torch.randn(2, 10, 16), torch.randn(2, 4, 16)
    truth = nn.TransformerDecoder(layer, 2)(x, memory, tgt_mask=causal_mask(10, torch.float32))
    layer.self_attn, theirs = MultiheadDilatedAttention(16, 4, batch_first=True), layer.self_attn
    layer.self_attn.load_state_dict(theirs.state_dict())
    result = nn.TransformerDecoder(layer, 2)(x, memory, tgt_mask=causal_mask(10, torch.float32))
    torch.testing.assert_close(result, truth)
