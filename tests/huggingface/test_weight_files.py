"""The safetensors files that `load_sharded` reads: the same model as by from_pretrained, or an error."""

import json

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, SMALL
from safetensors.torch import load_file, save_file
from tiers import tiered
from torch import nn

from lightning_longnet import CausalLMModule

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
CONVERTED = {"Mixtral", "Qwen3-MoE", "GPT-NeoX", "DeepSeek-V3"}  # other names in the file than in the model
CONFIG = {"model_type": "qwen3", "head_dim": 8, **SMALL}


def loaded(folder, **options):
    net = CausalLMModule(name=str(folder), load_sharded=True, **options)
    net._load_sharded_weights(torch.device("cpu"))
    return net.model


def compare(folder, **options):
    """Compare all parameters and buffers with those of from_pretrained, by all their names."""
    model, expected = loaded(folder, **options), CausalLMModule(name=str(folder), **options).model
    for kind in ("named_parameters", "named_buffers"):
        tensors = dict(getattr(model, kind)(remove_duplicate=False))
        expected_tensors = dict(getattr(expected, kind)(remove_duplicate=False))
        assert tensors.keys() == expected_tensors.keys()
        for name, x in expected_tensors.items():
            assert tensors[name].dtype == x.dtype, name
            assert torch.equal(tensors[name], x), name


@pytest.fixture
def saved(tmp_path):
    """Return a function that saves a tied model, with some tensors of the file replaced, and returns the folder."""

    def save(**changes):
        torch.manual_seed(1)
        CausalLMModule(config={**CONFIG, "tie_word_embeddings": True}).model.save_pretrained(tmp_path)
        path = tmp_path / "model.safetensors"
        save_file({**load_file(path), **changes}, path, {"format": "pt"})
        return tmp_path

    return save


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", tiered(ARCHITECTURES, quick=["Gemma 3", "GPT-2", "Mixtral"]))
def test_a_model_is_that_of_from_pretrained(tmp_path, kind, dtype):
    name, values, _ = ARCHITECTURES[kind]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**{**SMALL, **values}))
    with torch.no_grad():
        for x in {*model.parameters(), *model.state_dict().values()}:
            x.add_(torch.randn_like(x))  # no weight or buffer is the initial one
    model.save_pretrained(tmp_path)
    if kind in CONVERTED:
        with pytest.raises(ValueError, match=r"transformers (converts its weights|loads .* in float32)"):
            loaded(tmp_path, dtype=dtype)
    else:
        compare(tmp_path, dtype=dtype)


def test_one_file_comes_before_an_index_of_parts(saved):
    folder = saved()
    stale = {name: x + 1 for name, x in load_file(folder / "model.safetensors").items()}
    save_file(stale, folder / "model-00001-of-00001.safetensors", {"format": "pt"})
    weights = dict.fromkeys(stale, "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    compare(folder)
    (folder / "model.safetensors").unlink()
    compare(folder)


def test_tied_weights_may_both_be_in_the_file_with_the_same_values(saved):
    embedding = load_file(saved() / "model.safetensors")["model.embed_tokens.weight"]
    compare(saved(**{"lm_head.weight": embedding.clone()}))
    other = embedding.clone()
    other[-1, -1] += 1
    with pytest.raises(ValueError, match=r"ties lm_head\.weight to|ties model\.embed_tokens\.weight to lm_head"):
        loaded(saved(**{"lm_head.weight": other}))


def test_buffers_of_former_versions_are_ignored(saved):
    compare(saved(**{"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)}))


def test_a_buffer_that_nothing_computes_is_refused(saved, monkeypatch):
    from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

    def init(self, config):
        original(self, config)
        self.register_buffer("scale", torch.full((3,), 2.0), persistent=False)

    original = Qwen3MLP.__init__
    folder = saved()
    monkeypatch.setattr(Qwen3MLP, "__init__", init)
    with pytest.raises(ValueError, match=r"does not compute its buffer model\.layers\.0\.mlp\.scale in _init_weights"):
        loaded(folder)


def test_a_parameter_that_is_made_off_the_meta_device_is_read(saved, monkeypatch):
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.weight = nn.Parameter(torch.ones(self.weight.shape, device="cpu"))

    original = Qwen3RMSNorm.__init__
    folder = saved(**{"model.norm.weight": torch.full((SMALL["hidden_size"],), 3.0)})
    monkeypatch.setattr(Qwen3RMSNorm, "__init__", init)
    compare(folder)


def test_what_cannot_be_read_is_refused_before_the_run(saved, tmp_path):
    def refused(message, **options):
        with pytest.raises(ValueError, match=message):
            CausalLMModule(name=str(tmp_path), load_sharded=True, **options)

    saved(**{"model.norm.weight": torch.zeros(SMALL["hidden_size"], dtype=torch.uint16)})
    refused(r"whose model\.norm\.weight has the dtype U16")
    path = saved() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused("model.safetensors is shorter than its header says")
    path.write_bytes(b"\xff" * 16)
    refused("its header is longer than the file")
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "transformers_weights": "other.safetensors"}))
    refused("whose configuration names the file of its weights, 'other.safetensors'")


def test_weights_that_stay_in_float32_are_refused(tmp_path):
    name, values, _ = ARCHITECTURES["gpt-oss"]
    config = getattr(transformers, name)(**{**SMALL, **values})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"transformers loads model\.layers\.0\.\w+norm\.weight of Gpt\w+ in float32"):
        loaded(tmp_path, dtype="float16")
