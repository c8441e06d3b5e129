"""A save that is cut off leaves nothing under the checkpoint's name."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector

from lightning_longnet.callbacks.atomic_save import atomic_save


def trainer_that_saves(save):
    strategy = SimpleNamespace(barrier=lambda name: None, _checkpoint_io=None)
    return SimpleNamespace(is_global_zero=True, save_checkpoint=save, strategy=strategy)


def write_file(path):
    Path(path).write_text("whole")


def write_folder(path):
    Path(path).mkdir()
    (Path(path) / "part").write_text("whole")


def cut_off(path):
    Path(path).mkdir()
    (Path(path) / "other part").write_text("ha")
    raise KeyboardInterrupt


@pytest.mark.parametrize("write", [write_file, write_folder])
def test_a_save_that_is_cut_off_is_not_there(tmp_path, write):
    path = _CheckpointConnector.hpc_save_path(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        atomic_save(trainer_that_saves(cut_off), path)
    assert not Path(path).exists()
    # what it left is not taken for a checkpoint, nor mixed with the next one
    assert _CheckpointConnector.hpc_save_path(tmp_path) == path
    atomic_save(trainer_that_saves(write), path)
    assert [each.name for each in tmp_path.iterdir()] == [Path(path).name]
    assert not (Path(path) / "other part").exists()
