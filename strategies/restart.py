"""The checkpoint that a run goes on from when its supervisor has started it again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.states import TrainerFn

from lightning_longnet.checkpointing.newest import newest_checkpoint
from lightning_longnet.strategies.last import checkpoint_folders
from lightning_longnet.strategies.phases import MarkedPhases
from lightning_longnet.strategies.saves import CheckpointSaves
from lightning_longnet.supervision.record import FOLDER, RESUME

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_FOLDERS = "checkpoint-folders"  # the file of a supervisor's folder with a line for each folder of checkpoints
_SIGNALS = ("hpc_ckpt_", "preemption-")  # names of checkpoints that are saved at a signal
_SKEW = 60.0  # seconds by which the clock of a file system may differ


def keep_folders(trainer: Trainer) -> None:
    """Write down the folders of this attempt's checkpoints: loggers may give the next attempt another one.

    Each rank does so, as all must find the same checkpoint, and those of other nodes have a supervisor of their own.
    """
    folder = os.environ.get(FOLDER)
    if folder is None or not Path(folder).is_dir():
        return
    path = Path(folder) / _FOLDERS
    known = path.read_text().splitlines() if path.exists() else []
    with path.open("a") as file:
        file.writelines(f"{each}\n" for each in checkpoint_folders(trainer) if str(each) not in known)


def checkpoint_to_resume(trainer: Trainer) -> str | None:
    """Return the newest checkpoint of this run where its supervisor has started it again; None in a first attempt.

    Where no attempt has saved one, the run begins as its own `ckpt_path` says.
    """
    since = os.environ.get(RESUME)
    if since is None:
        return None
    path = Path(os.environ.get(FOLDER, "")) / _FOLDERS
    earlier = path.read_text().splitlines() if path.exists() else []
    earliest = 0.0 if since == "last" else float(since) - _SKEW
    strategy = trainer.strategy
    assert isinstance(strategy, CheckpointSaves)
    folders, root = [*map(Path, earlier), *checkpoint_folders(trainer)], Path(trainer.default_root_dir)
    # of the files in the root folder, which may be of other runs, only those that signals save there
    others = [] if root in folders else [path for path in root.glob("*.ckpt") if not path.name.startswith(_SIGNALS)]
    found = newest_checkpoint(*folders, root, forms=strategy.forms, skip=others, since=earliest)
    rank_zero_info(f"Restarted by the supervisor, from {found or 'the beginning: no checkpoint was saved'}")
    return None if found is None else str(found)


_select = _CheckpointConnector._select_ckpt_path


def _select_of_restart(self: _CheckpointConnector, state_fn: Any, *arguments: Any, **options: Any) -> Any:
    trainer = self.trainer
    if state_fn == TrainerFn.FITTING and isinstance(trainer.strategy, MarkedPhases):
        found = checkpoint_to_resume(trainer)
        if found is not None:
            return found
    return _select(self, state_fn, *arguments, **options)


def install() -> None:
    """Let `Trainer.fit` with our strategies begin where a restarted run is to; Lightning asks no strategy for that."""
    setattr(_CheckpointConnector, "_select_ckpt_path", _select_of_restart)  # noqa: B010
