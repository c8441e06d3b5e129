"""The checkpoint that a run goes on from when its supervisor has started it again."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_only  # type: ignore[attr-defined]
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.states import TrainerFn

from lightning_longnet.checkpointing.newest import newest_checkpoint
from lightning_longnet.strategies.last import checkpoint_folders
from lightning_longnet.strategies.phases import MarkedPhases
from lightning_longnet.strategies.saves import CheckpointSaves
from lightning_longnet.supervision.record import FOLDER, RESUME

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_FOLDERS = "checkpoint-folders"  # the file of a supervisor's folder with the number of a fit and a folder in each line
_FITS = [0]  # how many times this process has begun to fit with our strategies: a program may train several models
_SIGNALS = ("hpc_ckpt_", "preemption-")  # names of checkpoints that are saved at a signal
_SKEW = 60.0  # seconds by which the clock of a file system may differ


def keep_folders(trainer: Trainer) -> None:
    """Write down the folders of this attempt's checkpoints: loggers may give the next attempt another one.

    Each rank does so, as all must find the same checkpoint, and those of other nodes have a supervisor of their own.
    """
    folder = os.environ.get(FOLDER)
    if folder is None or not Path(folder).is_dir():
        return
    known = _kept_folders()
    with (Path(folder) / _FOLDERS).open("a") as file:
        file.writelines(f"{_FITS[0]} {each}\n" for each in checkpoint_folders(trainer) if each not in known)


def _kept_folders() -> list[Path]:
    """Return the folders that earlier attempts wrote down at this `fit` of the program."""
    path = Path(os.environ.get(FOLDER, "")) / _FOLDERS
    lines = path.read_text().splitlines() if path.exists() else []
    return [Path(folder) for number, _, folder in (each.partition(" ") for each in lines) if number == str(_FITS[0])]


class Places(NamedTuple):
    """The places of a run's checkpoints: folders, what is not its own there, and the time since which it has saved."""

    folders: list[Path]
    others: list[Path]
    since: float


def places(trainer: Trainer) -> Places:
    """Return where the earlier attempts of a run saved checkpoints; only where a supervisor has started it again."""
    since = os.environ[RESUME]
    folders, root = [*_kept_folders(), *checkpoint_folders(trainer)], Path(trainer.default_root_dir)
    # of the files in the root folder, which may be of other runs, only those that signals save there
    others = [] if root in folders else [path for path in root.glob("*.ckpt") if not path.name.startswith(_SIGNALS)]
    return Places(list(dict.fromkeys([*folders, root])), others, 0.0 if since == "last" else float(since) - _SKEW)


def places_beside(trainer: Trainer, asked: Path) -> Places:
    """Return where to look for another checkpoint than the one that a Trainer is to load.

    If a restart chose that one, the other is of the same run.  If the program did, it may be older.
    """
    if getattr(trainer.strategy, "resumed", None) == str(asked):
        return places(trainer)
    return Places(list(dict.fromkeys([asked.parent, *checkpoint_folders(trainer)])), [], 0.0)


def checkpoint_to_resume(trainer: Trainer) -> str | None:
    """Return the newest checkpoint of this run where its supervisor has started it again; None in a first attempt.

    Where no attempt has saved one, the run begins as its own `ckpt_path` says.
    """
    if os.environ.get(RESUME) is None:
        return None
    strategy = trainer.strategy
    assert isinstance(strategy, CheckpointSaves)
    folders, others, since = places(trainer)
    with warnings.catch_warnings():
        if getattr(rank_zero_only, "rank", 0):
            warnings.simplefilter("ignore")  # each rank looks, before the ranks are connected
        newest = newest_checkpoint(*folders, forms=strategy.forms, skip=others, since=since)
    rank_zero_info(f"Restarted by the supervisor, from {newest or 'the beginning: no checkpoint was saved'}")
    return None if newest is None else str(newest)


_select = _CheckpointConnector._select_ckpt_path


def _select_of_restart(self: _CheckpointConnector, state_fn: Any, *arguments: Any, **options: Any) -> Any:
    """Return the checkpoint that `fit` loads, in place of Lightning's method: after a restart that of the run."""
    trainer = self.trainer
    if state_fn == TrainerFn.FITTING and isinstance(trainer.strategy, MarkedPhases):
        _FITS[0] += 1
        newest = trainer.strategy.resumed = checkpoint_to_resume(trainer)
        if newest is not None:
            return newest
    return _select(self, state_fn, *arguments, **options)


def install() -> None:
    """Let `Trainer.fit` with our strategies begin where a restarted run is to; Lightning asks no strategy for that."""
    setattr(_CheckpointConnector, "_select_ckpt_path", _select_of_restart)  # noqa: B010
