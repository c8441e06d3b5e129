"""What goes wrong on the first day with a model of transformers, and the one line that says so."""

import sys
from importlib import util

import pytest
import torch
from decoder_runs import CONFIG, VOCABULARY, module, rows
from torch.utils.data import DataLoader
from trained import collated, quiet, trainer_of

from lightning_longnet import CausalLMModule, SplitMismatch
from lightning_longnet.huggingface.models import check_splits
from lightning_longnet.strategies import RingSequenceParallelStrategy

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
IDS = torch.randint(VOCABULARY, (4, 20), generator=torch.Generator().manual_seed(1))
SHIFTED = {"input_ids": IDS[:, :-1], "labels": IDS[:, 1:]}
PADDED = torch.ones(4, 19).long()
PADDED[2, :5] = 0
# what is in a batch, and what is said of it
BATCHES = {
    "unshifted": ({"input_ids": IDS, "labels": IDS}, "labels must be shifted by the data"),
    "unshifted and masked": ({"input_ids": IDS, "labels": IDS.masked_fill(IDS < 9, -100)}, "labels must be shifted"),
    "left": ({**SHIFTED, "attention_mask": PADDED}, "padding before tokens: set tokenizer.padding_side = 'right'"),
    "pairs": ({**SHIFTED, "attention_mask": torch.ones(4, 1, 19, 19)}, r"attention_mask must be \(B, N\)"),
    "lengths": ({**SHIFTED, "cu_seq_lens_q": torch.tensor([0, 19])}, "cu_seq_lens_q is not read: give documents"),
    "no labels": ({"input_ids": IDS}, "batch must be a dictionary that holds input_ids and labels, got input_ids"),
}


class One(torch.utils.data.Dataset):
    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return 1

    def __getitem__(self, _):
        return self.batch


def fit_batch(rank, world, batch, sequence_parallel_size=1):
    strategy = "auto" if world == 1 else RingSequenceParallelStrategy(sequence_parallel_size, "ddp", split_check="off")
    with quiet():
        net = module("float32", attention="sdpa" if world == 1 else "ring")
        trainer_of(strategy, world, max_steps=1).fit(net, DataLoader(One(batch), batch_size=None))


@pytest.mark.parametrize("kind", BATCHES)
def test_a_batch_that_trains_something_else_is_refused(kind):
    batch, message = BATCHES[kind]
    with pytest.raises(ValueError, match=message):
        fit_batch(0, 1, batch)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["unshifted", "left"])
def test_all_ranks_refuse_it_together(trainers, kind):
    batch, message = BATCHES[kind]
    for is_result, value in trainers.outcomes(2, fit_batch, batch, 2):
        assert not is_result
        assert value[0] is ValueError
        assert message in value[1]


@pytest.mark.parametrize("labels", [IDS[:, 1:], torch.full((4, 19), -100), torch.zeros(4, 19).long()])
def test_right_labels_are_taken(labels):
    ids = IDS[:, :-1] if labels.any() else labels  # a row of one token predicts itself
    fit_batch(0, 1, {"input_ids": ids, "labels": labels})


def test_transformers_names_are_read():
    net = module("float64", attention="sdpa")
    documents = torch.arange(19) // 7
    positions = (torch.arange(19) % 7).expand(4, -1)
    ours = {**SHIFTED, "positions": positions, "documents": documents.expand(4, -1)}
    theirs = {"input_ids": SHIFTED["input_ids"], "shift_labels": SHIFTED["labels"], "position_ids": positions}
    expected, result = (net._losses(batch) for batch in (ours, theirs))
    torch.testing.assert_close(result, expected)
    assert result.loss_sum != net._losses(SHIFTED).loss_sum


def losses_without_positions(rank, world):
    """Return the loss of the whole batch without positions, and that with them, on these ranks."""
    documents, losses = torch.arange(19).expand(4, -1) // 7, []
    for positions in ({}, {"positions": torch.arange(19).expand(4, -1) % 7}):
        strategy = "auto" if world == 1 else RingSequenceParallelStrategy(world, "ddp")
        torch.manual_seed(0)
        with quiet():
            trainer = trainer_of(strategy, world, max_steps=1, precision="64-true")
            batch = {**SHIFTED, "documents": documents, **positions}
            trainer.fit(module("float64", attention="ring"), DataLoader(One(batch), batch_size=None))
        losses.append(float(trainer.callback_metrics["train/loss"]))
    return losses


def test_positions_that_are_left_out_are_those_of_each_document(trainers):
    alone = losses_without_positions(0, 1)
    assert alone[0] == pytest.approx(alone[1], rel=1e-12)
    for without, given in trainers.run(2, losses_without_positions):
        assert without == pytest.approx(given, rel=1e-12)
        assert without == pytest.approx(alone[0], rel=1e-9)


