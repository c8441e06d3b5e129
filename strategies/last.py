"""`ckpt_path="last"`: the newest good checkpoint of a run, whatever its name is."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector

from lightning_longnet.callbacks import Preemption
from lightning_longnet.checkpointing.newest import newest_checkpoint
from lightning_longnet.strategies.saves import CheckpointSaves

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def checkpoint_folders(trainer: Trainer) -> list[Path]:
    """Return the folders that a Trainer saves checkpoints in by itself."""
    savers = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
    folders: list[Any] = [each._ModelCheckpoint__resolve_ckpt_dir(trainer) for each in savers]  # type: ignore[attr-defined]
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    folders += [each.dirpath for each in callbacks if isinstance(each, Preemption) and each.dirpath is not None]
    if not savers or isinstance(trainer._accelerator_connector.cluster_environment, SLURMEnvironment):
        folders.append(trainer.default_root_dir)  # where `Preemption` saves
    return list(dict.fromkeys(Path(each) for each in folders if _is_local_file_protocol(each)))


def last_checkpoint(trainer: Trainer) -> Path | None:
    """Return the newest checkpoint that a Trainer's engine reads, or None where nothing has been saved yet.

    A ValueError is raised where there are checkpoints, and none of them is good: the run would begin anew.
    """
    strategy = trainer.strategy
    assert isinstance(strategy, CheckpointSaves)
    folders = checkpoint_folders(trainer)
    with warnings.catch_warnings():
        if getattr(rank_zero_only, "rank", 0):
            warnings.simplefilter("ignore")  # each rank looks, before the ranks are connected
        found = newest_checkpoint(*folders, forms=strategy.forms)
    if found is None and any(True for folder in folders for _ in folder.glob("*.ckpt")):
        raise ValueError(
            f"ckpt_path='last' must find a checkpoint to go on from, and none is good or of a form that this engine "
            f"reads in {', '.join(map(str, folders))}: name one, or give no ckpt_path to begin anew"
        )
    return found


_stock = _CheckpointConnector._parse_ckpt_path


def _parse(self: _CheckpointConnector, state_fn: Any, ckpt_path: Any, *arguments: Any, **options: Any) -> Any:
    if ckpt_path == "last" and isinstance(self.trainer.strategy, CheckpointSaves):
        found = last_checkpoint(self.trainer)
        if found is not None:
            return str(found)
    return _stock(self, state_fn, ckpt_path, *arguments, **options)


def install() -> None:
    """Let "last" mean `last_checkpoint` for our strategies, which Lightning does not ask; others stay as they are."""
    setattr(_CheckpointConnector, "_parse_ckpt_path", _parse)  # noqa: B010
