"""YaRN, and other rotations that a configuration may have: over ranks as on one process, and in `overrides`."""

import pytest
import torch
from architectures import SMALL, largest_differences, model, split_step, whole_step
from tiers import tiered

from lightning_longnet import CausalLMModule

BASE = {"rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, **BASE}
ROTATIONS = {
    "yarn": YARN,
    "linear": {"rope_type": "linear", "factor": 8.0, **BASE},
    "llama3": {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
CASES = [
    (kind, batch, placement, exchange)
    for kind in ROTATIONS
    for batch, placement, exchange in (("plain", "contiguous", "ring"), ("packed", "zigzag", "gather"))
]


@pytest.mark.parametrize(("kind", "batch", "placement", "exchange"), tiered(CASES, CASES[:2], covers=1))
def test_longer_rotations_on_ranks_give_what_one_process_gives(pool, kind, batch, placement, exchange):
    """Rows of 53 tokens have positions beyond the 16 that the model was trained with."""
    changes = {"rope_parameters": ROTATIONS[kind]}
    whole = whole_step("Llama", batch, **changes)
    parts = pool.run(2, split_step, "Llama", batch, placement, exchange, None, None, changes)
    for name, difference in largest_differences(whole, parts, batch).items():
        assert difference < 1e-12, f"{name}: {difference:.1e}"
    former = whole_step("Llama", batch)
    assert not torch.allclose(whole[0], former[0]), "the rotations are others"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folders of a Llama that was trained with 16 positions, and of a Gemma with two kinds of layers."""
    folder = tmp_path_factory.mktemp("rotations")
    changes = {"max_position_embeddings": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}
    model("Llama", "ring", **changes).save_pretrained(folder / "Llama")
    model("Gemma 3", "ring").save_pretrained(folder / "Gemma 3")
    model("GPT-2", "ring").save_pretrained(folder / "GPT-2")
    return folder


@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("given", [{}, {"original_max_position_embeddings": 16}, {"rope_theta": 5e4}])
def test_overrides_keep_the_base_and_the_length_of_the_training(folders, tmp_path, name, given):
    """Also where they set the new length, and in the exported folder."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    overrides = {"max_position_embeddings": 128, name: {"rope_type": "yarn", "factor": 8.0, **given}}
    module = CausalLMModule(name=str(folders / "Llama"), overrides=overrides, dtype="float64")
    whole = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "rope_theta": 5e4}
    config = LlamaConfig(**{**SMALL, "rope_parameters": whole})
    expected = AutoModelForCausalLM.from_config(config).model.rotary_emb
    rotary = module.model.model.rotary_emb
    assert torch.equal(rotary.inv_freq, expected.inv_freq)
    assert rotary.attention_scaling == expected.attention_scaling > 1
    module.save_pretrained(tmp_path / "exported")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert saved.config.rope_parameters == whole
    assert saved.config.max_position_embeddings == 128


def test_overrides_of_kinds_of_layers_leave_the_others(folders):
    before = model("Gemma 3", "ring").config.rope_parameters
    overrides = {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 4.0}}}
    module = CausalLMModule(name=str(folders / "Gemma 3"), overrides=overrides)
    after = module.model.config.rope_parameters
    assert after["sliding_attention"] == before["sliding_attention"]
    assert after["full_attention"]["rope_theta"] == before["full_attention"]["rope_theta"]
    assert module.model.model.rotary_emb.rope_type == {"sliding_attention": "default", "full_attention": "yarn"}


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("Llama", {"rope_type": "yarm", "factor": 2.0}, "rope_type must be one of default, .*yarn.*, got 'yarm'"),
        ("Llama", {"rope_type": "yarn"}, "rope_parameters of rope_type 'yarn' must have a factor"),
        ("Llama", "yarn", "rope_parameters must be a dictionary, .*got 'yarn' for a llama"),
        ("GPT-2", {"rope_type": "yarn", "factor": 2.0}, "of a model with rotary positions, .*for a gpt2"),
        ("Gemma 3", {"rope_type": "yarn", "factor": 2.0}, "by the kinds of its layers, .*got 'rope_type'"),
    ],
)
def test_rotations_that_do_not_fit_are_refused(folders, name, given, message):
    with pytest.raises(ValueError, match=message):
        CausalLMModule(name=str(folders / name), overrides={"rope_parameters": given})