def test_a_cache_is_off_in_training_and_on_in_the_export(tmp_path):
    from transformers import AutoModelForCausalLM

    net = module("float32")
    assert not net.model.config.use_cache
    net.model.config.use_cache = True  # as a user may
    net._losses(SHIFTED)[0].backward()
    net.save_pretrained(tmp_path / "exported")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "exported").config.use_cache


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": {"model_type": "t5"}}, "must be a causal language model of transformers.*got 't5'"),
        ({"config": {"model_type": "bert", "hidden_size": 32}}, "must be causal, got 'bert' with is_decoder False"),
        ({"config": {"model_type": "qwen33"}}, "model_type of an architecture of transformers, .*got 'qwen33'"),
        ({"config": {**CONFIG, "hiden_size": 3}}, "config has 'hiden_size', which a configuration of qwen3 has not"),
        ({}, "one of model, name and config must be given, got none"),
        ({"name": "a", "config": CONFIG}, "one of model, name and config must be given, got name and config"),
        ({"name": "./nowhere/at-all"}, "name must be that of a Hugging Face model, or the folder of one"),
        ({"model": torch.nn.Linear(2, 2)}, "must be a model of transformers, its configuration, or a name, got Linear"),
        ({"config": CONFIG, "recompute": "all"}, "recompute must be one of 'nothing', 'all but attention'"),
        ({"config": CONFIG, "lora": {"rank": 3}}, "lora must hold arguments of peft.LoraConfig"),
        ({"config": CONFIG, "lora": {"target_modules": ["lm_head"]}}, "must not name the output head"),
        ({"config": CONFIG, "overrides": {"a": 1}}, "overrides are of the configuration of a name"),
        ({"config": CONFIG, "attention": "rign"}, "attention must be 'ring' or .*, got 'rign'; did you mean 'ring'"),
    ],
)
def test_another_model_is_refused(options, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=message):
        CausalLMModule(**options)


def test_an_encoder_is_refused():
    from transformers import AutoConfig, AutoModel

    body = AutoModel.from_config(AutoConfig.for_model(**CONFIG))
    with pytest.raises(ValueError, match="must predict tokens, got a Qwen3Model without an output head"):
        CausalLMModule(body)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "mamba", "vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 1},
            "Mamba.*cannot be split",
        ),
        (
            {
                **{"model_type": "lfm2", "vocab_size": 29, "hidden_size": 16, "intermediate_size": 16},
                **{"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2},
                "layer_types": ["conv", "full_attention"],
            },
            "cannot be split over ranks: .*layers of the kind 'conv'",
        ),
        (
            {"model_type": "bloom", "vocab_size": 29, "hidden_size": 16, "n_layer": 1, "n_head": 2},
            "BloomForCausalLM computes attention itself",
        ),
    ],
)
def test_what_cannot_be_split_is_named_before_the_first_step(config, message):
    net = CausalLMModule(config=config, attention="eager")
    with pytest.raises(ValueError, match=message):
        check_splits(net.model)
    net._losses(SHIFTED_SMALL)[0].backward()  # whole sequences are trained


SHIFTED_SMALL = {name: x % 29 for name, x in SHIFTED.items()}


class Mixed(torch.nn.Module):
    """A feed-forward that adds what came before on this rank, whose source says nothing of attention."""

    def __init__(self, own):
        super().__init__()
        self.own = own

    def forward(self, x):
        return self.own(x.cumsum(1))


def fit_mixed(rank, world):
    with quiet():
        net = module("float32")
        layer = net.model.model.layers[1]
        layer.mlp = Mixed(layer.mlp)
        strategy = RingSequenceParallelStrategy(2, "ddp", split_check="error")
        trainer_of(strategy, world, max_steps=1).fit(net, DataLoader(rows(4), 2, collate_fn=collated))


@pytest.mark.long
def test_the_split_check_catches_the_rest(trainers):
    for is_result, value in trainers.outcomes(2, fit_mixed):
        assert not is_result
        assert issubclass(value[0], SplitMismatch)
        assert "model.model.layers.1.mlp" in value[1]


def test_attention_of_transformers_does_not_share_sequences(trainers):
    for is_result, value in trainers.outcomes(2, fit_sdpa):
        assert not is_result
        assert "attn_implementation must be \"ring\", got 'sdpa'" in value[1]


def fit_sdpa(rank, world):
    with quiet():
        strategy = RingSequenceParallelStrategy(2, "ddp", split_check="off")
        net = module("float32", attention="sdpa")
        trainer_of(strategy, world, max_steps=1).fit(net, DataLoader(rows(4), 2, collate_fn=collated))


@pytest.mark.parametrize("package", ["transformers", "peft"])
def test_a_package_that_is_missing_is_named(package, monkeypatch):
    find = util.find_spec
    for name in ("models", "adapters"):
        monkeypatch.setattr(
            sys.modules[f"lightning_longnet.huggingface.{name}"],
            "find_spec",
            lambda name: None if name == package else find(name),
        )
    extra = {"transformers": "hf", "peft": "peft"}[package]
    with pytest.raises(ModuleNotFoundError, match=rf"needs {package}: pip install 'lightning-longnet\[{extra}\]'"):
        CausalLMModule(config=CONFIG, lora={"r": 2})


def test_another_vocabulary_is_refused(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folders = []
    for name, words in (("own", "abc"), ("other", "abd"), ("large", [str(i) for i in range(VOCABULARY + 3)])):
        tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
        folders.append(str(tmp_path / name))
        PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token=words[0]).save_pretrained(folders[-1])
    own, other, large = folders
    module("float32").save_pretrained(tmp_path / "model")
    for file in (tmp_path / "own").iterdir():
        file.rename(tmp_path / "model" / file.name)
    net = CausalLMModule(name=str(tmp_path / "model"), attention="sdpa")
    net.check_vocabulary(None)
    for folder in (own, str(tmp_path / "model")):
        if folder != own:
            net.check_vocabulary(Named(folder, 3))
    with pytest.raises(ValueError, match=r"data\.tokenizer is .*other.*they differ in 'c'"):
        net.check_vocabulary(Named(other, 3))
    with pytest.raises(ValueError, match="it has 64 tokens, and the embedding of the Qwen3ForCausalLM 61"):
        net.check_vocabulary(Named(large, 64))
    with pytest.raises(ValueError, match=r"data\.tokenizer is 'bytes'"):
        net.check_vocabulary(Named("bytes", 3))


class Named:
    def __init__(self, tokenizer_name, vocab_size):
        self.tokenizer_name, self.vocab_size = tokenizer_name, vocab_size
