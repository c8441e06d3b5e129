"""Writing files whose checksum is computed on the way, and whose bytes are on the disk when they are closed."""

from __future__ import annotations

import os
import struct
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

from lightning_longnet.checkpointing.manifest import FileSum

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lightning_longnet.checkpointing.manifest import Manifest

_BUFFER = 2**20  # bytes: the records of a small tensor are six writes of some ten bytes each
_SHORT = 2**17  # bytes whose checksum takes less time than it takes to wake a thread
_SYNCED = 2**23  # bytes that the disk begins to write while others are still to come
_sync_data = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync


class SummedFile:
    """A file for `torch.save`, written once from its beginning to its end, whose checksum is computed on the way.

    `close`, or the end of a `with` block, waits until the disk holds the file.

    Args:
        path: the file, which must not be there yet.
        in_threads: computes the checksum of a piece in a thread while the piece is written, and has the disk write in
            another what is there, so that little is left to wait for at the end.  What is written in the background
            needs neither.
    """

    def __init__(self, path: Path, *, in_threads: bool = True) -> None:
        self._file = path.open("xb", buffering=_BUFFER)
        self._bytes, self._crc, self._synced = 0, 0, 0
        self._threads = ThreadPoolExecutor(2, "checkpoint-file") if in_threads else None
        self._sync: Future[None] | None = None

    def write(self, content: Any) -> int:
        """Write bytes, and return their number; torch calls it for each tensor and each record of the zip archive."""
        if self._threads is None or len(content) < _SHORT:
            written = self._file.write(content)
            self._crc = zlib.crc32(content, self._crc)
        else:
            crc = self._threads.submit(zlib.crc32, content, self._crc)
            try:
                written = self._file.write(content)
            finally:
                self._crc = crc.result()  # after an error, too: the content is the caller's
        self._bytes += written
        if self._threads is not None and self._bytes - self._synced >= _SYNCED and self._is_synced():
            self._sync, self._synced = self._threads.submit(_sync_data, self._file.fileno()), self._bytes
        return written

    def _is_synced(self) -> bool:
        """Return whether the last sync has ended; its error is raised here, as the system reports it only once."""
        if self._sync is None or not self._sync.done():
            return self._sync is None
        self._sync.result()
        return True

    def flush(self) -> None:
        self._file.flush()

    def tell(self) -> int:
        return self._bytes

    @property
    def sum(self) -> FileSum:
        """The size and the checksum of what has been written, without a comment."""
        return FileSum(self._bytes, f"{self._crc:08x}")

    @property
    def closed(self) -> bool:
        return self._file.closed

    def add_comment(self, comment: bytes) -> None:
        """Append a comment to the zip archive that has been written; `sum` stays that of the archive without it."""
        self._file.flush()
        self._file.seek(self._bytes - 2)
        self._file.write(struct.pack("<H", len(comment)) + comment)

    def close(self) -> None:
        """Close the file when the disk holds it."""
        if self._file.closed:
            return
        try:
            self._file.flush()
            if self._sync is not None:
                self._sync.result()
            os.fsync(self._file.fileno())
        finally:
            self._end()

    def _end(self) -> None:
        """End the threads, and close the file without waiting for the disk."""
        if self._threads is not None:
            self._threads.shutdown()
        self._file.close()

    def __enter__(self) -> SummedFile:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._end()


def save_summed(content: Any, path: Path) -> FileSum:
    """Write a file as `torch.save` does, wait until the disk holds it, and return its checksum."""
    with SummedFile(path) as file:
        torch.save(content, file)  # type: ignore[arg-type]  # it calls write and flush alone
    return file.sum


def save_whole(
    write: Callable[[SummedFile], None],
    path: Path,
    describe: Callable[[FileSum], Manifest],
    *,
    in_threads: bool = True,
) -> Manifest:
    """Write a checkpoint in one file with its manifest at the end, and return the manifest.

    Args:
        write: writes what `torch.save` writes.
        path: the file, which must not be there yet.
        describe: takes the checksum of the file, and returns the manifest.
        in_threads: as for `SummedFile`.
    """
    with SummedFile(path, in_threads=in_threads) as file:
        write(file)
        manifest = describe(file.sum)
        file.add_comment(manifest.comment())
    return manifest
