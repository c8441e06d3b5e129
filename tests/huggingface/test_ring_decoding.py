"""Generation with `attn_implementation="ring"`, on one process: new tokens against a cache of keys."""

import pytest
import torch
from architectures import ARCHITECTURES, model, register_plain
from tiers import tiered

from lightning_longnet import Pattern
from lightning_longnet.huggingface.dilation import dilate

CACHES = ("dynamic", "none")


def generated(net, cache, is_padded):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 61, (2, 20), generator=generator)
    mask = torch.ones(2, 20, dtype=torch.long)
    if is_padded:
        mask[0, :6] = 0
    options = {"use_cache": cache != "none"}
    if cache == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}
    net.generation_config.eos_token_id = None
    out = net.eval().generate(
        ids,
        attention_mask=mask,
        max_new_tokens=12,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize(
    ("name", "cache", "is_padded"),
    tiered(
        [(name, cache, p) for name in ARCHITECTURES for cache in CACHES for p in (False, True)],
        [("Llama", "dynamic", True), ("Mistral", "none", False), ("gpt-oss", "dynamic", False)],
        covers=1,
    ),
)
def test_generates_what_transformers_generates(name, cache, is_padded):
    register_plain()
    truth, true_logits = generated(model(name, ARCHITECTURES[name][2]), cache, is_padded)
    result, logits = generated(model(name, "ring"), cache, is_padded)
    assert torch.equal(result, truth)
    torch.testing.assert_close(logits, true_logits, rtol=0, atol=1e-5)  # generate rounds logits to float32


@pytest.mark.parametrize("is_padded", tiered([False, True], quick=[False]))
@pytest.mark.parametrize("name", tiered(["Llama", "Gemma 3"], ["Llama"]))
def test_a_dilated_layer_generates_the_same_with_a_cache(name, is_padded):
    pattern = Pattern.dilated((4, 16), (1, 2), is_causal=True)
    results = [generated(dilate(model(name, "ring"), pattern, [1]), cache, is_padded) for cache in ("dynamic", "none")]
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=1e-6)
    dense, _ = generated(model(name, "ring"), "dynamic", is_padded)
    assert not torch.equal(results[0][0], dense)


def test_a_static_cache_is_refused():
    with pytest.raises(ValueError, match="a static cache is not served"):
        generated(model("Mistral", "ring"), "static", False)


def test_dropout_against_a_cache_is_refused():
    net = model("Llama", "ring", attention_dropout=0.1)
    cache = net(torch.arange(3, 9)[None], use_cache=True).past_key_values
    net.train()
    with pytest.raises(ValueError, match="attention dropout must be 0 where keys come from a cache"):
        net(torch.tensor([[5]]), past_key_values=cache)


@pytest.mark.parametrize("pads", [1, 3])
def test_padding_on_the_left_may_have_negative_positions(pads):
    """As `attention_mask.cumsum(1) - 1` has: position 0 follows -1, but the first token begins a document."""
    net = model("Llama", "ring")
    dilate(net, Pattern.dilated((4, 8), (1, 2), is_causal=True))
    ids = torch.randint(3, 61, (1, 13), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(1, 13 + pads, dtype=torch.long)
    mask[:, :pads] = 0
    with torch.no_grad():
        expected = net(ids).logits
        result = net(
            torch.cat((ids[:, :1].expand(1, pads), ids), 1), attention_mask=mask, position_ids=mask.cumsum(1) - 1
        )
    torch.testing.assert_close(result.logits[:, pads:], expected, rtol=1e-10, atol=1e-10)
