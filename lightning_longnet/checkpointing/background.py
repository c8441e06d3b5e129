"""Saving checkpoints in the background: copies in the memory of the host, and a thread that writes them."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

from lightning_longnet.checkpointing.streams import SummedFile

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lightning_longnet.checkpointing.manifest import FileSum


class MemoryFile:
    """A file in memory to which `torch.save` writes a copy of its content, so that the tensors may change afterwards.

    `write`, `flush`, `close` and `tell` are those of a file, which torch calls.
    """

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._bytes = 0

    def write(self, content: Any) -> int:
        piece = bytes(content)
        self._pieces.append(piece)
        self._bytes += len(piece)
        return len(piece)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass

    def tell(self) -> int:
        return self._bytes

    def write_to(self, file: SummedFile) -> None:
        """Write the content to a file, in the thread of the background."""
        for piece in self._pieces:
            file.write(piece)

    def store(self, path: Path) -> FileSum:
        """Write the content to a new file, wait until the disk holds it, and return its checksum."""
        with SummedFile(path, in_threads=False) as file:
            self.write_to(file)
        return file.sum


def in_memory(content: Any) -> MemoryFile:
    """Return a file in memory with what `torch.save` writes for `content`."""
    file = MemoryFile()
    torch.save(content, file)  # type: ignore[arg-type]
    return file


class BackgroundWriter:
    """Runs one function at a time in a thread, and keeps its result or its error until it is taken.

    `ManifestCheckpointIO` has one, which writes checkpoints.  The process does not exit before the function has ended.
    """

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._work: Future[Any] | None = None

    def begin(self, work: Callable[[], Any]) -> None:
        """Start to run `work` in the thread; the result of the function before it must have been taken."""
        assert self._work is None
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "checkpoint-writer")
        self._work = self._thread.submit(work)

    @property
    def is_done(self) -> bool:
        """Whether no function is running."""
        return self._work is None or self._work.done()

    @property
    def is_idle(self) -> bool:
        """Whether no function is running, and no result is waiting to be taken."""
        return self._work is None

    def take(self) -> Any:
        """Wait for the function that was started, and return its result or raise its error; None if there was none."""
        if self._work is None:
            return None
        work, self._work = self._work, None
        return work.result()

    def __getstate__(self) -> dict[str, Any]:
        return {"_thread": None, "_work": None}
