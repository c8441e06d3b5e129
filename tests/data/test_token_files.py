"""Tokens of `longnet tokenize` as data of a Trainer; the run that writes them is the command's own test."""

import json

import numpy as np
import pytest
import torch

from lightning_longnet import TokenData, TokenFileData
from lightning_longnet.cli import main
from lightning_longnet.data.streams import documents_of

TEXTS = {"a.txt": "one\ntwo\n" * 30, "b/c.txt": "drei\n" * 40, "d.txt": "naïve", "e.txt": ""}


def written(folder, texts):
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def made(tmp_path, capsys):
    def make(*arguments):
        texts = written(tmp_path / "texts", TEXTS)
        assert main(["tokenize", str(texts), "--out", str(tmp_path / "out"), "--workers", "1", *arguments]) == 0
        return tmp_path / "out"

    return make


@pytest.mark.parametrize("shard_megabytes", [64, 2e-4])
def test_bytes_there_and_back(made, shard_megabytes):
    out = made("--shard-megabytes", str(shard_megabytes))
    data = TokenFileData(str(out), tokens=16, batch_size=2)
    assert isinstance(data, TokenData)
    data.setup("fit")
    whole = "\0".join(TEXTS.values())  # the empty file is no document
    stream = data.train_rows.stream.stream
    assert data.decode(stream.read(0, len(stream))) == whole
    ends = [stream.read(begin, end) for begin, end in documents_of(stream)]
    assert [data.decode(each) for each in ends] == [text + "\0" for text in list(TEXTS.values())[:3]]
    description = json.loads((out / "tokens.json").read_text())
    size = len(whole.encode())
    assert (description["tokens"], description["documents"], description["bytes"]) == (size, 3, size - 3)
    assert data.bytes_per_token == (size - 3) / size
    assert (data.vocab_size, data.decode(data.encode("ok"))) == (256, "ok")
    assert len(description["shards"]) == (1 if shard_megabytes == 64 else 2)
    batch = next(iter(data.train_dataloader()))
    assert torch.equal(batch["input_ids"][:, 1:], batch["labels"][:, :-1])


def test_documents_are_packed(made):
    data = TokenFileData(str(made()), tokens=64, packed=True, validation_share=0.3)
    data.setup("fit")
    row = data.val_rows.read(0, 0, 64)
    assert set(row) == {"input_ids", "labels", "documents"}
    assert data.train_rows.stream.starts.tolist() == [0, 241]


def test_arrays_of_anyones(tmp_path):
    np.save(tmp_path / "b.npy", np.arange(200, dtype=np.uint16))
    np.save(tmp_path / "a.npy", np.arange(200, dtype=np.uint16))
    data = TokenFileData(str(tmp_path), tokens=8, batch_size=1, vocab_size=200)
    data.setup("fit")
    assert data.bytes_per_token is None
    assert data.train_rows.stream.starts.tolist() == [0]
    with pytest.raises(ValueError, match=r"tokenizer must be given: nothing in .* says what its tokens stand for"):
        data.encode("x")
    wrong = TokenFileData(str(tmp_path), tokens=8, batch_size=1, vocab_size=100, tokenizer="bytes")
    with pytest.raises(ValueError, match=r"got 100, and token 100 of .*a\.npy is 100"):
        wrong.setup("fit")
    with pytest.raises(
        ValueError, match=r"tokenizer must have the vocabulary of the tokens .* 100, got 'bytes' of 256"
    ):
        wrong.decode(torch.tensor([1]))
    with pytest.raises(ValueError, match=r"vocab_size must be given where there is no tokens\.json"):
        TokenFileData(str(tmp_path))


def test_a_token_outside_of_the_vocabulary_is_named(tmp_path):
    """The training data alone holds it: without a check the embedding says that an index is out of range."""
    tokens = np.arange(1000, dtype=np.uint16) % 100
    np.save(tmp_path / "a.npy", tokens)
    tokens[123] = 107
    np.save(tmp_path / "b.npy", tokens)
    data = TokenFileData(str(tmp_path), tokens=8, vocab_size=100)
    with pytest.raises(ValueError, match=r"vocab_size must be .* got 100, and token 123 of .*b\.npy is 107"):
        data.setup("fit")


