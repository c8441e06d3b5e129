"""Writing in a thread what has been copied to the memory of the host."""

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
    """A file in memory that is written once: a copy of all tensors that `torch.save` writes, which may then change."""

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
        """Write the content to a file."""
        for piece in self._pieces:
            file.write(piece)

    def store(self, path: Path) -> FileSum:
        """Make a file of it, which the disk holds, and return its sum."""
        with SummedFile(path, in_threads=False) as file:
            self.write_to(file)
        return file.sum


def in_memory(content: Any) -> MemoryFile:
    """Return what `torch.save` writes, in memory."""
    file = MemoryFile()
    torch.save(content, file)  # type: ignore[arg-type]
    return file


class BackgroundWriter:
    """Does one piece of work at a time in a thread, and keeps its result or its error until it is taken.

    The thread ends its work before the process exits.
    """

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._work: Future[Any] | None = None

    def begin(self, work: Callable[[], Any]) -> None:
        """Begin a piece of work; the result of the one before must have been taken."""
        assert self._work is None
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "checkpoint-writer")
        self._work = self._thread.submit(work)

    @property
    def is_done(self) -> bool:
        """Whether no work is going on."""
        return self._work is None or self._work.done()

    @property
    def is_idle(self) -> bool:
        """Whether there is no work whose result has not been taken."""
        return self._work is None

    def take(self) -> Any:
        """Wait for the work, and return its result or raise its error; None where there was none."""
        if self._work is None:
            return None
        work, self._work = self._work, None
        return work.result()

    def __getstate__(self) -> dict[str, Any]:
        return {"_thread": None, "_work": None}
