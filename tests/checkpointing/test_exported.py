"""Exported folders give the same outputs, here and in transformers, and tell what is wrong with them."""

import json
import os
import subprocess
import sys
from copy import deepcopy
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiers import tiered

from lightning_longnet import Branch, LongNet, LongNetConfig, LongViT, LongViTConfig, Pattern, magneto_gain
from lightning_longnet.checkpointing.checkpoints import Checkpoint, is_decoder, read_checkpoint, write_checkpoint
from lightning_longnet.checkpointing.exports import config_of, export_model, load_model, model_of
from lightning_longnet.data.tokenizers import tokenizer_of

ROOT = Path(__file__).parents[2]
CAUSAL = Pattern.dilated((8, 16, 64), (1, 2, 2), is_causal=True)
SMALL = {"pattern": CAUSAL, "vocab_size": 23, "dim": 16, "layers": 2, "heads": 4, "kv_heads": 2}
KINDS = {
    "tied": {},
    "untied": {"tied_embeddings": False, "learned_positions": 60, "rotary": "xpos", "activation": "swiglu"},
    "encoder": {"pattern": [Pattern.dense(), Pattern.window(5)], "final_norm": False, "embedding_scale": 3.0},
}


WAYS = list(product([*KINDS, "images"], ["folder", "checkpoint", "both"], [torch.float32, torch.bfloat16]))


def longnet(**changes):
    torch.manual_seed(0)
    return LongNet(LongNetConfig(**{**SMALL, **changes})).eval()


def longvit():
    torch.manual_seed(0)
    shape = {"dim": 16, "layers": 1, "heads": 4, "classes": 3, "image_size": 16, "patch_size": 4}
    return LongViT(LongViTConfig(Pattern.dense(), pooling="class", **shape)).eval()


def inputs_of(model):
    generator = torch.Generator().manual_seed(1)
    if isinstance(model, LongViT):
        return torch.randn(2, 3, 16, 16, generator=generator)
    return torch.randint(23, (2, 40), generator=generator)


