"""Saving a checkpoint atomically: if the process is killed while it saves, nothing has the checkpoint's name."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch.plugins.io import AsyncCheckpointIO

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def atomic_save(trainer: Trainer, path: str) -> None:
    """Save a checkpoint of a Trainer to a path that all ranks see; the path exists only when it is complete.

    `Preemption` calls it on all ranks together.  Strategies of this package save atomically by themselves.  Paths of
    other protocols are written directly: an object store cannot rename, and shows complete objects only.
    """
    if getattr(trainer.strategy, "saves_whole", False) or not _is_local_file_protocol(path):
        trainer.save_checkpoint(path)
        _await_writing(trainer)
        return
    final = Path(path)
    # Lightning reads a number from any name with "ckpt_" in it, and would resume from a file that does not exist
    unfinished = final.with_name("unfinished-" + final.name.replace("ckpt_", ""))
    if trainer.is_global_zero:
        # files of an earlier attempt would be mixed with those of this one
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.unlink(missing_ok=True)
    trainer.strategy.barrier("unfinished checkpoint removed")
    trainer.save_checkpoint(unfinished)
    _await_writing(trainer)
    if trainer.is_global_zero:
        unfinished.rename(final)
    trainer.strategy.barrier("checkpoint named")


def _await_writing(trainer: Trainer) -> None:
    """Wait on all ranks until the checkpoint is written, where the strategy or its plugin writes in the background."""
    settle = getattr(trainer.strategy, "settle_saves", None)
    if settle is not None:
        settle()
    writer = trainer.strategy._checkpoint_io
    if isinstance(writer, AsyncCheckpointIO):
        writer.teardown()  # waits for the thread; the next checkpoint starts another
    trainer.strategy.barrier("checkpoint written")
