"""A model that goes on with a text from its cache computes what it does for the whole text."""

import pytest
import torch
from tiers import tiered

from lightning_longnet import Branch, LongNet, LongNetConfig, Pattern, Sparsity
from lightning_longnet.inference import layer, step_sizes

pytestmark = pytest.mark.filterwarnings("ignore:.*(Nothing crosses|In the branch).*")

DILATED = Pattern.dilated((4, 16), (1, 2), is_causal=True)
KINDS = {
    "rope": {"pattern": DILATED},
    "xpos": {"pattern": DILATED, "rotary": "xpos", "xpos_scale_base": 16.0},
    "xpos without segments": {"pattern": DILATED + Pattern.window(3, is_causal=True), "rotary": "xpos"},
    "a pattern for each layer": {"pattern": [DILATED, Pattern.window(5, is_causal=True), Pattern.dense(True)]},
    "grouped heads, blocked": {
        "pattern": Pattern.dilated((8, 24), (1, 3), True, "blocked", "set"),
        "kv_heads": 2,
        "qk_norm": True,
    },
    "learned positions": {"pattern": DILATED, "rotary": None, "learned_positions": 120},
    "plain": {"pattern": DILATED, "sub_norm": False, "bias": False, "activation": "swiglu"},
    "zero keys": {"pattern": Pattern.dilated((4, 16), (1, 2), True, ragged="zero_keys")},
    "block sparse": {"pattern": Pattern((Branch(32, 2, is_causal=True, sparsity=Sparsity("strided", 2, 0.4)),))},
}


def made(pattern=DILATED, **options):
    torch.manual_seed(1)
    options = {"vocab_size": 19, "dim": 16, "layers": 3, "heads": 4} | options
    model = LongNet(LongNetConfig(pattern, **options)).double().eval()
    for parameter in model.parameters():  # biases and norms besides
        torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def by_steps(model, tokens, sizes, cache=None):
    """The logits of tokens that a model is given in parts of these sizes."""
    cache = model.new_cache(len(tokens)) if cache is None else cache
    parts = [model(part, cache=cache) for part in tokens.split(sizes, 1)]
    return torch.cat(parts, 1), cache


@pytest.mark.parametrize("kind", tiered(KINDS, quick=["xpos", "a pattern for each layer", "zero keys", "block sparse"]))
def test_each_token_is_as_in_the_whole_text(kind):
    model, tokens = made(**KINDS[kind]), torch.randint(19, (2, 100))
    expected = model(tokens)
    for sizes in ([1] * 100, [50, *[3] * 16, 2], [64, 36], [7, 93]):
        result, cache = by_steps(model, tokens, sizes)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-9)
        assert cache.positions == (100, 100)


def test_long_texts_are_computed_in_steps_of_bounded_memory(monkeypatch):
    monkeypatch.setattr(step_sizes, "LONG_STEP", 40)
    monkeypatch.setattr(step_sizes, "SHORT_STEP", 7)
    monkeypatch.setattr(layer, "BRANCH_TOKENS", 4)
    for kind in ("rope", "a pattern for each layer", "xpos without segments"):
        model, tokens = made(**KINDS[kind]), torch.randint(19, (2, 150))
        states, wanted_states = [], []
        expected = model.encode(model.embed(tokens), states=wanted_states)
        cache = model.new_cache(2)
        begun = model.encode(model.embed(tokens[:, :30]), cache=cache)
        result = model.encode(model.embed(tokens[:, 30:]), cache=cache, states=states)
        torch.testing.assert_close(torch.cat([begun, result], 1), expected, rtol=0, atol=1e-9)
        for own, other in zip(states, wanted_states, strict=True):
            torch.testing.assert_close(own, other[:, 30:], rtol=0, atol=1e-9)


@pytest.mark.parametrize("side", tiered(["left", "right"], quick=["left"]))
def test_prompts_of_unequal_length_are_padded_on_either_side(side):
    model, texts = made(), torch.randint(19, (3, 60))
    lengths = (37, 1, 20)
    mask = torch.stack([(torch.arange(37) < n).long() for n in lengths])
    prompts = texts[:, :37].masked_fill(mask == 0, 0)
    if side == "left":
        prompts = torch.stack([row.roll(37 - n) for row, n in zip(prompts, lengths, strict=True)])
        mask = mask.flip(1)
    cache = model.new_cache(3)
    first = model(prompts, attention_mask=mask, cache=cache)
    for b, n in enumerate(lengths):
        torch.testing.assert_close(first[b][mask[b] == 1], model(texts[b : b + 1, :n])[0], rtol=0, atol=1e-9)
    for i in range(20):
        step = torch.stack([texts[b, n + i] for b, n in enumerate(lengths)])[:, None]
        result = model(step, cache=cache)
        for b, n in enumerate(lengths):
            expected = model(texts[b : b + 1, : n + i + 1])[0, -1]
            torch.testing.assert_close(result[b, 0], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["xpos", "sparse without segments"])
