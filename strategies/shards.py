"""Writing the shards of parameters that the ranks of FSDP2 hold, onto the disk with checksums, or into memory."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save
from torch.utils.serialization import config

from lightning_longnet.checkpointing.background import MemoryFile, in_memory
from lightning_longnet.checkpointing.streams import SummedFile, save_summed

if TYPE_CHECKING:
    import io
    from collections.abc import Iterator
    from os import PathLike
    from pathlib import Path

    from lightning_longnet.checkpointing.manifest import FileSum

_OTHERS = "meta.pt"  # the name that Lightning gives to everything that is not sharded


def write_shards(checkpoint: dict[str, Any], folder: Path, *, is_first: bool) -> dict[str, FileSum]:
    """Write a checkpoint into a folder as Lightning does for FSDP2; return the checksums of this rank's files by name.

    FSDP2's `_write_folder` calls it on all ranks together.

    Args:
        checkpoint: what the Trainer saves; the weights and the optimizers' states are taken out of it.
        folder: a folder that is not there yet.
        is_first: True on rank 0, which also writes what is not sharded, into one more file.
    """
    files = _SummedFiles()
    _write(checkpoint, folder, files)
    if is_first:
        files.sums[_OTHERS] = save_summed(checkpoint, folder / _OTHERS)
    return files.sums


def copy_shards(checkpoint: dict[str, Any], folder: Path, *, is_first: bool) -> dict[str, MemoryFile]:
    """Make the folder, and return the files that `write_shards` would write there, in memory, by name.

    FSDP2's `_copy_folder` calls it on all ranks together, for a save in the background, with the same arguments.
    """
    memory = _MemoryFiles()
    _write(checkpoint, folder, memory)
    if is_first:
        memory.files[_OTHERS] = in_memory(checkpoint)
    return memory.files


def _write(checkpoint: dict[str, Any], folder: Path, files: FileSystem) -> None:
    """Have torch write this rank's shards of weights and optimizers' states, and remove both from `checkpoint`.

    `write_shards` and `copy_shards` call it on all ranks together.

    Args:
        checkpoint, folder: those of `write_shards`.
        files: where torch's writer puts its files: on the disk (`_SummedFiles`) or in memory (`_MemoryFiles`).
    """
    state = {"state_dict": checkpoint.pop("state_dict")}
    for number, each in enumerate(checkpoint.pop("optimizer_states", ())):
        state[f"optimizer_{number}"] = each
    writer = FileSystemWriter(folder, sync_files=False)  # files are on the disk when they are closed
    writer.fs = files
    # torch's own checksums, which nothing compares where many tensors are in one file, would take as long as ours
    with config.patch({"save.compute_crc32": False}):  # type: ignore[attr-defined]
        save(state, storage_writer=writer)


class _SummedFiles(FileSystem):
    """A file system for torch's `FileSystemWriter` that keeps a checksum of each file by its name in the folder."""

    def __init__(self) -> None:
        self.sums: dict[str, FileSum] = {}

    @contextmanager
    def create_stream(self, path: str | PathLike[str], mode: str) -> Iterator[io.IOBase]:
        """Open a file, and keep the checksum of what was written when it is closed; torch's writer calls it."""
        assert mode == "wb"
        where = cast("Path", self.init_path(path))
        with SummedFile(where) as file:
            yield cast("io.IOBase", file)
        self.sums[where.name] = file.sum

    def rename(self, path: str | PathLike[str], new_path: str | PathLike[str]) -> None:
        """Rename a file and its checksum; torch's writer calls it for `.metadata`, which it writes last."""
        super().rename(path, new_path)
        former, name = cast("Path", self.init_path(path)).name, cast("Path", self.init_path(new_path)).name
        self.sums[name] = self.sums.pop(former)


class _MemoryFiles(FileSystem):
    """A file system for torch's `FileSystemWriter` that keeps each file in memory, by its name in the folder.

    It makes folders on the disk, as the class of torch does.
    """

    def __init__(self) -> None:
        self.files: dict[str, MemoryFile] = {}

    @contextmanager
    def create_stream(self, path: str | PathLike[str], mode: str) -> Iterator[io.IOBase]:
        """Yield a new file in memory, and keep it in `files` by its name.

        torch's writer calls it for the file of this rank, and on rank 0 for the metadata, which it renames at the end.
        """
        assert mode == "wb"
        file = self.files[cast("Path", self.init_path(path)).name] = MemoryFile()
        yield cast("io.IOBase", file)

    def rename(self, path: str | PathLike[str], new_path: str | PathLike[str]) -> None:
        """Rename a file in memory; torch's writer calls it for `.metadata`, which it writes last."""
        former, name = cast("Path", self.init_path(path)).name, cast("Path", self.init_path(new_path)).name
        self.files[name] = self.files.pop(former)
