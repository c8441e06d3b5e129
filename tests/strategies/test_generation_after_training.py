"""The model's own `generate` after training: with transformers' attention, and with "ring" on one process."""

import pytest
import torch
from decoder_runs import CONFIG, OPTIMIZATION, fit
from tiers import tiered

WINDOWS = {"use_sliding_window": True, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
DENSE = {**CONFIG, "tie_word_embeddings": False, "initializer_range": 0.3}  # so that the likeliest tokens vary
MODELS = {"dense": DENSE, "windows": {**DENSE, **WINDOWS}}


def continued(folder, attention, **options):
    """Return 24 further tokens of two prompts, one of them with padding, by the likeliest tokens."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype="float64")
    assert model.config._attn_implementation == attention
    ids = torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(8))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    options = {"do_sample": False, "max_new_tokens": 24, "min_new_tokens": 24, **options}
    return model.generate(ids, attention_mask=mask, **options)


@pytest.mark.parametrize("kind", tiered(MODELS, quick=["windows"], long=[]))
def test_a_trained_model_generates_with_either_attention(trainers, tmp_path, kind):
    options = {"config": MODELS[kind], **OPTIMIZATION}
    trainers.run(2, fit, "float64", "ddp", 2, options, str(tmp_path))
    folder = tmp_path / "exported"
    expected = continued(folder, "sdpa")
    assert expected.shape == (2, 44)
    assert len(expected[:, 20:].unique()) > 4, "it does not repeat one token"
    for attention, use_cache in (("ring", True), ("ring", False), ("sdpa", False)):
        assert torch.equal(continued(folder, attention, use_cache=use_cache), expected)
    if kind == "windows":  # which matter: the prompt is longer
        import json

        config = json.loads((folder / "config.json").read_text())
        assert (config["sliding_window"], config["layer_types"]) == (6, WINDOWS["layer_types"])
        (folder / "config.json").write_text(json.dumps({**config, "sliding_window": 99}))
        assert not torch.equal(continued(folder, "sdpa"), expected)
