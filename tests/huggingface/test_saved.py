"""Folders that transformers reads and writes: weights, configurations, tokenizers, and models that were resized."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_longnet import LongNet, LongNetConfig, LongNetModule, Pattern, export_model, load_model
from lightning_longnet.checkpointing.checkpoints import write_checkpoint
from lightning_longnet.cli import main
from lightning_longnet.data.tokenizers import tokenizer_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:(Nothing crosses|In the branch)")

SMALL = {"dim": 16, "layers": 2, "heads": 4, "kv_heads": 2}
TEXT = "naïve  日本 \t\n 😀 Ā \0 don't"


def longnet(**changes):
    torch.manual_seed(0)
    pattern = Pattern.dilated((8, 64), (1, 2), is_causal=True)
    return LongNet(LongNetConfig(pattern, **{**SMALL, "vocab_size": 256, **changes})).eval()


def read(folder, **options):
    from lightning_longnet.huggingface.modeling_longnet import LongNetForCausalLM

    return LongNetForCausalLM.from_pretrained(folder, **options)


def tokens(vocab_size=256):
    return torch.randint(vocab_size, (2, 30), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("size", [260, 200])
def test_resized_vocabularies_are_saved_and_read(is_tied, size, tmp_path):
    export_model(longnet(tied_embeddings=is_tied), tmp_path / "out", "huggingface")
    model = read(tmp_path / "out")
    expected = model(tokens(200)).logits
    model.resize_token_embeddings(size)
    ids = tokens(size)
    result = model(ids, labels=ids)
    assert result.logits.shape == (2, 30, size)
    assert result.loss.isfinite()
    torch.testing.assert_close(model(tokens(200)).logits[..., :200], expected[..., :200])
    assert model.config.longnet["vocab_size"] == model.config.vocab_size == model.model.config.vocab_size == size
    model.save_pretrained(tmp_path / "again")
    again = read(tmp_path / "again")
    assert torch.equal(again(ids).logits, result.logits)
    assert (again.get_input_embeddings().weight is again.get_output_embeddings().weight) == is_tied
    assert torch.equal(load_model(tmp_path / "again")(ids), result.logits)


def test_new_tokens_may_begin_as_those_of_a_longnet(tmp_path):
    export_model(longnet(tied_embeddings=False), tmp_path / "out", "huggingface")
    model = read(tmp_path / "out")
    model.resize_token_embeddings(1256, mean_resizing=False)
    for each in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert each.weight[256:].std().item() == pytest.approx(16**-0.5, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_is_that_which_is_asked_for(dtype, tmp_path):
    model = longnet()
    export_model(model.to(torch.bfloat16) if dtype == torch.bfloat16 else model, tmp_path / "out", "huggingface")
    ids = tokens()
    result = read(tmp_path / "out") if dtype == torch.bfloat16 else read(tmp_path / "out", dtype=dtype)
    assert result.dtype == dtype
    assert torch.equal(result(ids).logits, model.to(dtype)(ids))
    assert torch.equal(read(tmp_path / "out").to(dtype)(ids).logits, model(ids))


@pytest.mark.parametrize(
    "name",
    [
        *("blocks.0.attention.qkv_proj.weight", "blocks.0.attention.qkv_proj.bias"),
        *("blocks.1.feed_forward.first.weight", "norm.weight", "position_table"),
    ],
)
def test_a_missing_weight_begins_as_that_of_a_longnet(name, tmp_path):
    name = f"model.{name}"
    export_model(longnet(learned_positions=30), tmp_path / "out", "huggingface")
    file = tmp_path / "out/model.safetensors"
    weights = load_file(file)
    save_file({key: x for key, x in weights.items() if key != name}, file, {"format": "pt"})
    model, info = read(tmp_path / "out", output_loading_info=True)
    assert info["missing_keys"] == {name}
    result = model.state_dict()
    assert result[name].std().item() == pytest.approx(weights[name].std().item(), rel=0.15, abs=1e-6)
    assert all(torch.equal(result[key], x) for key, x in weights.items() if key != name)


# Configurations


def test_fields_of_transformers_follow_those_of_longnet_and_lead_them():
    from lightning_longnet.huggingface.configuration_longnet import LongNetPretrainedConfig
    from lightning_longnet.huggingface.modeling_longnet import LongNetForCausalLM

    values = longnet(learned_positions=30).config.to_dict()
    config = LongNetPretrainedConfig(values)
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (256, 16, 2)
    assert (config.num_attention_heads, config.tie_word_embeddings, config.max_position_embeddings) == (4, True, 30)
    config.vocab_size = 300
    assert LongNetForCausalLM(config)(tokens()).logits.shape == (2, 30, 300)
    assert values["vocab_size"] == 256
    config.longnet["vocab_size"] = 301
    with pytest.raises(ValueError, match="vocab_size must be vocab_size of longnet, 301, got 300"):
        LongNetForCausalLM(config)
    with pytest.raises(ValueError, match="hidden_size must be dim of longnet, 16, got 32"):
        LongNetPretrainedConfig(values, hidden_size=32)
    with pytest.raises(ValueError, match="longnet must be the values of a LongNetConfig, got None"):
        LongNetForCausalLM(LongNetPretrainedConfig())
    with pytest.raises(ValueError, match="the pattern of longnet must be causal in every layer"):
        LongNetForCausalLM(LongNetPretrainedConfig({**values, "pattern": Pattern.dense().to_dict()}))


def test_an_argument_of_reading_changes_both_configurations(tmp_path):
    export_model(longnet(), tmp_path / "out", "huggingface")
    model = read(tmp_path / "out", num_hidden_layers=1)
    assert len(model.model.blocks) == model.config.longnet["layers"] == 1
    with pytest.raises(ValueError, match="does not support Flash Attention 2"):
        read(tmp_path / "out", attn_implementation="flash_attention_2")


@pytest.mark.parametrize(
    ("learned", "trained", "expected"), [(None, None, None), (None, 64, 64), (30, 64, 30), (30, None, 30)]
)
def test_the_length_is_that_of_the_positions_or_of_training(learned, trained, expected, tmp_path):
    export_model(longnet(learned_positions=learned), tmp_path / "out", "huggingface", trained_length=trained)
    values = json.loads((tmp_path / "out/config.json").read_text())
    assert values.get("max_position_embeddings") == expected
    assert getattr(read(tmp_path / "out").config, "max_position_embeddings", None) == expected


# Files beside the weights


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_have_the_usual_mode(mask, tmp_path):
    former = os.umask(mask)
    try:
        export_model(longnet(), tmp_path / "out", "huggingface", tokenizer=tokenizer_of("bytes"))
    finally:
        os.umask(former)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o666 & ~mask}


def test_the_tokens_of_bytes_are_those_of_a_tokenizer_of_transformers(tmp_path):
    from transformers import PreTrainedTokenizerFast

    export_model(longnet(), tmp_path / "out", "huggingface", tokenizer=tokenizer_of("bytes"))
    theirs, ours = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out"), tokenizer_of("bytes")
    for text in (TEXT, "".join(map(chr, range(0x300))), "", "\0"):
        assert theirs(text)["input_ids"] == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert len(theirs) == 256
    assert theirs.decode([255, 65]) == ours.decode([255, 65])
    result = theirs(["ab", "a"], padding=True)
    assert result == {"input_ids": [[97, 98], [0, 97]], "attention_mask": [[1, 1], [0, 1]]}
    config = read(tmp_path / "out").generation_config
    assert (config.eos_token_id, config.pad_token_id, config.use_cache) == (0, 0, True)


@pytest.fixture
def word_tokenizer(tmp_path):
    """The folder of a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "long": 3, "net": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.save_pretrained(tmp_path / "words")
    return str(tmp_path / "words")


