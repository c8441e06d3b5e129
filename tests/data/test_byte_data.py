"""Bytes of files as data of a Trainer, and what all such data offers."""

import pytest
import torch

from lightning_longnet import ByteData, TokenData


def made(tmp_path, text=b"abab" * 100, stage="fit", **options):
    (tmp_path / "a.txt").write_bytes(text)
    settings = {"paths": str(tmp_path), "tokens": 16, "batch_size": 2, "pattern": "*.txt", "validation_share": 0.25}
    data = ByteData(**settings | options)
    data.setup(stage)
    return data


def test_what_it_offers(tmp_path):
    data = made(tmp_path)
    assert isinstance(data, TokenData)
    assert (data.vocab_size, data.bytes_per_token, data.unigram_bits) == (256, 1.0, 1.0)
    text = "naïve — 文"
    assert data.decode(data.encode(text)) == text
    assert data.encode(text).tolist() == list(text.encode())
    assert data.decode(torch.tensor([97, 256, 98, 70_000])) == "a\ufffdb\ufffd", "a model may know more tokens"


def test_one_path_of_any_kind(tmp_path):
    made(tmp_path)
    data = ByteData(tmp_path / "a.txt", tokens=16)
    data.setup("fit")
    assert len(data.train_rows) == 23


def test_the_end_is_kept_for_validation(tmp_path):
    data = made(tmp_path, bytes(range(200)) * 2, megabytes=200 / 2**20)
    train = torch.cat([batch["input_ids"].flatten() for batch in data.train_dataloader()])
    val = torch.cat([batch["input_ids"].flatten() for batch in data.val_dataloader()])
    assert train.max() < 150
    assert val.tolist() == list(range(150, 150 + 48))
    assert [len(batch["labels"]) for batch in data.val_dataloader()] == [2, 1]
    assert torch.equal(next(iter(data.test_dataloader()))["labels"], next(iter(data.val_dataloader()))["labels"])
    assert len(data.predict_dataloader()) == 2


def test_the_order_goes_by_its_seed(tmp_path):
    raw = bytes(i % 251 for i in range(2000))

    def first(seed):
        return next(iter(made(tmp_path, raw, seed=seed).train_dataloader()))["input_ids"]

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_the_standard_library_by_default():
    data = ByteData(megabytes=0.5)
    data.setup("fit")
    assert len(data.train_rows) + len(data.val_rows) == 121 + 6
    assert 4 < data.unigram_bits < 6
    assert "import" in data.decode(torch.cat([batch["input_ids"].flatten() for batch in data.val_dataloader()]))


def test_packed_files(tmp_path):
    for i in range(9):
        (tmp_path / f"{i}.txt").write_bytes(bytes([65 + i]) * (i + 2))
    data = ByteData(str(tmp_path), 16, 1, "*.txt", packed=True, validation_share=0.2)
    data.setup("fit")
    for batch in data.train_dataloader():
        for document in batch["documents"].unique():
            here = batch["documents"] == document
            assert len(batch["input_ids"][here].unique()) == 1
            targets = batch["labels"][here]
            assert targets[-1] == -100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "tokens must be a positive integer, got 0"),
        ({"batch_size": 1.5}, "batch_size must be a positive integer, got 1.5"),
        ({"validation_share": 1.0}, "validation_share must be more than 0 and less than 1, got 1.0"),
        ({"paths": []}, r"paths must name files or folders, or be None for the standard library, got \[\]"),
        ({"num_workers": -1}, "num_workers must be an integer, at least 0, got -1"),
        ({"megabytes": 0}, "megabytes must be more than 0, or None for all, got 0"),
        ({"tokens": 100}, "tokens must be less than the data has: 300 tokens for training and 100 for validation"),
    ],
)
def test_what_does_not_fit_is_reported_in_a_line(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        made(tmp_path, **options)


def test_too_few_rows_for_a_batch(tmp_path):
    with pytest.raises(
        ValueError, match="batch_size must leave a batch for each of the 1 groups of ranks: there are 18"
    ):
        made(tmp_path, batch_size=19).train_dataloader()
