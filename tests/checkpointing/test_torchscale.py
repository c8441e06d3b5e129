"""Outputs, and gradients, of torchscale's own code on random weights; `data/record_torchscale.py` recorded them."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch

from lightning_longnet.checkpointing.torchscale import from_torchscale, read_torchscale

RECORDED = torch.load(Path(__file__).parents[1] / "data/torchscale.pt", weights_only=True)
# what torchscale's small patterns cannot reach does not matter here
pytestmark = pytest.mark.filterwarnings("ignore:(Nothing crosses|In the branch):UserWarning")
RAGGED = "ragged encoder"  # at lengths that its segments do not divide


def state_of(name):
    packed = RECORDED[name]["state"]
    sizes = [torch.Size(shape).numel() for shape in packed["shapes"].values()]
    parts = packed["values"].split(sizes)
    return {key: x.view(shape) for (key, shape), x in zip(packed["shapes"].items(), parts, strict=True)}


def converted(name, mix="detached", ragged="zero_keys", **changes):
    return from_torchscale(state_of(name), {**RECORDED[name]["arguments"], **changes}, mix, ragged)


@pytest.mark.parametrize("name", RECORDED)
def test_outputs_are_torchscales(name):
    model = converted(name)
    for case in RECORDED[name]["cases"]:
        torch.testing.assert_close(model(case["input"]), case["output"], rtol=1e-5, atol=2e-5)


def learned_of(model, name):
    """The gradient of the weight whose gradient was recorded."""
    dim = model.config.dim
    if name.endswith("pos_embed"):
        return model.position_table.grad.flatten(0, 1)[None]
    rows = "qkv".index(name.split(".")[-2][0])
    return model.blocks[0].attention.qkv_proj.weight.grad[rows * dim : (rows + 1) * dim]


@pytest.mark.parametrize("name", RECORDED)
def test_gradients_are_torchscales_where_its_mixture_lets_none_through(name):
    model, learned = converted(name), RECORDED[name]["learned"]
    for case in RECORDED[name]["cases"]:
        model.zero_grad()
        out = model(case["input"])
        (out * torch.arange(out.numel()).view_as(out).cos()).sum().backward()
        torch.testing.assert_close(learned_of(model, learned), case["grad"], rtol=1e-4, atol=1e-4)


def test_the_mixture_may_be_exact_which_changes_gradients_alone():
    name = "decoder"
    model, case = converted(name, "exact"), RECORDED[name]["cases"][0]
    assert model.config.mix == "exact"
    out = model(case["input"])
    torch.testing.assert_close(out, case["output"], rtol=1e-5, atol=2e-5)
    (out * torch.arange(out.numel()).view_as(out).cos()).sum().backward()
    assert not torch.allclose(learned_of(model, RECORDED[name]["learned"]), case["grad"], rtol=0.01, atol=0.01)


def test_an_encoder_may_attend_to_tokens_alone_which_differs_where_segments_are_padded():
    (case,) = RECORDED[RAGGED]["cases"]
    model = converted(RAGGED, ragged="exact")
    assert not model.config.pattern.has_null_keys
    assert not torch.allclose(model(case["input"]), case["output"], atol=1e-2)
    full = converted("encoder", ragged="exact")
    for case in RECORDED["encoder"]["cases"]:
        torch.testing.assert_close(full(case["input"]), case["output"], rtol=1e-5, atol=2e-5)


def test_causal_masks_hide_padding():
    assert {branch.ragged for branch in converted("decoder").config.pattern.branches} == {"exact"}
    assert {branch.ragged for branch in converted("longvit").config.pattern.branches} == {"zero_keys"}


def test_segments_that_torchscale_displaces_are_named():
    message = r"than a segment whose rate does not divide it \(10 by 4, 9 by 2\): torchscale displaces the outputs"
    with pytest.warns(UserWarning, match=message):
        converted(RAGGED, segment_length="[8,10,9]", dilated_ratio="[1,4,2]")


def test_an_unknown_padding_is_refused():
    with pytest.raises(ValueError, match="ragged must be one of 'exact', 'zero_keys', got 'pad'"):
        converted(RAGGED, ragged="pad")


def test_what_weights_say_is_read_from_them():
    config = converted("decoder with positions").config
    assert (config.vocab_size, config.dim, config.layers, config.hidden_dim) == (23, 16, 2, 24)
    assert (config.learned_positions, config.tied_embeddings, config.sub_norm, config.rotary) == (40, True, False, None)
    assert (config.embedding_scale, config.activation, config.norm_eps) == (4.0, "relu", 1e-3)
    config = converted("decoder").config
    assert (config.tied_embeddings, config.sub_norm, config.rotary, config.xpos_scale_base) == (False, True, "xpos", 64)
    assert config.is_causal
    config = converted("encoder").config
    assert (config.is_causal, config.final_norm) == (False, True)
    assert {branch.head_offsets for branch in config.pattern.branches} == {"blocked"}
    config = converted("longvit").config
    assert (config.classes, config.image_size, config.patch_size, config.normed) == (3, 16, 4, "pooled")
    assert converted("longvit in pretraining").config.classes == 0


def saved(tmp_path, content):
    torch.save(content, tmp_path / "theirs.pt")
    return tmp_path / "theirs.pt"


def test_arguments_and_prefixes_of_files_are_found(tmp_path):
    state, options = state_of("decoder"), RECORDED["decoder"]["arguments"]
    inside = {f"decoder.{name}": x for name, x in state.items()}
    (case, *_) = RECORDED["decoder"]["cases"]
    inside["decoder.version"] = torch.tensor([3.0])
    for content in (
        {"model": inside, "args": Namespace(**options, lr=[0.1]), "optimizer": {"state": {}}},
        {"model": inside, "cfg": {"model": Namespace(**options)}, "args": None},
        {"student": {}, "model": inside, "args": options},
    ):
        weights, arguments = read_torchscale(saved(tmp_path, content))
        torch.testing.assert_close(
            from_torchscale(weights, arguments)(case["input"]), case["output"], atol=2e-5, rtol=0
        )
    two = {"teacher": state, "student": {name: x * 0 for name, x in state.items()}}
    with pytest.raises(ValueError, match="key must say under which of 'teacher', 'student' they are"):
        read_torchscale(saved(tmp_path, two))
    weights, arguments = read_torchscale(saved(tmp_path, two), "teacher")
    assert arguments == {}
    torch.testing.assert_close(from_torchscale(weights, options)(case["input"]), case["output"], atol=2e-5, rtol=0)
    with pytest.raises(ValueError, match="key must be one of 'teacher', 'student', got 'model'"):
        read_torchscale(saved(tmp_path, two), "model")


def test_what_stands_beside_a_longvit_is_left_alone():
    state = {f"backbone.{name}": x for name, x in state_of("longvit in pretraining").items()}
    state |= {"head.mlp.0.weight": torch.ones(3, 3), "head.last_layer.weight": torch.ones(1)}  # DINO's
    (case,) = RECORDED["longvit in pretraining"]["cases"]
    result = from_torchscale(state, RECORDED["longvit in pretraining"]["arguments"])
    torch.testing.assert_close(result(case["input"]), case["output"], atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("decoder", {"deepnorm": True}, "arguments must not hold deepnorm, which has no counterpart here, got True"),
        ("decoder", {"moe_freq": 2}, "arguments must not hold moe_freq"),
        ("encoder", {"multiway": True}, "arguments must not hold multiway"),
        ("encoder", {"rel_pos_buckets": 32}, "arguments must not hold rel_pos_buckets"),
        ("decoder", {"layernorm_embedding": True}, "arguments must not hold layernorm_embedding"),
        ("decoder with positions", {"decoder_normalize_before": False}, "post-norm has no counterpart here"),
        ("decoder", {"activation_fn": "tanh"}, "activation_fn must be one of gelu, relu, swish, got 'tanh'"),
        ("decoder", {"segment_length": None}, "segment_length must be a list of integers, .* got None"),
        ("decoder", {"dilated_ratio": "import os"}, "dilated_ratio must be a list of integers, .* got 'import os'"),
        ("decoder", {"dilated_ratio": [1, 2]}, "segment_lengths and dilation_rates must have the same count"),
        ("decoder", {"decoder_attention_heads": None}, "arguments must hold decoder_attention_heads or encoder_att"),
        ("decoder", {"encoder_attention_heads": 4}, "and not both, as nothing else says which"),
        ("decoder", {"decoder_attention_heads": 5}, "heads must divide dim, got heads 5 and dim 16"),
        ("longvit", {"encoder_attention_heads": None}, "arguments must hold encoder_attention_heads"),
    ],
)
def test_arguments_that_have_no_counterpart_are_refused_by_name(name, changes, message):
    with pytest.raises(ValueError, match=message):
        converted(name, **changes)


def renamed(old, new):
    return {key.replace(old, new): x for key, x in state_of("decoder").items()}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "state must hold one model, .* got none"),
        (renamed("_proj.", "_proj.A."), "state must not hold multiway, which has no counterpart here, got layers.0"),
        (state_of("decoder") | {"layers.1.moe_layer.gate.weight": torch.ones(1)}, "not hold a mixture of experts"),
        (state_of("decoder") | {"layers.1.encoder_attn.q_proj.bias": torch.ones(1)}, "must not hold cross attention"),
        (state_of("decoder") | {"layernorm_embedding.weight": torch.ones(1)}, "must not hold a norm of embeddings"),
        (state_of("decoder") | {"embed_positions._float_tensor": torch.ones(1)}, "must not hold sinusoidal positions"),
        (state_of("decoder") | {"self_attn_relative_position.x": torch.ones(1)}, "not hold a relative position bias"),
        (
            state_of("decoder") | {"adaptive_softmax.x": torch.ones(1)},
            "nothing that has no counterpart here, got adapt",
        ),
        (renamed("layers.1.ffn.fc1.bias", "gone"), "state must hold layers.1.ffn.fc1.bias, which is missing"),
        (renamed("embed_tokens", "gone"), "state must hold embed_tokens.weight, which is missing"),
    ],
)
def test_weights_that_have_no_counterpart_are_refused_by_name(state, message):
    with pytest.raises(ValueError, match=message):
        from_torchscale(state, RECORDED["decoder"]["arguments"])


def test_embeddings_of_tiles_are_refused_by_name():
    state = state_of("longvit")
    root = next(name for name in state if name.endswith("patch_embed.proj.weight"))
    state[root] = torch.ones(16, 1536)
    del state[root.replace("patch_embed.proj.weight", "pos_embed")]  # GigaPath computes them of the tiles' coordinates
    with pytest.raises(ValueError, match=r"of 4 dimensions, .*, got shape \(16, 1536\): .* as in GigaPath"):
        from_torchscale(state, RECORDED["longvit"]["arguments"])


def test_files_that_hold_no_model_of_torchscale_are_reported(tmp_path):
    with pytest.raises(ValueError, match=r"path must be a file that torch.save wrote, got .*none, which is none"):
        read_torchscale(tmp_path / "none")
    for content in ([1], 3):
        with pytest.raises(ValueError, match=r"path must hold a dictionary, got .*, which holds a (list|int)"):
            read_torchscale(saved(tmp_path, content))
    with pytest.raises(
        ValueError, match=r"source must hold weights of torchscale, whose names end with .*, found none"
    ):
        read_torchscale(saved(tmp_path, {"model": {"x": torch.ones(1)}}))
