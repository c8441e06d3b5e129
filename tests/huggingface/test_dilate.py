"""`dilate`: patterns in chosen layers of a model of transformers, beside the equation written out in those layers."""

import pytest
import torch
from architectures import ARCHITECTURES, ROUNDED, largest_differences, model, split_step
from dilated_models import PATTERN, dilated, whole_dilated_step
from tiers import tiered

from lightning_longnet import CausalLMModule, Pattern
from lightning_longnet.huggingface.dilation import dilate
from lightning_longnet.huggingface.models import config_of
from lightning_longnet.huggingface.placements import choose_placement, layer_patterns
from lightning_longnet.huggingface.saving import model_with

QUICK = [("Llama", "packed", (2, "gather")), ("Gemma 2", "padded", (2, "swap"))]
# each architecture once; test_matrix.py has all cases
ONCE = [(name, ("plain", "packed", "padded")[i % 3], (4, "ring")) for i, name in enumerate(ARCHITECTURES)]


@pytest.mark.parametrize(("name", "kind", "way"), tiered({**dict.fromkeys(QUICK), **dict.fromkeys(ONCE)}, QUICK))
def test_parts_of_a_dilated_model_give_what_the_equation_gives(pool, name, kind, way):
    world, exchange = way
    placement = "zigzag" if exchange == "gather" else "contiguous"
    parts = pool.run(world, split_step, name, kind, placement, exchange, None, dilated)
    for each, difference in largest_differences(whole_dilated_step(name, kind), parts, kind).items():
        limit = 1e-6 if name in ROUNDED and ROUNDED[name] in each else 1e-12
        assert difference < limit, f"{each}: {difference:.1e}"


def test_the_pattern_comes_back_with_the_model(tmp_path):
    from transformers import AutoModelForCausalLM

    net = model("Qwen3", "sdpa")
    dense = net(torch.arange(3, 43)[None]).logits
    dilate(net, PATTERN, [1])
    result = net(torch.arange(3, 43)[None]).logits
    assert not torch.equal(result, dense)
    net.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="ring").double()
    assert layer_patterns(again.config) == layer_patterns(net.config) == [Pattern.window(12, is_causal=True), PATTERN]
    torch.testing.assert_close(again(torch.arange(3, 43)[None]).logits, result, rtol=0, atol=1e-12)


def test_other_implementations_do_not_make_a_dilated_model_dense(tmp_path):
    from transformers import AutoModelForCausalLM

    ids = torch.arange(3, 43)[None]
    net = model("Qwen3", "sdpa")
    dilate(net, PATTERN, [1])
    result = net(ids).logits
    for folder in ("first", "again"):
        net.save_pretrained(tmp_path / folder)
        net = AutoModelForCausalLM.from_pretrained(tmp_path / folder).double()  # by "ring", without asking for it
        torch.testing.assert_close(net(ids).logits, result, rtol=0, atol=1e-12)
        net.set_attn_implementation("sdpa")
        with pytest.raises(ValueError, match="must be 'ring' for a model with dilated layers, got 'sdpa'"):
            net(ids)
        with pytest.raises(ValueError, match="must be 'ring' for a model with dilated layers, got 'eager'"):
            CausalLMModule(net, attention="eager")
    with pytest.raises(ValueError, match="must be 'ring' for a model with dilated layers, got 'sdpa'"):
        CausalLMModule(name=str(tmp_path / "again"), attention="sdpa")


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
def test_a_folder_of_a_dilated_model_is_not_loaded_as_dense_in_silence(tmp_path, attention):
    from transformers import AutoModelForCausalLM

    ids = torch.arange(3, 43)[None]
    net = model("Qwen3", "sdpa")
    dense = net(ids).logits
    dilate(net, PATTERN, [1]).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention)
    with pytest.raises(ValueError, match=f"with dilated layers, got '{attention}', which would compute them as dense"):
        loaded(ids)
    loaded.set_attn_implementation("ring")
    assert not torch.allclose(loaded(ids).logits.double(), dense, atol=1e-3)
    if attention == "sdpa":  # for dense layers, as the error says
        plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa", dilated_attention=None)
        torch.testing.assert_close(plain.double()(ids).logits, dense, rtol=0, atol=1e-5)


def test_masks_of_other_models_are_those_of_transformers():
    from transformers import masking_utils

    from lightning_longnet.registration import register

    names, masks = ("sdpa", "eager", "ring"), masking_utils.AttentionMaskInterface()
    before = [masks[name] for name in names]
    assert before[0].__wrapped__ is masking_utils.sdpa_mask
    register()
    assert [masks[name] for name in names] == before  # which are wrapped once


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
    assert reason.endswith("0 of 2 layers are dilated")
    dilate(net, Pattern.dilated((64, 256), (1, 2), is_causal=True))
    placement, reason = choose_placement(net, 4096, 4)
    assert placement == "contiguous"
    assert reason.endswith("2 of 2 layers are dilated")
    mixed = model("Llama", "ring")
    dilate(mixed, Pattern.dilated((64, 256), (1, 2), is_causal=True), [0])
    assert choose_placement(mixed, 4096, 4).placement == "zigzag"  # a dense layer computes most of the pairs
