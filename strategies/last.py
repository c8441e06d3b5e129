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
from lightning.pytorch.trainer.states import TrainerFn

from lightning_longnet.callbacks import Preemption
from lightning_longnet.checkpointing.manifest import form_of
from lightning_longnet.checkpointing.newest import is_kept, newest_checkpoint
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
        folders.append(trainer.default_root_dir)  # `Preemption` saves there
    folders += [
        inside
        for saver, folder in zip(savers, folders, strict=False)
        for inside in _folders_inside(folder, (saver.filename or "").count("/"))
    ]
    return list(dict.fromkeys(Path(each) for each in folders if _is_local_file_protocol(each)))


def _folders_inside(folder: Any, depth: int) -> list[Path]:
    """Return the folders that a "/" in the names of checkpoints makes, as that of a metric "val/loss"."""
    if not depth or not _is_local_file_protocol(folder):
        return []
    inside = [path for path in sorted(Path(folder).glob("[!.]*/")) if path.suffix != ".ckpt" and not form_of(path)]
    return [*inside, *(each for path in inside for each in _folders_inside(path, depth - 1))]


def last_checkpoint(trainer: Trainer, resumable: bool = True) -> Path | None:
    """Return the newest checkpoint that a Trainer's engine reads, or None where nothing has been saved yet.

    With `resumable` those of weights alone are left out.

    A ValueError is raised where there are checkpoints, and none of them is good: the run would begin anew.  The first
    rank alone raises it, as the others do what it does.
    """
    strategy = trainer.strategy
    assert isinstance(strategy, CheckpointSaves)
    folders = checkpoint_folders(trainer)
    is_first = not getattr(rank_zero_only, "rank", 0)
    with warnings.catch_warnings():
        if not is_first:
            warnings.simplefilter("ignore")  # each rank looks, before the ranks are connected
        path = newest_checkpoint(*folders, forms=strategy.forms, resumable=resumable)
    if path is None and is_first and any(is_kept(each) for folder in folders for each in folder.glob("*.ckpt")):
        raise ValueError(
            f"ckpt_path='last' must find a checkpoint to go on from, and none is good or of a form that this engine "
            f"reads in {', '.join(map(str, folders))}: name one, or give no ckpt_path to begin anew"
        )
    return path


_stock = _CheckpointConnector._parse_ckpt_path


def _parse(self: _CheckpointConnector, state_fn: Any, ckpt_path: Any, *arguments: Any, **options: Any) -> Any:
    """Return the path for a `ckpt_path`, in place of Lightning's method: for "last" that of `last_checkpoint`."""
    if ckpt_path == "last" and isinstance(self.trainer.strategy, CheckpointSaves):
        path = last_checkpoint(self.trainer, resumable=state_fn == TrainerFn.FITTING)
        if path is not None:
            return str(path)
    return _stock(self, state_fn, ckpt_path, *arguments, **options)


_stock_start = _CheckpointConnector.resume_start


def _start(self: _CheckpointConnector, checkpoint_path: Any = None, weights_only: bool | None = None) -> None:
    """Load a checkpoint, in place of Lightning's method, on all ranks that which the first one has chosen."""
    strategy = self.trainer.strategy
    if isinstance(strategy, CheckpointSaves):
        checkpoint_path = strategy.agreed_checkpoint(checkpoint_path)
    _stock_start(self, checkpoint_path, weights_only)


def install() -> None:
    """Let "last" mean `last_checkpoint` for our strategies, which Lightning does not ask; others stay as they are.

    Each rank looks for it before the ranks are connected.  When they are, all take the checkpoint of the first one.
    """
    setattr(_CheckpointConnector, "_parse_ckpt_path", _parse)  # noqa: B010
    setattr(_CheckpointConnector, "resume_start", _start)  # noqa: B010
