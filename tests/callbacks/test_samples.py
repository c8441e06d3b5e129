"""Texts are written by all ranks together, kept beside the run, and change nothing of the training."""

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_longnet.callbacks import GenerateSamples


class Writer(L.LightningModule):
    """Writes the seed, so to speak; with draws of its own from the global generator."""

    def __init__(self):
        super().__init__()
        self.layer, self.calls, self.drawn = nn.Linear(4, 4), [], []

    def training_step(self, batch, _):
        self.drawn.append(torch.rand(()).item())
        return self.layer(batch).square().mean()

    def validation_step(self, batch, _): ...

    def generate(self, input_ids, tokens, temperature=1.0, top_k=None, seed=0):
        torch.rand(3)
        self.calls.append((self.training, torch.is_grad_enabled(), tuple(input_ids.shape), temperature, top_k, seed))
        return torch.cat((input_ids, torch.full((1, tokens), 65 + len(self.calls))), 1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Text(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(torch.ones(4, 4), batch_size=1)

    val_dataloader = train_dataloader

    def encode(self, text):
        return torch.tensor(list(text.encode()))

    def decode(self, ids):
        return bytes(ids.tolist()).decode()


def run(folder, *callbacks):
    L.seed_everything(1)
    module = Writer()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=CSVLogger(folder, "run", 0),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(module, Text())
    return module, folder / "run/version_0/samples.txt"


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_texts_are_kept_and_training_goes_on_as_without(tmp_path, capsys):
    plain, _ = run(tmp_path / "plain")
    writing = GenerateSamples(["ab", "xyz"], tokens=3, every_n_steps=2, temperature=0.5, top_k=7, seed=4)
    module, path = run(tmp_path / "with", writing)
    assert module.drawn == plain.drawn
    assert module.calls == [(False, False, (1, n), 0.5, 7, 4) for n in (2, 3, 2, 3)]
    assert module.training
    assert path.read_text().split("--- ") == [
        "",
        "step 2, sample 0\nabBBB\n",
        "step 2, sample 1\nxyzCCC\n",
        "step 4, sample 0\nabDDD\n",
        "step 4, sample 1\nxyzEEE\n",
    ]
    assert "xyzEEE" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_by_default_at_the_end_of_each_validation(tmp_path, capsys):
    module, path = run(tmp_path, GenerateSamples(["ab"], tokens=1, prints=False))
    assert len(module.calls) == 1  # not at the check before training
    assert path.read_text() == "--- step 4, sample 0\nabB\n"
    assert "sample 0" not in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_what_is_missing_is_said_before_training(tmp_path, monkeypatch):
    monkeypatch.delattr(Text, "decode")
    with pytest.raises(ValueError, match="GenerateSamples needs `decode` of the data module, which Text has not"):
        run(tmp_path, GenerateSamples())


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_prompt_of_no_token_is_said_before_training(tmp_path):
    _, path = run(tmp_path, GenerateSamples(tokens=1))
    assert path.read_text().endswith("\nB\n"), "by default a line's end is continued"
    with pytest.raises(ValueError, match="prompts must each be a token of the data at least, got '', which is none"):
        run(tmp_path, GenerateSamples(["ab", ""]))


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="prompts must be a list"):
        GenerateSamples("text")
    with pytest.raises(ValueError, match="tokens must be"):
        GenerateSamples(tokens=0)
