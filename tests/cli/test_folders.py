"""`longnet convert` and `longnet export`: from torchscale to a checkpoint, and from there to a folder."""

from pathlib import Path

import pytest
import torch

from lightning_longnet import LongNet, LongNetConfig, LongNetModule, LongViT, LongViTConfig, Pattern, load_model
from lightning_longnet.checkpointing.checkpoints import write_checkpoint
from lightning_longnet.cli import main

RECORDED = torch.load(Path(__file__).parents[1] / "data/torchscale.pt", weights_only=True)
DECODER = RECORDED["decoder"]
SETTINGS = [f"{name}={value}" for name, value in DECODER["arguments"].items()]


def saved(recorded, path):
    packed = recorded["state"]
    parts = packed["values"].split([torch.Size(shape).numel() for shape in packed["shapes"].values()])
    state = {name: x.view(shape) for (name, shape), x in zip(packed["shapes"].items(), parts, strict=True)}
    torch.save(state, path)
    return str(path)


@pytest.fixture
def theirs(tmp_path):
    return saved(DECODER, tmp_path / "theirs.pt")


@pytest.mark.filterwarnings("ignore:(Nothing crosses|In the branch):UserWarning")
def test_torchscales_decoder_becomes_a_checkpoint_and_a_folder(theirs, tmp_path, capsys):
    ours, folder = str(tmp_path / "ours.ckpt"), str(tmp_path / "out")
    assert main(["convert", theirs, ours, "--mix", "exact", "--set", *SETTINGS, "deepnorm=false"]) == 0
    assert main(["export", ours, folder, "--format", "huggingface"]) == 0
    shown = capsys.readouterr().out
    many = sum(parameter.numel() for parameter in load_model(folder).parameters())
    assert shown == (
        f"{ours}: LongNet, {many:,} parameters\n{folder}: LongNet, {many:,} parameters\n"
        f"tokenizer: none: the checkpoint names none, and --tokenizer adds one\n"
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
        "generation_config.json",
        "configuration_longnet.py",
        "modeling_longnet.py",
    }
    module = LongNetModule.load_from_checkpoint(ours).eval()
    assert module.model.config.mix == "exact"
    (case, *_) = DECODER["cases"]
    for model in (load_model(ours), load_model(folder), module):
        torch.testing.assert_close(model(case["input"]), case["output"], rtol=1e-5, atol=2e-5)


@pytest.mark.filterwarnings("ignore:(Nothing crosses|In the branch):UserWarning")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "attends to the padding of segments, as torchscale"),
        (["--ragged", "exact"], "attends to tokens alone, unlike torchscale where segments are padded"),
    ],
)
def test_an_encoder_keeps_its_padding_by_default(words, message, tmp_path, capsys):
    encoder = RECORDED["ragged encoder"]
    theirs, ours = saved(encoder, tmp_path / "theirs.pt"), str(tmp_path / "ours.ckpt")
    settings = [f"{name}={value}" for name, value in encoder["arguments"].items()]
    assert main(["convert", theirs, ours, *words, "--set", *settings]) == 0
    assert capsys.readouterr().out.endswith(f" parameters, {message}\n")
    (case,) = encoder["cases"]
    result = load_model(ours)(case["input"])
    assert torch.allclose(result, case["output"], rtol=1e-5, atol=2e-5) == (not words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["convert", "{theirs}", "{new}"], "arguments must hold decoder_attention_heads or encoder_attention_heads"),
        (["convert", "{theirs}", "{new}", "--set", *SETTINGS, "deepnorm=True"], "arguments must not hold deepnorm"),
        (["convert", "{theirs}", "{new}", "--set", *SETTINGS, "layer_norm_eps=1e-6"], "as layernorm_eps, got layer"),
        (["convert", "{theirs}", "{new}", "--set", "dilated_ratio"], "set must be NAME=VALUE, got 'dilated_ratio'"),
        (["convert", "{theirs}", "{theirs}", "--set", *SETTINGS], "checkpoint must be a new file, got "),
        (["convert", "nowhere.pt", "{new}"], "path must be a file that torch.save wrote, got nowhere.pt"),
        (["convert", "{theirs}", "{new}", "--key", "model"], "key must be one of none, got 'model'"),
        (["export", "nowhere.ckpt", "{new}"], "path must be a checkpoint, got nowhere.ckpt, which does not exist"),
        (["export", "{theirs}", "{new}"], "path must be a checkpoint of a Trainer, which holds a state_dict, got "),
        (["export", "{encoder}", "{new}", "--format=huggingface"], "got a LongNet whose pattern is not causal"),
        (["export", "{encoder}", "{encoder}/new"], "Not a directory"),
        (["generate", "{here}/images.ckpt"], "checkpoint must be of a model that predicts tokens, got a LongViT"),
        (["generate", "{here}/broken.ckpt"], "weights must hold norm.weight, which is missing"),
        (["generate", "{here}/latin.txt"], "path must be a checkpoint of tensors and plain values"),
        (["generate", "{here}/a.ckpt", "--prompt-file={here}/latin.txt"], "--prompt-file must hold text in UTF-8"),
    ],
)
def test_mistakes_are_one_line(theirs, words, message, tmp_path, capsys):
    config = LongNetConfig(Pattern.dense(), vocab_size=5, dim=8, layers=1, heads=2)
    write_checkpoint(LongNet(config), tmp_path / "encoder.ckpt")
    images = LongViTConfig(Pattern.dense(), dim=8, layers=1, heads=2, classes=2, image_size=8, patch_size=4)
    write_checkpoint(LongViT(images), tmp_path / "images.ckpt")
    broken = torch.load(tmp_path / "encoder.ckpt")
    del broken["state_dict"]["model.norm.weight"]
    torch.save(broken, tmp_path / "broken.ckpt")
    (tmp_path / "latin.txt").write_bytes(b"na\xefve")
    write_checkpoint(
        LongNet(LongNetConfig(Pattern.dense(is_causal=True), dim=8, layers=1, heads=2)), tmp_path / "a.ckpt"
    )
    names = {
        "theirs": theirs,
        "new": str(tmp_path / "new"),
        "encoder": str(tmp_path / "encoder.ckpt"),
        "here": str(tmp_path),
    }
    assert main([word.format(**names) for word in words]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("longnet: error: ")
    assert message in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "new").exists()
