"""A checkpoint that is whole or not there: a kill in the middle of saving leaves nothing under its name."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch.plugins.io import AsyncCheckpointIO

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def save_whole(trainer: Trainer, path: str) -> None:
    """All ranks together, to a path that all of them see; it has the name at the end only.

    Files of other protocols are written straight to their name: a store of objects has no renaming, and shows an object
    when it is complete.
    """
    if not _is_local_file_protocol(path):
        trainer.save_checkpoint(path)
        _await_writing(trainer)
        return
    final = Path(path)
    # Lightning takes a number out of any name with "ckpt_" in it, and would resume from what is not there
    unfinished = final.with_name("unfinished-" + final.name.replace("ckpt_", ""))
    if trainer.is_global_zero:
        # a folder of an earlier attempt would be mixed with this one
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.unlink(missing_ok=True)
    trainer.strategy.barrier("unfinished checkpoint removed")
    trainer.save_checkpoint(unfinished)
    _await_writing(trainer)
    if trainer.is_global_zero:
        unfinished.rename(final)
    trainer.strategy.barrier("checkpoint named")


def _await_writing(trainer: Trainer) -> None:
    writer = trainer.strategy._checkpoint_io
    if isinstance(writer, AsyncCheckpointIO):
        writer.teardown()  # waits; it starts anew with what is saved next
    trainer.strategy.barrier("checkpoint written")