def exported(tmp_path, *words, tokenizer=None, tokens=None, vocab_size=256):
    """The exit status of `longnet export` of a checkpoint whose hyper-parameters name a tokenizer."""
    write_checkpoint(longnet(vocab_size=vocab_size), tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt")
    saved["hyper_parameters"] |= {"tokenizer": tokenizer, "tokens": tokens}
    torch.save(saved, tmp_path / "a.ckpt")
    return main(["export", str(tmp_path / "a.ckpt"), str(tmp_path / "out"), "--format=huggingface", *words])


def test_the_tokenizer_of_the_training_is_exported(word_tokenizer, tmp_path, capsys):
    from transformers import PreTrainedTokenizerFast

    assert exported(tmp_path, tokenizer=word_tokenizer, tokens=48) == 0
    assert f"\ntokenizer: {word_tokenizer}\n" in capsys.readouterr().out
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")("long net")["input_ids"] == [3, 4]
    values = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert values == {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "use_cache": True}
    assert read(tmp_path / "out").config.max_position_embeddings == 48


def test_checkpoints_name_the_tokenizer_and_the_length_of_the_training():
    module = LongNetModule(longnet().config)
    module.trainer = SimpleNamespace(datamodule=SimpleNamespace(vocab_size=256, tokenizer_name="bytes", tokens=48))
    module.setup("fit")
    assert (module.hparams["tokenizer"], module.hparams["tokens"]) == ("bytes", 48)


@pytest.mark.parametrize(
    ("words", "known", "shown"),
    [
        ([], None, "none: the checkpoint names none, and --tokenizer adds one"),
        (["--tokenizer=none"], "bytes", "none"),
        (["--tokenizer=bytes"], None, "bytes"),
        ([], "bytes", "bytes"),
    ],
)
def test_the_command_shows_which_tokenizer_it_wrote(words, known, shown, tmp_path, capsys):
    assert exported(tmp_path, *words, tokenizer=known) == 0
    assert capsys.readouterr().out.endswith(f"\ntokenizer: {shown}\n")
    assert (tmp_path / "out/tokenizer.json").exists() == (shown == "bytes")


@pytest.mark.parametrize(
    ("words", "known", "size", "message"),
    [
        ([], "folder", 256, "tokenizer must be 'bytes', the name of a Hugging Face tokenizer or the folder"),
        (["--tokenizer=bytes"], None, 200, "tokenizer must be the model's: 'bytes' has 256 tokens, and the model 200"),
        (["--tokenizer=bytes", "--format=safetensors"], None, 256, "--tokenizer is of --format huggingface, got 'byt"),
    ],
)
def test_a_tokenizer_that_cannot_be_exported_is_refused(words, known, size, message, tmp_path, capsys):
    known = known and str(tmp_path)  # a folder without a tokenizer
    assert exported(tmp_path, *words, tokenizer=known, vocab_size=size) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_plain_folders_have_no_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="tokenizer must be None with format 'safetensors': take 'huggingface'"):
        export_model(longnet(), tmp_path / "out", tokenizer=tokenizer_of("bytes"))