@pytest.mark.parametrize(("kind", "through", "dtype"), tiered(WAYS, quick=WAYS[::5]))
def test_what_is_read_computes_the_same(kind, through, dtype, tmp_path):
    model = (longvit() if kind == "images" else longnet(**KINDS[kind])).to(dtype)
    again = model
    if through != "folder":
        write_checkpoint(again, tmp_path / "deep/a.ckpt")
        again = load_model(tmp_path / "deep/a.ckpt")
    if through != "checkpoint":
        export_model(again, tmp_path / "out")
        again = load_model(tmp_path / "out")
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert again is not model
    assert type(again) is type(model)
    assert again.config == model.config
    assert not again.training
    inputs = inputs_of(model)
    inputs = inputs.to(dtype) if kind == "images" else inputs
    assert torch.equal(again(inputs), model(inputs))
    assert [name for name, _ in again.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert all(parameter.requires_grad for parameter in again.parameters())
    again(inputs).float().sum().backward()


def test_a_checkpoint_of_a_module_becomes_its_model(tmp_path):
    model = longnet()
    state = {f"model.{name}": x for name, x in model.state_dict().items()} | {"val_loss.total": torch.zeros(1)}
    for config in (model.config, model.config.to_dict()):
        result = model_of(Checkpoint(state, {"config": config, "learning_rate": 1.0}))
        assert torch.equal(result(inputs_of(model)), model(inputs_of(model)))


def test_an_exported_folder_reads_as_a_checkpoint(tmp_path):
    model = longnet()
    export_model(model, tmp_path / "out")
    result = read_checkpoint(tmp_path / "out")
    assert LongNetConfig(**result.hyper_parameters["config"]) == model.config
    assert set(result.state_dict) == {f"model.{name}" for name in model.state_dict()}  # the tied head, too


@pytest.mark.long
@pytest.mark.parametrize("kind", ["untied", pytest.param("tied", marks=pytest.mark.full)])
def test_transformers_reads_the_folder_and_writes_it_again(kind, tmp_path):
    model = longnet(**KINDS[kind], vocab_size=256)
    export_model(model, tmp_path / "out", "huggingface", tokenizer=tokenizer_of("bytes"))
    ids = inputs_of(model)
    mask = (torch.arange(40) >= torch.tensor([[0], [7]])).long()  # padded on the left, as transformers does
    torch.save({"input_ids": ids, "attention_mask": mask}, tmp_path / "inputs.pt")
    options = {
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, ROOT / "tests/transformed.py", tmp_path / "out", tmp_path / "again"]
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=200, env={**os.environ, **options}, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = torch.load(tmp_path / "outputs.pt", weights_only=True)
    with torch.no_grad():
        expected = model(ids)
        torch.testing.assert_close(result["logits"], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(result["masked"][0], expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(result["masked"][1:, 7:], model(ids[1:, 7:]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            result["loss"], F.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        )
        grown = ids
        for _ in range(6):
            grown = torch.cat([grown, model(grown)[:, -1:].argmax(-1)], 1)
    assert torch.equal(result["generated"], grown)
    assert result["beams"].shape == (2, 44)
    assert result["again"].dtype == torch.bfloat16
    with torch.no_grad():
        rounded = deepcopy(model).bfloat16().float()(ids)
    torch.testing.assert_close(result["rounded"], rounded, rtol=1e-5, atol=1e-5)
    # products of bfloat16 are rounded in another order in another process
    assert (result["again"].float() - rounded).norm() < 0.02 * rounded.norm()
    assert result["tied"] == (kind == "tied")
    assert result["vocabulary"] == 256
    assert result["written"] == result["alone"]
    assert result["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert result["fresh"].std().item() == pytest.approx(_deviation(model), rel=0.1)  # it begins as ours do
    assert torch.equal(load_model(tmp_path / "again")(ids), expected)


def _deviation(model):
    weight = model.blocks[0].feed_forward.first.weight
    parts = 2 if model.config.activation == "swiglu" else 1
    rows, columns = weight.shape
    return magneto_gain(2) * (2 / (rows / parts + columns)) ** 0.5


@pytest.mark.parametrize(
    ("made", "options", "message"),
    [
        (longvit, {"format": "huggingface"}, "format 'huggingface' is of models that predict .* got a LongViT"),
        (lambda: longnet(**KINDS["encoder"]), {"format": "huggingface"}, "got a LongNet whose pattern is not causal"),
        (longnet, {"format": "onnx"}, "format must be one of 'safetensors', 'huggingface', got 'onnx'"),
        (longnet, {"folder": "held"}, "folder must be new or empty, got .*held"),
        (longnet, {"folder": "held/file"}, "folder must be new or empty, got .*file"),
    ],
)
def test_what_cannot_be_exported_is_reported(made, options, message, tmp_path):
    (tmp_path / "held").mkdir()
    (tmp_path / "held/file").write_text("mine")
    (tmp_path / "empty").mkdir()
    options = {"folder": "empty", **options}
    with pytest.raises(ValueError, match=message):
        export_model(made(), tmp_path / options.pop("folder"), **options)
    assert not list((tmp_path / "empty").iterdir())
    assert (tmp_path / "held/file").read_text() == "mine"


def changed(folder, **changes):
    """Of its config."""
    values = json.loads((folder / "config.json").read_text())
    values["longnet"] |= changes
    (folder / "config.json").write_text(json.dumps(values))


def without(folder, name):
    save_file({key: x for key, x in load_file(folder / "model.safetensors").items() if key != name}, _weights(folder))


def _weights(folder):
    return folder / "model.safetensors"


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: changed(folder, vocab_size=40), "vocab_size must be that of the weights, 23, got 40"),
        (lambda folder: changed(folder, dim=32), r"weights must fit the config: .* got \("),
        (lambda folder: changed(folder, layers=1), "weights must hold what the config has, got blocks.1"),
        (lambda folder: changed(folder, layers=3), "weights must hold blocks.2.attention_norm.weight, which is miss"),
        (lambda folder: changed(folder, depth=3), "config must hold what LongNetConfig has, got another: .*depth"),
        (lambda folder: changed(folder, heads=0), "heads must be a positive integer, got 0"),
        (lambda folder: without(folder, "model.norm.bias"), "weights must hold norm.bias, which is missing"),
        (lambda folder: without(folder, "model.embedding.weight"), "weights must hold embedding.weight, which is miss"),
        (
            lambda folder: _weights(folder).unlink(),
            "path must be an exported folder, .* which has no model.safetensors",
        ),
        (
            lambda folder: _weights(folder).write_bytes(b"no"),
            "path must be an exported folder, .*: model.safetensors: ",
        ),
        (lambda folder: (folder / "config.json").write_text("no"), "whose config.json is no JSON"),
        (lambda folder: (folder / "config.json").write_text("{}"), "whose config.json has no longnet or longvit$"),
        (lambda folder: (folder / "config.json").unlink(), "path must be a checkpoint: a file, or a folder"),
    ],
)
def test_what_is_wrong_with_a_folder_is_reported(break_it, message, tmp_path):
    export_model(longnet(), tmp_path / "out")
    break_it(tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "out")


def test_hyper_parameters_without_a_model_are_reported():
    for options in ({}, {"config": 3}, {"config": {"dim": 3}}):
        with pytest.raises(
            ValueError,
            match=r"must hold the config of a LongNet .* saved = lightning_longnet\.read_checkpoint\(path\); module = ",
        ):
            config_of(options)


def test_models_of_transformers_are_known_by_their_configuration():
    own = {"config": longnet().config.to_dict(), "lora": {"r": 4}}  # a LongNet, in a module with adapters of its own
    assert [is_decoder(each) for each in ({"config": {"model_type": "qwen3"}}, {"name": "a", "lora": {}}, own, {})] == [
        True,
        True,
        False,
        False,
    ]


def test_patterns_in_files_are_read_wherever_branches_lived(tmp_path, monkeypatch):
    pattern = Pattern.block_sparse("strided", 4, 0.5, within=Pattern.dilated((8, 16), (1, 2)))
    for module in (Branch.__module__, "lightning_longnet.attention.branch", "lightning_longnet.attention.pattern"):
        monkeypatch.setattr(Branch, "__module__", module)
        torch.save({"state_dict": {}, "hyper_parameters": {"pattern": pattern}}, tmp_path / "a.ckpt")
        monkeypatch.undo()
        assert read_checkpoint(tmp_path / "a.ckpt").hyper_parameters == {"pattern": pattern}
