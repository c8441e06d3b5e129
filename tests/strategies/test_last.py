"""What `ckpt_path="last"` finds."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from test_training import FLOAT32
from trained import fit, fit_and_save, quiet, trainer_of

from lightning_longnet import ManifestCheckpointIO
from lightning_longnet.strategies import RingSequenceParallelStrategy
from lightning_longnet.strategies.last import checkpoint_folders


def save(path, **content):
    ManifestCheckpointIO().save_checkpoint({"state_dict": {"x": torch.ones(1)}, "global_step": 1, **content}, path)
    return str(path)


def trainer_in(folder, **options):
    with quiet():
        saving = ModelCheckpoint(folder, **options)
        strategy = RingSequenceParallelStrategy(sharding="ddp")
        return trainer_of(strategy, 1, callbacks=[saving], enable_checkpointing=True, default_root_dir=folder.parent)


def last(trainer, stage):
    return trainer._checkpoint_connector._parse_ckpt_path(stage, "last", model_provided=True, model_connected=True)


@pytest.mark.parametrize("filename", ["{epoch}-{val/loss:.2f}", "{epoch}-{val/loss:.2f}-{val/acc:.2f}"])
def test_names_with_a_slash_are_found(tmp_path, filename):
    trainer = trainer_in(tmp_path / "run", filename=filename)
    name = trainer.checkpoint_callback.format_checkpoint_name(
        {"epoch": torch.tensor(0), "val/loss": torch.tensor(1.0), "val/acc": torch.tensor(2.0)}
    )
    saved = save(name if str(name).startswith("/") else tmp_path / "run" / name, callbacks={})
    assert last(trainer, TrainerFn.FITTING) == saved
    save(tmp_path / "run/other.ckpt/inside.ckpt", callbacks={})
    assert tmp_path / "run/other.ckpt" not in checkpoint_folders(trainer)


def test_folders_inside_may_be_of_other_runs(tmp_path):
    save(tmp_path / "run/other/step=1.ckpt", callbacks={})
    assert checkpoint_folders(trainer_in(tmp_path / "run")) == [tmp_path / "run"]


def test_weights_alone_are_tested_and_not_resumed_from(tmp_path):
    saved = save(tmp_path / "run/step=1.ckpt")
    trainer = trainer_in(tmp_path / "run")
    assert last(trainer, TrainerFn.TESTING) == saved
    with pytest.raises(ValueError, match="must find a checkpoint to go on from"):
        last(trainer, TrainerFn.FITTING)


def fit_from_unlike_choices(rank, world, folder, chosen):
    """Losses and warnings of a run whose ranks have found different checkpoints."""
    said = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("lightning_longnet.strategies.saves.rank_zero_warn", lambda text, category: said.append(text))
        losses, _ = fit(rank, world, FLOAT32, "ddp", world, chosen[rank], timeout=20)
    return losses, said


@pytest.mark.long
def test_all_ranks_take_what_the_first_finds(trainers, tmp_path):
    ((whole, _), _) = trainers.run(2, fit_and_save, FLOAT32, "ddp", 2, str(tmp_path))
    path = str(tmp_path / "step=1.ckpt")
    for chosen, expected in (((path, None), whole[2:]), ((None, path), whole)):
        (rest, said), (others, _) = trainers.run(2, fit_from_unlike_choices, str(tmp_path), chosen)
        assert rest == others == expected
        assert any("rank 1 finds" in text and "what rank 0 finds" in text for text in said), said


def test_the_first_rank_alone_raises(tmp_path, monkeypatch):
    save(tmp_path / "run/step=1.ckpt")
    trainer = trainer_in(tmp_path / "run")
    monkeypatch.setattr("lightning.fabric.utilities.rank_zero.rank_zero_only.rank", 1)
    assert last(trainer, TrainerFn.FITTING) is None
