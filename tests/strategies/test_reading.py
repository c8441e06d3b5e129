"""What each engine saved is read without a Trainer: the same weights, and what the module was made with."""

import pickle

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_training import FLOAT32, FLOAT64
from tiers import tiered
from torch import nn
from trained import Module, adamw, fit, fit_and_save, quiet, sgd, trainer_of

from lightning_longnet import Pattern
from lightning_longnet.checkpointing.checkpoints import read_checkpoint
from lightning_longnet.models.longnet import LongNet, LongNetConfig

PATTERN = Pattern.dilated((8, 64), (1, 2), is_causal=True)


def check(path, results, tolerance):
    result = read_checkpoint(path)
    assert result.hyper_parameters == {}
    _, parameters = results[0]
    assert set(result.state_dict) == {f"model.{name}" for name in parameters}
    for name, expected in parameters.items():
        read = result.state_dict[f"model.{name}"]
        assert read.device.type == "cpu"
        torch.testing.assert_close(read, expected, rtol=tolerance, atol=tolerance, check_dtype=tolerance == 0)


@pytest.mark.parametrize("sharding", tiered(["ddp", "fsdp2", "hsdp"], quick=["fsdp2"], long=["hsdp"]))
def test_weights_of_each_engine_are_read(trainers, sharding, tmp_path):
    setting = {**FLOAT64, "micro_batches": 4}
    results = trainers.run(2, fit_and_save, setting, sharding, 2, str(tmp_path))
    last = max(tmp_path.glob("step=*.ckpt"))
    assert last.is_dir() == (sharding != "ddp")
    check(last, results, 0)


@pytest.mark.parametrize("stage", tiered([1, 2, 3], quick=[], full=[1, 2]))
def test_weights_of_deepspeed_are_read(deepspeed_trainers, stage, tmp_path):
    setting = {**FLOAT32, "optimizer": adamw, "micro_batches": 4}
    results = deepspeed_trainers(2).run(2, fit_and_save, setting, f"deepspeed_stage_{stage}", 2, str(tmp_path))
    check(max(tmp_path.glob("step=*.ckpt")), results, 1e-6)


def fit_one_file(rank, world, setting, folder):
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    return fit(rank, world, setting, "fsdp2", world, callbacks=[saving], engine={"save_distributed_checkpoint": False})


def test_fsdp2s_one_file_is_read(trainers, tmp_path):
    results = trainers.run(2, fit_one_file, {**FLOAT64, "micro_batches": 4}, str(tmp_path))
    last = max(tmp_path.glob("step=*.ckpt"))
    assert last.is_file()
    check(last, results, 0)


class Made(Module):
    """Saves what it was made with, as a mapping or as the objects themselves."""

    def __init__(self, config, as_mapping):
        super().__init__(LongNet(config), sgd)
        if as_mapping:
            self.save_hyperparameters({"config": config.to_dict(), "as_mapping": True})
        else:
            self.save_hyperparameters()


@pytest.mark.parametrize("as_mapping", [True, False])
@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_hyper_parameters_are_read(trainers, sharding, as_mapping, tmp_path):
    ((weights, config),) = trainers.run(1, save_only, sharding, as_mapping, str(tmp_path / "made.ckpt"))
    result = read_checkpoint(tmp_path / "made.ckpt")
    assert result.hyper_parameters == {"config": config.to_dict() if as_mapping else config, "as_mapping": as_mapping}
    assert {name: x.tolist() for name, x in result.state_dict.items()} == weights


def save_only(rank, world, sharding, as_mapping, path):
    from lightning_longnet.strategies import RingSequenceParallelStrategy

    config = LongNetConfig(PATTERN, vocab_size=7, dim=8, layers=1, heads=2)
    module = Made(config, as_mapping)
    weights = {name: x.tolist() for name, x in module.state_dict().items()}
    with quiet():
        trainer = trainer_of(RingSequenceParallelStrategy(sharding=sharding), world, max_steps=0)
        tokens = torch.zeros(1, 4, dtype=torch.long)
        trainer.fit(module, [{"input_ids": tokens, "labels": tokens}])
        trainer.save_checkpoint(path)
    return weights, config


class Ran:
    """Unpickled, it would have run."""

    def __reduce__(self):
        return exec, ("raise SystemExit('it ran')",)


def test_what_is_no_checkpoint_is_reported(tmp_path):
    with pytest.raises(ValueError, match=r"path must be a checkpoint, got .*none\.ckpt, which does not exist"):
        read_checkpoint(tmp_path / "none.ckpt")
    with pytest.raises(ValueError, match=r"path must be a checkpoint: a file, or a folder .* a folder without"):
        read_checkpoint(tmp_path)
    for content, message in ((b"", "is empty"), (b"PK\x03\x04 and so on", "is damaged or cut off")):
        (tmp_path / "text.ckpt").write_bytes(content)
        with pytest.raises(ValueError, match=rf"text\.ckpt {message}"):
            read_checkpoint(tmp_path / "text.ckpt")
    texts = (
        b"no checkpoint",
        b"some text\n",
        b"\x80",
        b"\xe4\xe4",
        b"h\xe4llo",
        b"K",
        b"q\n",
    )
    for content in (*texts, pickle.dumps({"state_dict": Ran()}, protocol=2)):
        (tmp_path / "text.ckpt").write_bytes(content)
        with pytest.raises(ValueError, match=r"path must be a checkpoint of tensors and plain values, .*text\.ckpt"):
            read_checkpoint(tmp_path / "text.ckpt")
    for content in (nn.Linear(1, 1).state_dict(), [1], {"state_dict": 3}, {"state_dict": Ran()}):
        torch.save(content, tmp_path / "other.ckpt")
        with pytest.raises(ValueError, match=r"path must be a checkpoint of (a Trainer|tensors and plain values)"):
            read_checkpoint(tmp_path / "other.ckpt")


def test_what_was_read_does_not_follow_the_file(tmp_path):
    torch.save({"state_dict": {"model.x": torch.ones(300_000)}}, tmp_path / "a.ckpt")
    result = read_checkpoint(tmp_path / "a.ckpt")
    with open(tmp_path / "a.ckpt", "r+b") as file:
        file.write(b"\0" * 1_000_000)
    assert (result.state_dict["model.x"] == 1).all()
