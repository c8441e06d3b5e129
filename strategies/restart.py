"""The checkpoint that a run resumes from after its supervisor, `lightning_longnet.supervise`, has started it again."""

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
    """Write the folders of this attempt's checkpoints to a file in the supervisor's folder, for the next attempt.

    Loggers may give the next attempt another folder.  `SplitSteps.on_train_start` calls it on each rank, as all must
    find the same checkpoint, and those of other nodes have a supervisor of their own.  Without a supervisor it does
    nothing.
    """
    folder = os.environ.get(FOLDER)
    if folder is None or not Path(folder).is_dir():
        return
    known = _kept_folders()
    with (Path(folder) / _FOLDERS).open("a") as file:
        file.writelines(f"{_FITS[0]} {each}\n" for each in checkpoint_folders(trainer) if each not in known)


def _kept_folders() -> list[Path]:
    """Return the folders that `keep_folders` has written in earlier attempts, for the same `fit` of the program."""
    path = Path(os.environ.get(FOLDER, "")) / _FOLDERS
    lines = path.read_text().splitlines() if path.exists() else []
    return [Path(folder) for number, _, folder in (each.partition(" ") for each in lines) if number == str(_FITS[0])]


class CheckpointSearch(NamedTuple):
    """Where to look for the checkpoints of a run, as arguments of `newest_checkpoint`.

    Attributes:
        folders: the folders that may have some.
        skip: checkpoints in them that are of other runs.
        since: the time before which checkpoints are of other runs, in seconds since the epoch; 0 for all.
    """

    folders: list[Path]
    skip: list[Path]
    since: float


def search_of_restart(trainer: Trainer) -> CheckpointSearch:
    """Return where the earlier attempts of a run saved checkpoints; only for a run that a supervisor has started again.

    `checkpoint_to_resume` and `search_beside` ask.
    """
    since = os.environ[RESUME]
    folders, root = [*_kept_folders(), *checkpoint_folders(trainer)], Path(trainer.default_root_dir)
    # of the files in the root folder, which may be of other runs, only those that signals save there
    skip = [] if root in folders else [path for path in root.glob("*.ckpt") if not path.name.startswith(_SIGNALS)]
    earliest = 0.0 if since == "last" else float(since) - _SKEW
    return CheckpointSearch(list(dict.fromkeys([*folders, root])), skip, earliest)


def search_beside(trainer: Trainer, asked: Path) -> CheckpointSearch:
    """Return where to look for another checkpoint if the one that a Trainer is to load, `asked`, is damaged.

    If `checkpoint_to_resume` chose that one, the other must be of the same run.  If the program named it, the other may
    be older, and is beside it or in the folders of this run.  `CheckpointSaves._good_checkpoint` calls it in `fit`.
    """
    if getattr(trainer.strategy, "resumed", None) == str(asked):
        return search_of_restart(trainer)
    return CheckpointSearch(list(dict.fromkeys([asked.parent, *checkpoint_folders(trainer)])), [], 0.0)


def checkpoint_to_resume(trainer: Trainer) -> str | None:
    """Return the newest checkpoint of this run after its supervisor has started it again; None in a first attempt.

    It is None too if no attempt has saved one: the run then begins as its own `ckpt_path` says.  Each rank calls it on
    its own, in `Trainer.fit` before the ranks are connected (`_select_of_restart`).
    """
    if os.environ.get(RESUME) is None:
        return None
    strategy = trainer.strategy
    assert isinstance(strategy, CheckpointSaves)
    folders, skip, since = search_of_restart(trainer)
    with warnings.catch_warnings():
        if getattr(rank_zero_only, "rank", 0):
            warnings.simplefilter("ignore")  # each rank looks, before the ranks are connected
        newest = newest_checkpoint(*folders, forms=strategy.forms, skip=skip, since=since)
    rank_zero_info(f"Restarted by the supervisor, from {newest or 'the beginning: no checkpoint was saved'}")
    return None if newest is None else str(newest)


_select = _CheckpointConnector._select_ckpt_path


def _select_of_restart(self: _CheckpointConnector, state_fn: Any, *arguments: Any, **options: Any) -> Any:
    """Return the checkpoint that `fit`, `validate`, `test` or `predict` loads, or None.

    It stands in for Lightning's method `_select_ckpt_path`.  For `fit` with a strategy of this package after a restart
    it returns `checkpoint_to_resume`, and in all other cases what Lightning's method returns.
    """
    trainer = self.trainer
    if state_fn == TrainerFn.FITTING and isinstance(trainer.strategy, MarkedPhases):
        _FITS[0] += 1
        newest = trainer.strategy.resumed = checkpoint_to_resume(trainer)
        if newest is not None:
            return newest
    return _select(self, state_fn, *arguments, **options)


def install() -> None:
    """Replace a method of Lightning, so that `Trainer.fit` with our strategies resumes after a restart by a supervisor.

    The import of `lightning_longnet.strategies` calls it, as Lightning asks no strategy for the checkpoint.
    """
    setattr(_CheckpointConnector, "_select_ckpt_path", _select_of_restart)  # noqa: B010
