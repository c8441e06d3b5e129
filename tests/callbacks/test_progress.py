"""What is shown of a run: a line that a person reads, on a terminal and in a file."""

import io
import sys

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_longnet.callbacks import MemoryMonitor, TokenThroughput, TrainingProgress
from lightning_longnet.callbacks.progress import _short, described


class Tiny(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def training_step(self, batch, _):
        loss = self.layer(batch).square().mean()
        self.log("train/loss", loss)
        self.log("train/bits_per_byte", loss / 2)
        return loss

    def validation_step(self, batch, _):
        self.log("val/bits_per_byte", self.layer(batch).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(monkeypatch, out, tmp_path):
    monkeypatch.setattr(sys, "stdout", out)
    rows = DataLoader(torch.ones(6, 4), batch_size=1)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=6,
        max_epochs=-1,
        log_every_n_steps=3,
        val_check_interval=6,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[TrainingProgress(), TokenThroughput(1e9, tokens_per_sample=5), MemoryMonitor()],
    )
    trainer.fit(Tiny(), rows, rows)
    return out.getvalue()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_file_has_a_line_for_each_logging_step(monkeypatch, tmp_path):
    lines = run(monkeypatch, io.StringIO(), tmp_path).splitlines()
    assert not [line for line in lines if "\r" in line or "%|" in line]
    train = [line for line in lines if line.startswith("train ")]
    assert [line.split(",")[0] for line in train] == ["train 3/6", "train 6/6"]
    for word in (" bits/byte", " tokens/s", "MFU ", " GiB"):
        assert word in train[0], train
    assert [line.split(",")[0] for line in lines if line.startswith(("check", "validate"))] == [
        "check 2/2",
        "validate 6/6",
    ]
    assert len(lines) == 4


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_terminal_has_a_bar(monkeypatch, tmp_path):
    monkeypatch.setattr("lightning_longnet.callbacks.progress.RequirementCache", lambda _: False)
    shown = run(monkeypatch, Terminal(), tmp_path)
    last = [line for line in shown.replace("\n", "\r").split("\r") if "train" in line][-1]
    assert "6/6" in last
    assert "tokens/s" in last
    assert "val " in last


class Shown:
    """What `described` reads of a Trainer."""

    callbacks = ()

    def __init__(self, **figures):
        self.callback_metrics = {name.replace("__", "/"): torch.tensor(x) for name, x in figures.items()}


def test_the_figures_of_a_line_have_one_unit():
    losses = {"train__loss": 3.5, "val__loss": 3.25}
    shown = described(Shown(**losses, train__bits_per_byte=5.0, val__bits_per_byte=4.75))
    assert shown == "train 5.000 bits/byte, val 4.750 bits/byte"
    assert described(Shown(**losses)) == "train loss 3.500, val loss 3.250"
    assert described(Shown(val_loss=2.0, loss=1.0)) == "train loss 1.000, val loss 2.000"


def test_numbers_are_short():
    assert [_short(x) for x in (7, 9_999, 12_345, 1_500_000, 2.5e9)] == ["7", "9,999", "12.3k", "1.5M", "2.5G"]


def test_a_refresh_rate_is_at_least_one():
    with pytest.raises(ValueError, match="refresh_rate must be"):
        TrainingProgress(0)
