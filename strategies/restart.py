"""The checkpoint that a run goes on from when its supervisor has started it again."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.states import TrainerFn

from lightning_longnet.strategies.phases import MarkedPhases
from lightning_longnet.supervision.record import FOLDER, RESUME

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lightning.pytorch import Trainer

_FOLDERS = "checkpoint-folders"  # the file of a supervisor's folder with a line for each folder of checkpoints
_SKEW = 60.0  # seconds by which the clock of a file system may differ
# What engines write last into the folder of a checkpoint
_LAST_FILES = ("meta.pt", "latest")


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
        file.writelines(f"{each}\n" for each in _folders_of(trainer) if each not in known)


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
    saved = [(folder, "*.ckpt") for folder in (*earlier, *_folders_of(trainer))]
    saved += [(str(trainer.default_root_dir), name) for name in ("hpc_ckpt_*.ckpt", "preemption-*.ckpt")]
    found = newest_checkpoint(saved, earliest)
    rank_zero_info(f"Restarted by the supervisor, from {found or 'the beginning: no checkpoint was saved'}")
    return found


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


def newest_checkpoint(places: Iterable[tuple[str, str]], earliest: float) -> str | None:
    """Return the newest checkpoint that was written to its end, or None.

    Args:
        places: folders, and the names that a checkpoint may have there.
        earliest: the time before which a checkpoint is of another run.
    """
    paths = [path for folder, name in dict.fromkeys(places) for path in Path(folder).glob(name)]
    found = [(_written(path), str(path)) for path in paths if _is_complete(path)]
    return max((each for each in found if each[0] >= earliest), default=(0.0, None))[1]


def _folders_of(trainer: Trainer) -> list[str]:
    """Return the folders that the callbacks of a Trainer save checkpoints in, as far as they are known."""
    savers = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
    return [str(each.dirpath) for each in savers if each.dirpath]


def _is_complete(path: Path) -> bool:
    if path.name.startswith("unfinished-"):
        return False
    return zipfile.is_zipfile(path) if path.is_file() else any((path / name).exists() for name in _LAST_FILES)


def _written(path: Path) -> float:
    files = [path] if path.is_file() else [path / name for name in _LAST_FILES if (path / name).exists()]
    return max((each.stat().st_mtime for each in files), default=0.0)
