"""Writing files whose checksum is computed on the way, and whose bytes are on the disk when they are closed."""

from __future__ import annotations

import os
import struct
import zlib
from typing import TYPE_CHECKING, Any

import torch

from lightning_longnet.checkpointing.manifest import FileSum

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lightning_longnet.checkpointing.manifest import Manifest

_BUFFER = 2**20  # bytes: the records of a small tensor are six writes of some ten bytes each


class SummedFile:
    """A file that is written once from its beginning to its end.

    Args:
        path: the file, which must not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb", buffering=_BUFFER)
        self._bytes, self._crc = 0, 0

    def write(self, content: Any) -> int:
        written = self._file.write(content)
        self._bytes += written
        self._crc = zlib.crc32(content, self._crc)
        return written

    def flush(self) -> None:
        self._file.flush()

    def tell(self) -> int:
        return self._bytes

    @property
    def sum(self) -> FileSum:
        """The sum of what has been written."""
        return FileSum(self._bytes, f"{self._crc:08x}")

    @property
    def closed(self) -> bool:
        return self._file.closed

    def add_comment(self, comment: bytes) -> None:
        """Append a comment to a zip archive that has been written without one; the sum stays that of the archive."""
        self._file.flush()
        self._file.seek(self._bytes - 2)
        self._file.write(struct.pack("<H", len(comment)) + comment)

    def close(self) -> None:
        """Close the file when the disk holds it."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> SummedFile:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


def save_summed(content: Any, path: Path) -> FileSum:
    """Write a file as `torch.save` does, and return its sum."""
    with SummedFile(path) as file:
        torch.save(content, file)  # type: ignore[arg-type]  # it calls write and flush alone
    return file.sum


def save_whole(write: Callable[[SummedFile], None], path: Path, describe: Callable[[FileSum], Manifest]) -> Manifest:
    """Write a checkpoint in one file with its manifest at the end, and return the manifest.

    Args:
        write: writes what `torch.save` writes.
        path: the file, which must not be there yet.
        describe: takes the sum of the file, and returns the manifest.
    """
    with SummedFile(path) as file:
        write(file)
        manifest = describe(file.sum)
        file.add_comment(manifest.comment())
    return manifest