def test_documents_go_on_and_begin_within_steps(kind):
    sparse = Pattern((Branch(is_causal=True, sparsity=Sparsity("local_window", 1, 0.4)),))
    model, tokens = made(**KINDS.get(kind, {"pattern": sparse})), torch.randint(19, (2, 60))
    documents = torch.stack([torch.tensor([3] * 17 + [5] * 1 + [6] * 42), torch.tensor([0] * 40 + [2] * 20)])
    expected = model(tokens, documents=documents)
    for sizes in ([1] * 60, [5, 40, 15], [30, 30]):
        cache = model.new_cache(2)
        parts = zip(tokens.split(sizes, 1), documents.split(sizes, 1), strict=True)
        result = torch.cat([model(part, documents=ids, cache=cache) for part, ids in parts], 1)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-9)
        assert cache.positions == (42, 20)


def test_a_text_longer_than_all_segments_is_warned_of():
    model, cache = made(), made().new_cache()
    model(torch.randint(19, (1, 16)), cache=cache)
    with pytest.warns(UserWarning, match="Nothing crosses a multiple of 16 tokens"):
        by_steps(model, torch.randint(19, (1, 64)), [1] * 64, cache)


def test_losses_of_parts_add_up_to_that_of_the_whole():
    model, tokens = made(), torch.randint(19, (2, 61))
    expected = model(tokens[:, :-1], tokens[:, 1:])
    cache = model.new_cache(2)
    parts = zip(tokens[:, :-1].split(25, 1), tokens[:, 1:].split(25, 1), strict=True)
    losses = [model(part, labels, cache=cache) for part, labels in parts]
    torch.testing.assert_close(sum(loss.loss_sum for loss in losses), expected.loss_sum, rtol=0, atol=1e-9)


CURVE = {"pattern": DILATED, "ordering": "hilbert"}
CUSTOM = {"class_path": "lightning_longnet.layers.DilatedSelfAttention"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": Pattern.dilated((4,), (1,))}, "pattern must be causal in every layer for a cache"),
        (CURVE, "ordering must be 'raster' for a cache, got 'hilbert'"),
        ({"attention": CUSTOM}, "attention must be None for a cache"),
    ],
)
def test_models_without_a_cache_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        made(**options).new_cache()


def test_what_a_cache_cannot_serve_is_refused():
    model, tokens = made(), torch.randint(19, (1, 5))
    with pytest.raises(ValueError, match="positions must be None with a cache"):
        model(tokens, positions=torch.arange(5), cache=model.new_cache())
    with pytest.raises(ValueError, match="its rows in a batch: 2, the model's: 1"):
        model(tokens, cache=model.new_cache(2))
    with pytest.raises(ValueError, match="its patterns: "):
        model(tokens, cache=made(Pattern.dense(True)).new_cache())
    with pytest.raises(ValueError, match="its key/value heads and their width: "):
        model(tokens, cache=made(kv_heads=2).new_cache())
    with pytest.raises(ValueError, match="input_ids must hold at least one token"):
        model(tokens[:, :0], cache=model.new_cache())
    with torch.enable_grad(), pytest.raises(ValueError, match="a cache holds no gradients"):
        model(tokens, cache=model.new_cache())
    with pytest.raises(ValueError, match="the model must be in evaluation mode"):
        model.train()(tokens, cache=model.new_cache())
    with pytest.raises(ValueError, match=r"dtype must be one of torch.float64, .*, got torch.int32"):
        model.new_cache(dtype=torch.int32)


def test_a_cache_that_lacks_tokens_in_some_layers_is_refused(monkeypatch):
    model, tokens = made(), torch.randint(19, (1, 5))
    cache = model.new_cache()
    model(tokens, cache=cache)
    with monkeypatch.context() as patch:
        patch.setattr(model.blocks[1], "forward", None)
        with pytest.raises(TypeError):
            model(tokens, cache=cache)
    with pytest.raises(ValueError, match="cache must be whole: a step did not end"):
        model(tokens, cache=cache)


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.int8, 3e-2)])
def test_narrow_rows_are_exact_to_their_rounding(dtype, error):
    model, tokens = made().float(), torch.randint(19, (1, 60))
    expected = model(tokens)
    cache, plain = model.new_cache(dtype=dtype), model.new_cache()
    result = torch.cat([model(part, cache=cache) for part in tokens.split([20, *[1] * 40], 1)], 1)
    torch.cat([model(part, cache=plain) for part in tokens.split([20, *[1] * 40], 1)], 1)
    assert 0 < (result - expected).norm() / expected.norm() < error
    assert cache.nbytes <= plain.nbytes * (0.5 if dtype != torch.int8 else (4 + 4) / 16)


def test_half_models_and_inference_mode(monkeypatch):
    model, tokens = made().bfloat16(), torch.randint(19, (1, 40))
    with torch.inference_mode():
        cache = model.new_cache()
        result = [model(part, cache=cache) for part in tokens[:, :30].split([10, *[1] * 20], 1)]
    result += [model(part, cache=cache) for part in tokens[:, 30:].split(1, 1)]  # outside of it
    expected = model(tokens)
    assert (torch.cat(result, 1) - expected).float().norm() < 0.03 * expected.float().norm()
    assert cache.layers[0].stores[0].data.dtype == torch.bfloat16
