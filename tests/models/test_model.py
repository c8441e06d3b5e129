"""The LongNet model against a plain composition, and each of its savings against none."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from tiers import tiered

from lightning_longnet import Pattern
from lightning_longnet.models.longnet import LongNet, LongNetConfig

CAUSAL = Pattern.dilated((8, 32, 64), (1, 2, 2), is_causal=True)
SMALL = {"pattern": CAUSAL, "vocab_size": 19, "dim": 16, "layers": 2, "heads": 4, "kv_heads": 2}
DOCUMENTS = torch.arange(50).expand(2, 50) // 20
MASK = (torch.arange(50) < torch.tensor([[50], [41]])).long()


def made(**changes):
    torch.manual_seed(0)
    return LongNet(LongNetConfig(**{**SMALL, **changes})).double()


def drawn():
    torch.manual_seed(1)
    tokens = torch.randint(19, (2, 51))
    return tokens[:, :-1], tokens[:, 1:].where(MASK == 1, -100)


def composed(model, tokens, **conditions):
    """What the docstrings say, in as few words as there are."""
    x = model.embedding(tokens)
    for block in model.blocks:
        x = x + block.attention(block.attention_norm(x), **conditions)
        x = x + block.feed_forward(block.feed_forward_norm(x))
    return model.norm(x) @ model.head.weight.T


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("has_conditions", [False, True])
def test_logits_and_losses_are_those_of_the_composition(tied, has_conditions):
    model, (tokens, labels) = made(tied_embeddings=tied, loss_chunk=7), drawn()
    options, conditions = {}, {}
    if has_conditions:
        options = {"documents": DOCUMENTS, "attention_mask": MASK}
        conditions = {"documents": DOCUMENTS, "key_padding_mask": MASK == 0}
    expected = composed(model, tokens, **conditions)
    torch.testing.assert_close(model(tokens, **options), expected)
    loss, count = model(tokens, labels, **options)
    right = F.cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(loss, right)
    assert count == (labels != -100).sum()
    leaves = list(model.parameters())
    assert len(leaves) == len(dict(model.named_parameters())) == len(set(map(id, leaves)))
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(right, leaves))


@pytest.mark.parametrize(
    "savings",
    [
        {"recompute": "all but attention"},
        {"recompute": "everything"},
        {"offload_activations": True},
        {"feed_forward_chunk": 8, "loss_chunk": 5},
        {"recompute": "all but attention", "offload_activations": True, "feed_forward_chunk": 16},
    ],
)
@pytest.mark.parametrize("activation", tiered(["gelu", "swiglu"], quick=["swiglu"]))
def test_savings_of_memory_change_nothing(savings, activation):
    tokens, labels = drawn()
    results = []
    for changes in ({}, savings):
        model = made(activation=activation, attention_dropout=0.2, **changes).train()
        torch.manual_seed(5)
        loss, _ = model(tokens, labels, documents=DOCUMENTS, attention_mask=MASK)
        results.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    torch.testing.assert_close(results[0], results[1])


def test_a_decoder_sees_nothing_of_what_follows_and_an_encoder_does():
    tokens, _ = drawn()
    later = tokens.clone()
    later[:, 30:] = (later[:, 30:] + 1) % 19
    decoder, encoder = made().eval(), made(pattern=Pattern.dilated((8, 32, 64), (1, 2, 2))).eval()
    assert decoder.config.is_causal
    assert not encoder.config.is_causal
    assert torch.equal(decoder(tokens)[:, :30], decoder(later)[:, :30])
    assert not torch.allclose(encoder(tokens)[:, :30], encoder(later)[:, :30])


def test_layers_may_have_patterns_of_their_own():
    patterns = [CAUSAL, Pattern.window(5, is_causal=True)]
    model = made(pattern=patterns)
    assert [block.attention.pattern for block in model.blocks] == patterns
    tokens, _ = drawn()
    torch.testing.assert_close(model(tokens), composed(model, tokens))
    with pytest.raises(ValueError, match="pattern must be one, or one for each of the 2 layers, got 3"):
        made(pattern=[CAUSAL] * 3)


@pytest.mark.parametrize("pattern", [CAUSAL, [CAUSAL, Pattern.dense()]])
def test_a_configuration_is_plain_values(pattern):
    config = LongNetConfig(**{**SMALL, "pattern": pattern})
    for text in (json.dumps(config.to_dict()), yaml.safe_dump(yaml.safe_load(json.dumps(config.to_dict())))):
        assert LongNetConfig(**yaml.safe_load(text)) == config
    assert hash(config) == hash(LongNetConfig(**config.to_dict()))


@pytest.mark.filterwarnings("error")
def test_it_warns_once_where_nothing_can_cross():
    model = made(pattern=Pattern.dilated((8, 16), (1, 2), is_causal=True)).eval()
    model(torch.zeros(1, 16, dtype=torch.long))
    with pytest.warns(UserWarning, match="Nothing crosses a multiple of 16 tokens, .* make the largest segment_length"):
        model(torch.zeros(1, 40, dtype=torch.long))
    model(torch.zeros(1, 60, dtype=torch.long))
    made(pattern=[CAUSAL, Pattern.dilated((8,), (1,), is_causal=True)])(torch.zeros(1, 60, dtype=torch.long))


def test_weights_begin_as_magneto_says_or_as_they_do_alone():
    from lightning_longnet import magneto_gain

    model = LongNet(LongNetConfig(CAUSAL, dim=256, layers=3, heads=4, hidden_dim=512))
    for block in model.blocks:
        assert block.attention.gain == block.feed_forward.gain == magneto_gain(3)
        assert block.attention.sub_norm is not None
    assert model.embedding.weight.std().item() == pytest.approx(1 / 16, rel=0.05)
    plain = LongNet(LongNetConfig(CAUSAL, dim=64, layers=3, heads=4, sub_norm=False, tied_embeddings=False))
    assert plain.blocks[0].attention.gain == 1
    assert plain.blocks[0].attention.sub_norm is None
    assert plain.head.weight is not plain.embedding.weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers must be a positive integer, got 0"),
        ({"kv_heads": 3}, "kv_heads"),
        ({"recompute": "all"}, "recompute must be one of 'nothing', 'all but attention', 'everything', got 'all'"),
        ({"pattern": "dense"}, "pattern must be a Pattern"),
        ({"dropout": 1.0}, "dropout must be at least 0 and less than 1, got 1.0"),
        ({"activation": "tanh"}, "activation must be one of"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        made(**change)


@pytest.mark.parametrize(
    ("name", "millions"),  # without embeddings: 12 layers x width^2, near enough
    [("125m", 85), ("350m", 302), ("760m", 680), ("2_7b", 2517), ("1b_tokens", 85)],
)
def test_longnets_sizes_are_those_of_their_names(name, millions):
    path = Path(__file__).parents[2] / f"configs/longnet/{name}.yaml"
    options = yaml.safe_load(path.read_text())
    with torch.device("meta"):
        model = LongNet(LongNetConfig(**options["model"]["config"]))
    blocks = sum(x.numel() for x in model.blocks.parameters())
    assert blocks / 1e6 == pytest.approx(millions, rel=0.01)
    tokens = options["data"]["init_args"]["tokens"]
    assert model.config.patterns[0].reach(tokens, model.config.heads).span == tokens, (
        "every token can reach every other"
    )
