"""Writing the files of DeepSpeed's checkpoints, which it writes itself, with a sum of each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_longnet.checkpointing.index import sync
from lightning_longnet.checkpointing.manifest import sum_of
from lightning_longnet.strategies.saves import FAULTS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lightning_longnet.checkpointing.manifest import FileSum


def write_files(engine: Any, folder: Path, save: Callable[[], None]) -> dict[str, FileSum]:
    """Let DeepSpeed save a checkpoint into a folder, and return the sums of this rank's files, which the disk holds.

    An error of writing is raised after the ranks have met for the last time: DeepSpeed would leave them in a barrier.

    Args:
        engine: DeepSpeed's engine.
        folder: a folder that is not there yet.
        save: makes the engine save.
    """
    files = engine.checkpoint_engine
    if files.is_decoupled():
        raise ValueError(
            "config['checkpoint']['writer'] must not go on writing after a save, as no manifest could name what is not "
            "written yet: leave it out"
        )
    written: list[str] = []
    errors: list[BaseException] = []
    write, copy_script = files.save, engine._copy_recovery_script

    def guarded(action: Callable[..., None]) -> Callable[..., None]:
        def attempt(*arguments: Any, **options: Any) -> None:
            try:
                action(*arguments, **options)
            except FAULTS as error:
                errors.append(error)

        return attempt

    def write_and_note(state_dict: Any, path: str) -> None:  # DeepSpeed gives the arguments by these names
        write(state_dict, path)
        written.append(path)

    files.save, engine._copy_recovery_script = guarded(write_and_note), guarded(copy_script)
    try:
        save()
    finally:
        del files.save, engine._copy_recovery_script
    if errors:
        raise errors[0]
    sums = {}
    for path in map(folder.__class__, written):
        sync(path)
        sums[path.relative_to(folder).as_posix()] = sum_of(path)
    return sums
