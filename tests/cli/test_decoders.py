"""The command line with models of transformers: plans, exports, and arguments by their names."""

import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_longnet import CausalLMModule
from lightning_longnet.checkpointing.comparison import check_same_model
from lightning_longnet.cli import main
from lightning_longnet.cli.configured import read_job

pytestmark = [
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]
FOLDER = Path(__file__).parents[2] / "configs/huggingface"
SMALL = f"--config={FOLDER}/small.yaml"
QWEN3_8B = {
    **{"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288},
    **{"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
    "tie_word_embeddings": False,
}
TINY = {**QWEN3_8B, "vocab_size": 29, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}


def test_the_model_is_named_by_an_argument(tmp_path, capsys, monkeypatch):
    words = ["--model", "lightning_longnet.CausalLMModule", "--model.name", str(tmp_path), "--model.lora", "{r: 4}"]
    monkeypatch.setattr(sys, "argv", ["longnet", "fit", *words, "--print_config"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    result = yaml.safe_load(capsys.readouterr().out)["model"]
    assert result["class_path"] == "lightning_longnet.CausalLMModule"
    assert (result["init_args"]["name"], result["init_args"]["lora"]) == (str(tmp_path), {"r": 4})


def test_a_plan_has_the_parameters_and_the_windows_of_the_model():
    recipe = f"--config={FOLDER}/qwen3_8b.yaml"
    job = read_job([recipe, "--model.name", "null", "--model.overrides", "null", f"--model.config={QWEN3_8B}"])
    assert (job.ranks, job.tokens, job.sharding, job.precision) == (8, 131072, "fsdp2", "bf16-mixed")
    assert (job.config.dim, job.config.layers, job.config.kv_heads) == (4096, 36, 8)
    assert (job.config.recompute, job.config.offload_activations) == ("all but attention", True)
    assert job.config.feed_forward_chunk == 4096
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7, "use_sliding_window": True}
    job = read_job([SMALL, f"--model.config={ {**TINY, **kinds} }"])
    assert [pattern.branches[0].window for pattern in job.config.patterns] == [7, None]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 16}, "2 heads of 16 in a width of 16"),
        ({"model_type": "qwen3_moe", "num_experts": 4}, "a plan knows no experts, and the qwen3_moe has 4"),
    ],
)
def test_a_plan_says_what_it_does_not_know(changes, message):
    with pytest.raises(ValueError, match=message):
        read_job([SMALL, f"--model.config={ {**TINY, **changes} }"])


@pytest.mark.long
def test_a_plan_of_a_model_is_shown(capsys):
    assert main(["plan", SMALL, "--device", "cpu", "--tokens", "512"]) == 0
    shown = capsys.readouterr().out
    parameters = sum(p.numel() for p in CausalLMModule(config=read_small()).parameters())
    result = int(shown.split(" parameters")[0].splitlines()[-1].replace(",", ""))
    assert result == pytest.approx(parameters, rel=0.01)
    assert "planned as a LongNet with the same matrices" in shown


def read_small():
    return yaml.safe_load((FOLDER / "small.yaml").read_text())["model"]["init_args"]["config"]


def saved(module, path):
    """Save a module as a Trainer does."""
    import lightning as L

    trainer = L.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, barebones=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path, weights_only=True)


def test_commands_of_longnets_name_what_reads_a_model_of_transformers(tmp_path, capsys):
    saved(CausalLMModule(config=TINY), tmp_path / "some.ckpt")
    assert main(["export", str(tmp_path / "some.ckpt"), str(tmp_path / "out"), "--format", "huggingface"]) == 0
    (tmp_path / "a.txt").write_text("some text")
    texts = [str(tmp_path / "a.txt"), "--checkpoint"]
    capsys.readouterr()
    for words in (["generate"], ["score", *texts], ["embed", f"--out={tmp_path}/out.safetensors", *texts]):
        assert main([*words, str(tmp_path / "some.ckpt")]) == 2
        assert (
            "is of a CausalLMModule, which only `export` and `needle` read: longnet export CHECKPOINT FOLDER --format "
            "huggingface, then AutoModelForCausalLM.from_pretrained(FOLDER).generate"
        ) in capsys.readouterr().err
        assert main([*words, str(tmp_path / "out")]) == 2
        assert "; it is a folder of transformers: load it with AutoModelForCausalLM\n" in capsys.readouterr().err


def test_each_command_names_the_package_that_it_lacks(tmp_path, monkeypatch, capsys):
    module = CausalLMModule(config=TINY)
    saved(module, tmp_path / "some.ckpt")
    module.save_pretrained(tmp_path / "folder")
    models = sys.modules["lightning_longnet.huggingface.models"]
    monkeypatch.setattr(models, "find_spec", lambda name: None if name == "transformers" else True)
    for words in (
        ["needle", str(tmp_path / "folder")],
        ["needle", str(tmp_path / "some.ckpt")],
        ["export", str(tmp_path / "some.ckpt"), str(tmp_path / "out"), "--format", "huggingface"],
        ["plan", SMALL],
    ):
        capsys.readouterr()
        assert main(words) == 2
        message = "a Hugging Face model needs transformers: pip install 'lightning-longnet[hf]'"
        assert capsys.readouterr().err == f"longnet: error: {message}\n"


def test_a_checkpoint_of_another_architecture_is_named_by_that_first():
    from transformers import AutoConfig

    values = {name: value for name, value in TINY.items() if name != "model_type"}
    kinds = [AutoConfig.for_model(kind, **values, _name_or_path=kind).to_dict() for kind in ("qwen3", "llama")]
    configs = tuple({"config": each, "learning_rate": 0.1} for each in kinds)
    with pytest.raises(ValueError, match=r"some\.ckpt: the checkpoint's model has config\.model_type qwen3"):
        check_same_model("some.ckpt", {"a": (1,)}, {"a": (2,)}, configs)
    same_kind = {"config": {**kinds[0], "head_dim": 4, "_name_or_path": "other"}}
    with pytest.raises(ValueError, match=r"has config\.head_dim 8, and this one 4; a is \(1,\) in the checkpoint"):
        check_same_model("some.ckpt", {"a": (1,)}, {"a": (2,)}, (configs[0], same_kind))


@pytest.mark.parametrize("adapted", [False, True])
def test_a_checkpoint_is_exported_for_transformers(tmp_path, capsys, adapted):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    module = CausalLMModule(config=TINY)
    if adapted:
        module.save_pretrained(tmp_path / "base")
        module = CausalLMModule(name=str(tmp_path / "base"), lora={"r": 2, "init_lora_weights": False})
    saved(module, tmp_path / "some.ckpt")
    assert main(["export", str(tmp_path / "some.ckpt"), str(tmp_path / "out"), "--format", "huggingface"]) == 0
    assert "Qwen3ForCausalLM" in capsys.readouterr().out
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(20)[None] % 29
    # in float64, where only the rounding of merged weights is left
    torch.testing.assert_close(exported.double()(ids).logits, module.double().eval()(ids), rtol=1e-5, atol=1e-6)
    assert main(["export", str(tmp_path / "some.ckpt"), str(tmp_path / "plain")]) != 0
