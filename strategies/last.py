"""`ckpt_path="last"`: the newest undamaged checkpoint of a run, whatever its name is."""

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
    """Return the local folders in which callbacks of a Trainer save checkpoints, and folders inside that they make.

    `last_checkpoint` looks in them, and after a restart or a damaged checkpoint `search_of_restart` and
    `search_beside`; `keep_folders` writes them down for the next attempt of a run.
    """
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
    """Return the folders inside of a checkpoint folder, down to `depth` levels, that are no checkpoints themselves.

    A "/" in the name of a checkpoint makes such a folder, as in that of a metric "val/loss".  A folder on a remote file
    system gives an empty list.
    """
    if not depth or not _is_local_file_protocol(folder):
        return []
    inside = [path for path in sorted(Path(folder).glob("[!.]*/")) if path.suffix != ".ckpt" and not form_of(path)]
    return [*inside, *(each for path in inside for each in _folders_inside(path, depth - 1))]


def last_checkpoint(trainer: Trainer, resumable: bool = True) -> Path | None:
    """Return the newest undamaged checkpoint of a Trainer that its strategy can load; None if nothing was saved yet.

    Each rank calls it on its own, before the ranks are connected, in `_parse`, for `ckpt_path="last"`.  A ValueError is
    raised on rank 0 if there are checkpoints and none of them can be loaded, as the run would begin anew.  The other
    ranks return None then; all take the checkpoint that rank 0 finds.

    Args:
        trainer: the Trainer, with a strategy of this package.
        resumable: leaves out checkpoints without the states of optimizers, as `fit` cannot resume from them.
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
    """Return the path for an argument `ckpt_path` of `fit`, `validate`, `test` or `predict`.

    It stands in for Lightning's method `_parse_ckpt_path`, which it calls for any value but "last", for other
    strategies, and if there is no checkpoint.
    """
    if ckpt_path == "last" and isinstance(self.trainer.strategy, CheckpointSaves):
        path = last_checkpoint(self.trainer, resumable=state_fn == TrainerFn.FITTING)
        if path is not None:
            return str(path)
    return _stock(self, state_fn, ckpt_path, *arguments, **options)


_stock_start = _CheckpointConnector.resume_start


def _start(self: _CheckpointConnector, checkpoint_path: Any = None, weights_only: bool | None = None) -> None:
    """Load the checkpoint that rank 0 has chosen, on all ranks, or begin without one if it has chosen none.

    It stands in for Lightning's method `resume_start`, which the Trainer calls when the ranks are connected.
    """
    strategy = self.trainer.strategy
    if isinstance(strategy, CheckpointSaves):
        checkpoint_path = strategy.agreed_checkpoint(checkpoint_path)
    _stock_start(self, checkpoint_path, weights_only)


def install() -> None:
    """Replace two methods of Lightning, so that `ckpt_path="last"` means `last_checkpoint` with our strategies.

    The import of `lightning_longnet.strategies` calls it, as Lightning asks no strategy for the checkpoint.  Nothing
    changes with other strategies.  Each rank looks for the checkpoint before the ranks are connected.  When they are,
    all take that of rank 0.
    """
    setattr(_CheckpointConnector, "_parse_ckpt_path", _parse)  # noqa: B010
    setattr(_CheckpointConnector, "resume_start", _start)  # noqa: B010
