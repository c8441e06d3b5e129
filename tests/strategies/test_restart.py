"""Which checkpoint a run goes on from when its supervisor has started it again."""

import os
import time
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from trained import quiet
from trained import trainer_of as trainer_of_runs

from lightning_longnet import newest_checkpoint
from lightning_longnet.strategies import RingSequenceParallelStrategy, restart
from lightning_longnet.strategies.restart import checkpoint_to_resume, keep_folders
from lightning_longnet.supervision.record import FOLDER, RESUME

NOW = time.time()


def save(path, age=0.0):
    """A file as `torch.save` writes it, so many seconds old."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"step": 1}, path)
    os.utime(path, (NOW - age, NOW - age))
    return str(path)


def trainer_of(folder, root):
    with quiet():
        return trainer_in(
            "ddp", 1, callbacks=[ModelCheckpoint(folder)], enable_checkpointing=True, default_root_dir=root
        )


def test_checkpoints_of_another_run_are_older(tmp_path):
    saved = save(tmp_path / "step=2.ckpt", age=50)
    assert newest_checkpoint(tmp_path, since=NOW - 60) == Path(saved)
    assert newest_checkpoint(tmp_path, since=NOW - 30) is None


@pytest.mark.parametrize("since", ["last", f"{NOW:.0f}"], ids=["last", "time"])  # the same in each process of xdist
def test_a_restart_finds_what_an_earlier_attempt_saved_elsewhere(tmp_path, monkeypatch, since):
    monkeypatch.setenv(FOLDER, str(tmp_path))
    first, second = (trainer_of(tmp_path / f"version_{number}", tmp_path / "root") for number in (0, 1))
    old = save(tmp_path / "version_1/other.ckpt", age=3600)  # of another run, unless any will do
    assert checkpoint_to_resume(second) is None, "a first attempt"
    monkeypatch.setenv(RESUME, since)
    assert checkpoint_to_resume(second) == (old if since == "last" else None)
    saved = save(tmp_path / "version_0/step=2.ckpt", age=5)
    keep_folders(first)
    keep_folders(second)
    assert checkpoint_to_resume(second) == saved
    preempted = save(tmp_path / "root/hpc_ckpt_1.ckpt", age=1)
    save(tmp_path / "root/pretrained.ckpt")  # which no callback of the run has saved
    assert checkpoint_to_resume(second) == preempted


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_every_rank_takes_it_also_one_without_a_launcher(tmp_path, monkeypatch, kind):
    saved = save(tmp_path / "step=2.ckpt")
    monkeypatch.setenv("LOCAL_RANK", "1")  # as a rank that another process has started
    with quiet():
        trainer = trainer_in(kind, 2, callbacks=[ModelCheckpoint(tmp_path)], enable_checkpointing=True)
        stock = trainer_in(None, 1, callbacks=[ModelCheckpoint(tmp_path)], enable_checkpointing=True)
    result = {"model_provided": True, "model_connected": True}
    monkeypatch.setenv(RESUME, "last")
    connector = trainer._checkpoint_connector
    assert connector._select_ckpt_path(TrainerFn.FITTING, "given.ckpt", **result) == saved
    assert connector._select_ckpt_path(TrainerFn.VALIDATING, "given.ckpt", **result) == "given.ckpt"
    assert stock._checkpoint_connector._select_ckpt_path(TrainerFn.FITTING, None, **result) is None
    monkeypatch.delenv(RESUME)
    assert connector._select_ckpt_path(TrainerFn.FITTING, "given.ckpt", **result) == "given.ckpt"


def test_each_fit_of_a_program_has_folders_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.setattr(restart, "_FITS", [0], raising=False)
    result = {"model_provided": True, "model_connected": True}

    def begin(name):
        """The checkpoint that a fit goes on from."""
        trainer = trainer_of(tmp_path / name, tmp_path / "root")
        with quiet():
            chosen = trainer._checkpoint_connector._select_ckpt_path(TrainerFn.FITTING, None, **result)
        keep_folders(trainer)
        return chosen

    assert [begin("a0"), begin("b0")] == [None, None]
    first, second = save(tmp_path / "a0/step=2.ckpt", age=9), save(tmp_path / "b0/step=2.ckpt", age=5)
    restart._FITS[:] = [0]  # another process
    monkeypatch.setenv(RESUME, f"{NOW - 20:.0f}")
    assert [begin("a1"), begin("b1")] == [first, second]


def test_another_checkpoint_of_a_restarted_run_is_of_that_run(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.setenv(RESUME, f"{NOW - 60:.0f}")
    trainer = trainer_of(tmp_path / "new", tmp_path / "root")
    strategy = trainer.strategy
    strategy.connect(L.LightningModule())
    strategy.lightning_module._trainer = trainer
    trainer.state.fn = TrainerFn.FITTING
    monkeypatch.setattr(strategy, "_fault", lambda path: "bad" if path.name == "step=4.ckpt" else "")
    given = save(tmp_path / "new/yesterday.ckpt", age=3600)
    last = save(tmp_path / "new/step=4.ckpt", age=1)
    choose = trainer._checkpoint_connector._select_ckpt_path
    result = {"model_provided": True, "model_connected": True}
    assert choose(TrainerFn.FITTING, given, **result) == last
    with pytest.raises(ValueError, match="no other good checkpoint"):
        strategy._good_checkpoint(Path(last))
    earlier = trainer_of(tmp_path / "old", tmp_path / "root")
    keep_folders(earlier)
    older = save(tmp_path / "old/step=2.ckpt", age=9)  # which the first attempt saved
    with pytest.warns(RuntimeWarning, match="loading .*step=2.ckpt, the newest other one"):
        assert strategy._good_checkpoint(Path(last)) == Path(older)
    strategy.resumed = None  # nothing was saved, so that the run begins with what the program names
    Path(older).unlink()
    with pytest.warns(RuntimeWarning, match="loading .*yesterday.ckpt, the newest other one"):
        assert strategy._good_checkpoint(Path(last)) == Path(given)


def test_the_first_rank_alone_warns_of_damage(tmp_path, monkeypatch):
    monkeypatch.setenv(RESUME, "last")
    trainer = trainer_of(tmp_path / "run", tmp_path / "root")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/last.ckpt").touch()
    monkeypatch.setattr(rank_zero_only, "rank", 0, raising=False)
    with pytest.warns(RuntimeWarning, match="last.ckpt is empty"):
        assert checkpoint_to_resume(trainer) is None
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint_to_resume(trainer) is None


def trainer_in(kind, world, **options):
    strategy = "auto" if kind is None else RingSequenceParallelStrategy(sharding=kind)
    return trainer_of_runs(strategy, world, **options)
