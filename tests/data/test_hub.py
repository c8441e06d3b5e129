"""Texts of Hugging Face `datasets` and tokenizers, all of them made here: nothing is downloaded."""

import functools
import json
import operator

import pytest
import torch
from tiers import tiered

from lightning_longnet import HubData, TokenData, TokenFileData
from lightning_longnet.cli import main
from lightning_longnet.data.tokenizers import tokenizer_of

TEXTS = [f"text {i} tells that {i} plus {i} is {2 * i}" + "." * (i % 5) for i in range(60)]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:(transformers|datasets|dill|multiprocess).*")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A folder with a tokenizer of 150 words, trained on the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    result = Tokenizer(models.BPE())
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    result.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet)
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=result, eos_token="<end>").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def lines(tmp_path):
    (path := tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(path)


def made(path, **options):
    data = HubData(path, **{"tokens": 16, "batch_size": 2, "validation_share": 0.2} | options)
    data.prepare_data()
    data.setup("fit")
    return data


def whole(rows):
    stream = rows.stream.stream
    return stream.read(0, len(stream))


def saved(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    return str(tmp_path / "saved")


@pytest.mark.parametrize("kind", ["jsonl", "saved", "txt"])
def test_texts_become_a_stream(tmp_path, lines, kind, tokenizer):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    path = {"jsonl": lines, "saved": saved(tmp_path), "txt": str(tmp_path / "texts.txt")}[kind]
    data = made(path, tokenizer=tokenizer)
    assert isinstance(data, TokenData)
    tool = tokenizer_of(tokenizer)
    expected = [[*tool.encode(text), tool.end] for text in TEXTS]
    assert whole(data.train_rows).tolist() == functools.reduce(operator.iadd, expected, [])
    assert (
        data.train_rows.stream.stream.starts.tolist() == torch.tensor([0, *map(len, expected)]).cumsum(0)[:-1].tolist()
    )
    assert data.bytes_per_token == sum(map(len, TEXTS)) / sum(map(len, expected))
    assert data.vocab_size == len(tool._tokenizer)
    assert data.decode(data.encode(TEXTS[3])) == TEXTS[3]
    batch = next(iter(data.train_dataloader()))
    assert torch.equal(batch["input_ids"][:, 1:], batch["labels"][:, :-1])


def test_any_stretch_of_texts(lines):
    stream = made(lines).train_rows.stream.stream
    everything = stream.read(0, len(stream))
    for begin, end in [(0, 1), (3, 90), (30, 31), (len(stream) - 40, len(stream)), (0, 0)]:
        assert torch.equal(stream.read(begin, end), everything[begin:end])
    borders = stream.starts.tolist()[1:4]
    assert torch.equal(stream.read(borders[0], borders[2]), everything[borders[0] : borders[2]])


def test_texts_are_packed(lines):
    data = made(lines, packed=True, tokens=64)
    for batch in data.train_dataloader():
        ends = (batch["input_ids"] == 0) & (batch["labels"] == -100)
        assert ends.any(1).all()


def test_another_split_and_another_column(tmp_path):
    import datasets

    splits = {"train": TEXTS[:40], "test": TEXTS[40:]}
    datasets.DatasetDict({k: datasets.Dataset.from_dict({"body": v}) for k, v in splits.items()}).save_to_disk(
        tmp_path / "d"
    )
    data = made(str(tmp_path / "d"), column="body", validation_split="test")
    stream = data.val_rows.stream
    assert data.decode(stream.read(0, len(stream))) == "".join(text + "\0" for text in TEXTS[40:])
    with pytest.raises(ValueError, match="column must be one of body, got 'text'"):
        made(str(tmp_path / "d"))
    with pytest.raises(ValueError, match=r"splits must be of .*, train, test, got 'training'"):
        made(str(tmp_path / "d"), column="body", split="training")


@pytest.mark.parametrize("workers", tiered([0, 2], quick=[0]))
def test_streamed(lines, tokenizer, workers):
    data = made(lines, streaming=True, tokenizer=tokenizer, num_workers=workers)
    tool = tokenizer_of(tokenizer)
    ids = {True: [], False: []}
    for number, text in enumerate(TEXTS):
        ids[number % 20 == 19] += [*tool.encode(text), tool.end]
    for is_validation, loader in ((False, data.train_dataloader()), (True, data.val_dataloader())):
        rows = torch.cat([batch["input_ids"] for batch in loader])
        many = (len(ids[is_validation]) - 1) // 16
        many -= 0 if is_validation else many % 2
        assert torch.equal(rows, torch.tensor(ids[is_validation][: 16 * many]).view(many, 16))
    counts = torch.bincount(torch.tensor(ids[True])).double()
    share = counts[counts > 0] / counts.sum()
    assert data.unigram_bits == pytest.approx(float(-(share * share.log2()).sum()))
    assert data.bytes_per_token == pytest.approx(sum(map(len, TEXTS[19::20])) / len(ids[True]))


@pytest.mark.long
def test_tokenize_with_a_tokenizer(tmp_path, tokenizer):
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text("\n".join(TEXTS[15 * i : 15 * i + 15]))
    for workers in (1, 2):
        options = ["--tokenizer", tokenizer, "--workers", str(workers), "--shard-megabytes", "0.001"]
        assert main(["tokenize", str(tmp_path), "--out", str(tmp_path / f"out{workers}"), *options]) == 0
    held = [{p.name: p.read_bytes() for p in (tmp_path / f"out{workers}").iterdir()} for workers in (1, 2)]
    assert held[0] == held[1]
    data = TokenFileData(str(tmp_path / "out1"), tokens=16, validation_share=0.2)
    data.setup("fit")
    stream = data.train_rows.stream.stream
    assert data.vocab_size == 300 - 0 or data.vocab_size > 256
    assert (
        data.decode(stream.read(0, len(stream)))
        == "<end>".join(["\n".join(TEXTS[15 * i : 15 * i + 15]) for i in range(4)]) + "<end>"
    )
    assert data.bytes_per_token > 1.5
    wrong = TokenFileData(str(tmp_path / "out1"), tokens=16, tokenizer="bytes")
    with pytest.raises(ValueError, match="tokenizer must have the vocabulary of the tokens"):
        wrong.encode("x")


def test_what_does_not_fit_is_reported_in_a_line(tmp_path, lines):
    with pytest.raises(FileNotFoundError, match="path must be a dataset of the Hub or one that is there"):
        HubData(str(tmp_path / "missing.jsonl"))
    with pytest.raises(ValueError, match="packed must be False with streaming"):
        HubData(lines, streaming=True, packed=True)
    with pytest.raises(
        ValueError, match="tokenizer must be 'bytes', the name of a Hugging Face tokenizer or the folder"
    ):
        tokenizer_of(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="tokens must be less than the data has"):
        made(lines, tokens=5000)
    with pytest.raises(ValueError, match=r"path .*, split 'training': Unknown split"):
        made(lines, split="training")
    (tmp_path / "gaps.jsonl").write_text('{"text": "a text"}\n{"text": null}\n' * 30)
    for streaming in (False, True):
        with pytest.raises(ValueError, match="column must hold texts, 'text' holds None"):
            made(str(tmp_path / "gaps.jsonl"), streaming=streaming)
    (tmp_path / "few.txt").write_text("\n".join(TEXTS[:10]))
    with pytest.raises(ValueError, match="validation_split must be given where a stream has fewer than 20 texts"):
        made(str(tmp_path / "few.txt"), streaming=True)