def test_a_token_that_is_not_sampled_is_named_when_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_longnet.data.streams.MEASURED", 8)
    monkeypatch.setattr("lightning_longnet.data.streams.CHUNK", 4)
    tokens = np.arange(1000, dtype=np.uint16) % 100
    tokens[123] = 107
    np.save(tmp_path / "a.npy", tokens)
    data = TokenFileData(str(tmp_path), tokens=8, vocab_size=100)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"token 123 of .*a\.npy is 107"):
        list(data.train_dataloader())


def test_a_tokenizer_in_a_folder_is_found_from_elsewhere(tmp_path, monkeypatch):
    import tokenizers
    import transformers

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel({"one": 0, "two": 1, "?": 2}, unk_token="?")),
        eos_token="?",
    )
    tokenizer.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    written(tmp_path, {"texts/a.txt": "one\ntwo\n" * 30})
    tokenizer.save_pretrained(tmp_path / "made")
    monkeypatch.chdir(tmp_path)
    assert main(["tokenize", "texts", "--out", "out", "--workers", "1", "--tokenizer", "made"]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    data = TokenFileData("../out", tokens=8)
    assert data.tokenizer_name == str(tmp_path / "made")
    assert data.encode("two one").tolist() == [1, 0]
    monkeypatch.chdir(tmp_path)
    assert TokenFileData("out", tokens=8, tokenizer="made").tokenizer_name == str(tmp_path / "made")
    (tmp_path / "made").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"tokenizer must be given: .*made, which made the tokens in .*out, is not"):
        TokenFileData("out", tokens=8).encode("two")
    assert TokenFileData("out", tokens=8, tokenizer="moved").encode("two").tolist() == [1]


def test_what_is_not_there_is_reported_in_a_line(tmp_path, made):
    with pytest.raises(FileNotFoundError, match=r"path must be a folder of tokens, there is no folder .*missing"):
        TokenFileData(str(tmp_path / "missing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"path must hold tokens\.json or \.npy files, found none in .*empty"):
        TokenFileData(str(tmp_path / "empty"))
    out = made()
    with pytest.raises(ValueError, match=r"vocab_size must be that of the tokens in .*, 256, got 300"):
        TokenFileData(str(out), vocab_size=300)
    with pytest.raises(ValueError, match="tokens must be less than the data has"):
        TokenFileData(str(out), tokens=400).setup("fit")
    (out / "tokens-00000.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"path must hold all shards .*tokens-00000\.npy is not there"):
        TokenFileData(str(out), tokens=8).setup("fit")
    (out / "tokens.json").rename(out / "unfinished.json")
    for content, message in (("{", r"tokens\.json must be as longnet tokenize leaves it"), ("{}", "has no vocab_size")):
        (tmp_path / "empty/tokens.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            TokenFileData(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"path must hold tokens that are complete: .* goes on where it stopped"):
        TokenFileData(str(out))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": "256"}, "vocab_size in .*tokens.json must be as longnet tokenize leaves it, got '256'"),
        ({"vocab_size": 0}, "vocab_size in"),
        ({"shards": "tokens-00000.npy"}, "shards in"),
        ({"shards": [3]}, "shards in"),
        ({"tokenizer": ["bytes"]}, "tokenizer in"),
        ({"shards": ["../tokens-00000.npy"]}, "must stay in the folder"),
    ],
)
def test_a_description_of_other_values_is_refused(made, changes, message):
    out = made()
    description = json.loads((out / "tokens.json").read_text())
    (out / "tokens.json").write_text(json.dumps(description | changes))
    with pytest.raises(ValueError, match=message):
        TokenFileData(str(out), tokens=16)


@pytest.mark.parametrize("starts", [[0, 10**6], [-1, 5], [5, 0], [[0, 1]], [0.5]])
def test_documents_that_begin_nowhere_are_refused(made, starts):
    out = made()
    np.save(out / "documents-00000.npy", np.array(starts))
    with pytest.raises(ValueError, match=r"documents-00000\.npy must hold (a row of integers|ascending indices)"):
        TokenFileData(str(out), tokens=16, packed=True).setup("fit")
