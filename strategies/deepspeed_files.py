"""Writing the files of DeepSpeed's checkpoints, with a checksum of each, or copying them to memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_longnet.checkpointing.background import MemoryFile, in_memory
from lightning_longnet.checkpointing.index import sync
from lightning_longnet.checkpointing.manifest import FileSum, sum_of
from lightning_longnet.checkpointing.streams import save_summed
from lightning_longnet.strategies.saves import writing_faults

if TYPE_CHECKING:
    from collections.abc import Callable


def write_files(engine: Any, folder: Path, save: Callable[[], None]) -> dict[str, FileSum]:
    """Let DeepSpeed save a checkpoint into a folder, and return the checksum of each file that this rank writes.

    `DeepSpeedSequenceParallelStrategy` calls it on all ranks together, for a save that is not in the background.  The
    keys are paths relative to the folder.  The files in the result are on the disk when it returns; `latest` and the
    recovery script, which DeepSpeed writes itself, are not in it.  An error of a file is raised once DeepSpeed has
    returned, and a ValueError if DeepSpeed's writer goes on after the save.

    Args:
        engine: the `DeepSpeedEngine` that holds the model.
        folder: the path of the folder, which DeepSpeed makes.
        save: calls the engine's `save_checkpoint`.
    """
    sums: dict[str, FileSum] = {}
    write = save_summed if _writes_as_torch(engine) else _written_by(engine)

    def store(content: Any, path: Path) -> None:
        """Write a file, and keep its checksum."""
        sums[path.relative_to(folder).as_posix()] = write(content, path)

    _save_with(engine, store, save)
    return sums


def copy_files(engine: Any, folder: Path, save: Callable[[], None]) -> dict[str, MemoryFile]:
    """Let DeepSpeed save a checkpoint into memory, for a save in the background, and return the files of this rank.

    DeepSpeed's `_copy_folder` calls it.  The keys and the arguments are those of `write_files`.  DeepSpeed makes the
    folder, and small files in it, such as `latest`.  A ValueError is raised if its configuration chooses another writer
    than torch.
    """
    files: dict[str, MemoryFile] = {}
    if not _writes_as_torch(engine):
        raise ValueError("with background_saves=True, config['checkpoint'] must choose no writer: leave it out")

    def store(content: Any, path: Path) -> None:
        """Keep a file in memory."""
        files[path.relative_to(folder).as_posix()] = in_memory(content)

    _save_with(engine, store, save)
    return files


def _writes_as_torch(engine: Any) -> bool:
    """Return whether DeepSpeed would write each file by `torch.save` as a zip file, as `save_summed` does."""
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    files = engine.checkpoint_engine
    return type(files) is TorchCheckpointEngine and bool(files.zipfile_serialization)


def _written_by(engine: Any) -> Callable[[Any, Path], FileSum]:
    """Return a function that writes a file with the writer of the engine, and reads it again for its checksum."""
    write = engine.checkpoint_engine.save

    def written(content: Any, path: Path) -> FileSum:
        """Write a file, wait until it is on the disk, and return its checksum."""
        write(content, str(path))
        sync(path)
        return sum_of(path)

    return written


def _save_with(engine: Any, store: Callable[[Any, Path], None], save: Callable[[], None]) -> None:
    """Call `save` with `store` in place of the engine's own writing of each file.

    An error of `store` is raised when `save` has returned: raised at once, it would leave the other ranks waiting in a
    barrier of DeepSpeed.

    Args:
        engine, save: those of `write_files`.
        store: takes the content and the path of each file that this rank is to write.
    """
    files = engine.checkpoint_engine
    if files.is_decoupled():
        raise ValueError(
            "config['checkpoint']['writer'] must not go on writing after a save, as no manifest could name what is not "
            "written yet: leave it out"
        )
    errors: list[BaseException] = []
    copy_script = engine._copy_recovery_script

    def guarded(action: Callable[..., None]) -> Callable[..., None]:
        """Return a function that calls `action`, and keeps its error in place of raising it."""

        def attempt(*arguments: Any, **options: Any) -> None:
            try:
                action(*arguments, **options)
            except writing_faults() as error:
                errors.append(error)

        return attempt

    def store_file(state_dict: Any, path: str) -> None:  # DeepSpeed gives the arguments by these names
        """Store a file as `store` does; DeepSpeed calls it in place of its own writer."""
        store(state_dict, Path(path))

    files.save, engine._copy_recovery_script = guarded(store_file), guarded(copy_script)
    try:
        save()
    finally:
        del files.save, engine._copy_recovery_script
    if errors:
        raise errors[0]
