"""What `attn_implementation="ring"` cannot express, and mistakes of users: each one is an error that says why."""

import pytest
import torch
from architectures import LENGTH, SMALL, batch, model, split_step
from contexts import made

from lightning_longnet import attach_context
from lightning_longnet.huggingface.masks import ring_mask
from lightning_longnet.huggingface.support import split_refusals

IDS = torch.arange(3, 23)[None]


def test_a_mask_of_all_pairs_is_refused():
    with pytest.raises(
        ValueError, match=r"attention_mask must be \(batch, tokens\), 0 where padding is, .*1, 1, 20, 20"
    ):
        model("Llama", "ring")(IDS, attention_mask=torch.zeros(1, 1, 20, 20))


def test_masks_that_no_pattern_expresses_are_refused_by_name():
    from transformers import masking_utils

    def prefix(batch_idx, head_idx, q_idx, kv_idx):
        return kv_idx < 3

    net = model("Llama", "ring")
    arguments = {"config": net.config, "inputs_embeds": torch.zeros(1, 9, 4), "attention_mask": None}
    with pytest.raises(ValueError, match="cannot express the mask 'or_masks'"):
        masking_utils.create_causal_mask(**arguments, past_key_values=None, or_mask_function=prefix)
    with pytest.raises(ValueError, match=r"cannot express the mask '.*prefix'"):
        masking_utils.create_causal_mask(**arguments, past_key_values=None, and_mask_function=prefix)
    window, chunk = masking_utils.sliding_window_overlay(3), masking_utils.chunked_overlay(4, torch.zeros(1))
    both = masking_utils.and_masks(masking_utils.causal_mask_function, window, chunk)
    with pytest.raises(ValueError, match="chunked attention that is causal and has no window"):
        ring_mask(1, 9, 9, mask_function=both)


def test_bidirectional_masks_are_patterns():
    from transformers import masking_utils

    for size in (None, 3):
        function = masking_utils.bidirectional_mask_function
        if size is not None:
            function = masking_utils.sliding_window_bidirectional_mask_function(size)
        mask = ring_mask(1, 9, 9, mask_function=function)
        assert torch.equal(mask.pattern.mask(9, 1)[0].bool(), mask.visible()[0, 0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_attentions": True}, "output_attentions"),
        ({"position_bias": torch.zeros(1)}, "position_bias is no argument that attn_implementation='ring' knows"),
    ],
)
def test_arguments_that_change_the_result_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        model("Llama", "ring")(IDS, **options)


def test_a_window_that_is_not_the_masks_is_refused():
    net = model("Mistral", "ring")
    net.model.layers[0].self_attn.config = model("Mistral", "ring", sliding_window=7).config
    with pytest.raises(ValueError, match="sliding_window of MistralAttention, 7, must be that of its mask, 12"):
        net(IDS)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("Llama", {}, None),
        ("gpt-oss", {}, None),
        ("Llama 4", {"attn_temperature_tuning": True}, "set attn_temperature_tuning=False"),
        ("Llama 4", {}, None),
        ("Mixtral", {"output_router_logits": True}, "output_router_logits must be False"),
        (
            "Llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type 'dynamic'",
        ),
    ],
)
def test_what_depends_on_other_tokens_is_named(name, changes, message):
    reasons = split_refusals(model(name, "ring", **changes))
    assert len(reasons) == (message is not None)
    assert message is None or message in reasons[0]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("MambaConfig", {}, r"mixer.conv1d \(Conv1d\) computes a token from its neighbours"),
        ("FalconConfig", {}, "FalconForCausalLM computes attention itself"),
        ("BloomConfig", {}, "BloomForCausalLM computes attention itself"),
        ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}, "layers of the kind 'conv' carry a state"),
    ],
)
def test_models_that_a_split_would_change_are_named(kind, options, message):
    import re

    import transformers

    config = getattr(transformers, kind)(**{**SMALL, **options})
    net = transformers.AutoModelForCausalLM.from_config(config)
    assert any(re.search(message, reason) for reason in split_refusals(net)), split_refusals(net)


def test_another_implementation_is_named():
    assert split_refusals(model("Llama", "sdpa")) == [
        """attn_implementation must be "ring", got 'sdpa': from_pretrained(..., attn_implementation="ring")"""
    ]


# Mistakes where sequences are split: an error on all ranks


def faults(pool, world, *arguments):
    result = pool.outcomes(world, split_step, *arguments)
    assert not any(is_result for is_result, _ in result)
    return [error[1] for _, error in result]


def without_positions(group):
    """Return the error of this rank where the model counts positions itself, as a plain loop would."""
    tensors = {"input_ids": batch("plain")["input_ids"]}
    net = model("Llama", "ring")
    context = made(group)
    attach_context(net, context)
    part = context.split(tensors)
    with pytest.raises(ValueError, match=r"position|rank 1") as error:
        net(**part)
    return str(error.value)


def test_positions_that_begin_on_each_rank_are_an_error_on_all(pool):
    first, second = pool.run(2, without_positions)
    assert "position_ids must be those of the whole sequence, got positions that begin at 0 on each rank" in second
    assert "rank 1 of the group was given arguments that do not fit" in first


def test_positions_with_a_gap_are_an_error_on_all(pool):
    positions = torch.arange(LENGTH).repeat(2, 1)
    positions[:, 40:] += 5
    first, second = faults(pool, 2, "Llama", "plain", "contiguous", "gather", {"position_ids": positions})
    assert "position_ids must continue by 1, or restart at 0 where a document begins, got a gap" in second
    assert "rank 1 of the group" in first


def test_a_model_whose_layers_get_no_positions_needs_documents(pool):
    for message in pool.run(2, no_documents):
        assert "documents must be in the batch of this model" in message


def no_documents(group):
    tensors = {name: x for name, x in batch("plain").items() if name in ("input_ids", "position_ids")}
    net = model("Llama 4", "ring")
    context = made(group)
    attach_context(net, context)
    part = context.split(tensors, {"position_ids": 1})
    with pytest.raises(ValueError, match="documents") as error:
        net(**part)
    return str(error.value)


def another_mask(group):
    tensors = {name: x for name, x in batch("padded").items() if name not in ("labels", "real")}
    net = model("Llama", "ring")
    context = made(group)
    attach_context(net, context)
    part = context.split(tensors, {"position_ids": 1})
    if group.rank() == 1:
        part["attention_mask"] = torch.ones_like(part["attention_mask"])
    with pytest.raises(ValueError, match=r"rank|attention_mask") as error:
        net(**part)
    return str(error.value)


def test_another_mask_than_the_batchs_is_an_error_on_all(pool):
    first, second = pool.run(2, another_mask)
    assert "attention_mask must be that of the batch that was split, got another one" in second
    assert "rank 1 of the group" in first


def cached(group):
    """Return the error of decoding in a split batch, and generate inside `whole()`."""
    tensors = {name: x for name, x in batch("plain").items() if name in ("input_ids", "position_ids")}
    net = model("Llama", "ring")
    context = made(group)
    attach_context(net, context)
    part = context.split(tensors, {"position_ids": 1})
    cache = net(**part, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="sequences that are split over ranks have no key cache") as error:
        net(part["input_ids"][:, :1], past_key_values=cache, position_ids=torch.tensor([[LENGTH]]))
    with context.whole():
        assert net.generate(IDS, max_new_tokens=2, use_cache=True).shape[1] > 20
    return str(error.value)


def test_a_cache_in_a_split_batch_is_refused(pool):
    for message in pool.run(2, cached):
        assert "set use_cache=False" in message
