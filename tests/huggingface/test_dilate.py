"""`dilate`: patterns in chosen layers of a model of transformers, beside the equation written out in those layers."""

from itertools import product

import architectures
import pytest
import torch
from architectures import ARCHITECTURES, ROUNDED, batch, largest_differences, model, split_step, whole_step
from tiers import tiered

from lightning_longnet import CausalLMModule, Pattern
from lightning_longnet.huggingface.dilation import dilate
from lightning_longnet.huggingface.models import config_of
from lightning_longnet.huggingface.placements import choose_placement, layer_patterns
from lightning_longnet.huggingface.saving import model_with

PATTERN = Pattern.dilated((4, 16, 64), (1, 2, 4), is_causal=True)
NAMES = [name for name in ARCHITECTURES if name != "Llama 4"]  # its chunks count from the padding as patterns do


def dilated(net):
    dilate(net, PATTERN, [1])


def documents_of(kind):
    """Return the id of each token's document; padding at the beginning of a row is one of its own."""
    tensors = batch(kind)
    if kind == "padded":
        return (tensors["attention_mask"].cumsum(1) > 0).long()
    return (torch.arange(architectures.LENGTH) - tensors["position_ids"]).expand(len(tensors["input_ids"]), -1)


def weighted_reference(kind):
    """Return attention that counts each pair as often as the pattern shows it, in layer 1, and is plain in others."""
    ids, padding = documents_of(kind), batch(kind).get("attention_mask")
    counts = {}

    def attention(module, query, key, value, mask, scaling=None, softcap=None, s_aux=None, **_):
        if module.layer_idx != 1:
            return architectures.plain_attention(module, query, key, value, mask, scaling, softcap, s_aux)
        heads, kv_heads = query.shape[1], key.shape[1]
        if heads not in counts:
            counts[heads] = torch.stack([packed_mask(row, heads, kv_heads) for row in ids])
        seen = counts[heads].double()
        if padding is not None:
            seen = seen * padding[:, None, None, :]
        key, value = (x.repeat_interleave(heads // kv_heads, 1) for x in (key, value))
        scores = query @ key.mT * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = seen * (scores - 20).exp()  # of scores that are small, so that no exponential overflows
        total = weights.sum(-1, keepdim=True)
        if s_aux is not None:
            total = total + (s_aux[:, None, None] - 20).exp()
        return (weights @ value / total.masked_fill(total == 0, 1)).transpose(1, 2), None

    return attention


def packed_mask(ids, heads, kv_heads):
    """Return how often each pair of a row counts, (H, N, N): each document alone."""
    lengths = ids.unique_consecutive(return_counts=True)[1].tolist()
    counts, at = torch.zeros(heads, len(ids), len(ids)), 0
    for n in lengths:
        counts[:, at : at + n, at : at + n] = PATTERN.mask(n, heads, kv_heads)
        at += n
    return counts


def reference(name, kind):
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import AttentionMaskInterface as Masks

    architectures.register_plain()
    AttentionInterface.register("weighted", weighted_reference(kind))
    AttentionMaskInterface.register("weighted", Masks()["plain"])
    return whole_step(name, kind, "weighted")


CASES = list(product(NAMES, ("plain", "packed", "padded"), ((2, "gather"), (2, "swap"), (4, "ring"))))
QUICK = [("Llama", "packed", (2, "gather")), ("gpt-oss", "plain", (4, "ring")), ("Gemma 2", "padded", (2, "swap"))]
SOME = [(name, ("plain", "packed", "padded")[i % 3], (4, "ring")) for i, name in enumerate(NAMES) if i % 2]


@pytest.mark.parametrize(
    ("name", "kind", "way"), tiered(CASES, QUICK, [case for case in CASES if case not in (*QUICK, *SOME)])
)
def test_parts_of_a_dilated_model_give_what_the_equation_gives(pool, name, kind, way):
    world, exchange = way
    placement = "zigzag" if exchange == "gather" else "contiguous"
    parts = pool.run(world, split_step, name, kind, placement, exchange, None, dilated)
    for each, difference in largest_differences(reference(name, kind), parts, kind).items():
        limit = 1e-6 if name in ROUNDED and ROUNDED[name] in each else 1e-12
        assert difference < limit, f"{each}: {difference:.1e}"


def test_the_pattern_comes_back_with_the_model(tmp_path):
    from transformers import AutoModelForCausalLM

    net = model("Qwen3", "sdpa")
    dense = net(torch.arange(3, 43)[None]).logits
    dilate(net, PATTERN, [1])
    found = net(torch.arange(3, 43)[None]).logits
    assert not torch.equal(found, dense)
    net.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="ring").double()
    assert layer_patterns(again) == layer_patterns(net) == [Pattern.window(12, is_causal=True), PATTERN]
    torch.testing.assert_close(again(torch.arange(3, 43)[None]).logits, found, rtol=0, atol=1e-12)


def test_other_implementations_do_not_make_a_dilated_model_dense(tmp_path):
    from transformers import AutoModelForCausalLM

    ids = torch.arange(3, 43)[None]
    net = model("Qwen3", "sdpa")
    dilate(net, PATTERN, [1])
    found = net(ids).logits
    for folder in ("first", "again"):
        net.save_pretrained(tmp_path / folder)
        net = AutoModelForCausalLM.from_pretrained(tmp_path / folder).double()  # by "ring", without asking for it
        torch.testing.assert_close(net(ids).logits, found, rtol=0, atol=1e-12)
        net.set_attn_implementation("sdpa")
        with pytest.raises(ValueError, match="must be 'ring' for a model with dilated layers, got 'sdpa'"):
            net(ids)
        with pytest.raises(ValueError, match="must be 'ring' for a model with dilated layers, got 'eager'"):
            CausalLMModule(net, attention="eager")
    with pytest.raises(ValueError, match="must be 'ring' for a model with dilated layers, got 'sdpa'"):
        CausalLMModule(name=str(tmp_path / "again"), attention="sdpa")


def test_an_exported_checkpoint_of_a_dilated_model_loads_as_ring(tmp_path):
    from transformers import AutoModelForCausalLM

    net = dilate(model("Qwen3", "ring"), PATTERN, [1]).eval()
    model_with(config_of(net.config.to_dict()), net.state_dict()).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "ring"
    ids = torch.arange(3, 43)[None]
    torch.testing.assert_close(again.double()(ids).logits, net(ids).logits, rtol=0, atol=1e-6)


def test_layers_and_patterns_that_do_not_fit_are_refused():
    net = model("Llama", "ring")
    with pytest.raises(ValueError, match="pattern must be a causal Pattern"):
        dilate(net, Pattern.dilated((4,), (1,)))
    with pytest.raises(ValueError, match="layers must be numbers of layers, 0 to 1, got 2"):
        dilate(net, PATTERN, [2])


def test_the_placement_serves_all_layers_and_says_why():
    net = model("Llama", "ring")
    placement, reason = choose_placement(net, 4096, 4)
    assert placement == "zigzag"
    assert "of 2 layers, 0 are dilated" in reason
    assert "the pairs decide" in reason
    dilate(net, Pattern.dilated((64, 256), (1, 2), is_causal=True))
    placement, reason = choose_placement(net, 4096, 4)
    assert placement == "contiguous"
    assert "of 2 layers, 2 are dilated" in reason
    assert "the bytes decide" in reason
    mixed = model("Llama", "ring")
    dilate(mixed, Pattern.dilated((64, 256), (1, 2), is_causal=True), [0])
    assert choose_placement(mixed, 4096, 4).placement == "zigzag"  # a dense layer computes most of the pairs
