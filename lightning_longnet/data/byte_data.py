"""The bytes of files as tokens: no vocabulary, nothing to prepare."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lightning_longnet.data.base import StreamLoaders
from lightning_longnet.data.paths import found_files
from lightning_longnet.data.streams import ByteFiles, Slice
from lightning_longnet.data.tokenizers import ByteTokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.data.streams import Stream


class ByteData(StreamLoaders):
    """The bytes of any files, one after the other in the order of their paths; the last of them for validation.

    Nothing is loaded: rows are read from the files when they are wanted.

    Args:
        paths: files and folders; by default the sources of the running Python's standard library.
        tokens: bytes in a row.
        batch_size: rows of a step, on each rank or group of ranks that share sequences.
        pattern: which files of a folder are read, however deep they lie.
        megabytes: how much is read at most, of 2**20 bytes; None for all.
        packed: whole files packed into rows, which see and predict nothing of each other; otherwise the stream is cut
            into rows wherever they end.
        validation_share: how much of the bytes, their end, is for validation.
        seed: of the order of training rows.
        num_workers: processes of each rank that read ahead; 0 reads when a batch is wanted.
        pin_memory: hand out batches in memory from which GPUs copy faster.
        read_parts: where ranks share sequences each reads its own bytes alone; False: whole rows, which the strategy
            cuts.
    """

    def __init__(
        self,
        paths: str | Path | list[str] | None = None,
        tokens: int = 4096,
        batch_size: int = 1,
        pattern: str = "*.py",
        megabytes: float | None = None,
        packed: bool = False,
        validation_share: float = 0.05,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
        read_parts: bool = True,
    ) -> None:
        super().__init__(tokens, batch_size, packed, validation_share, seed, num_workers, pin_memory, read_parts)
        if megabytes is not None and megabytes <= 0:
            raise ValueError(f"megabytes must be more than 0, or None for all, got {megabytes!r}")
        if paths is not None and not isinstance(paths, (str, Path)) and not paths:
            raise ValueError(f"paths must name files or folders, or be None for the standard library, got {paths!r}")
        self.paths = [paths] if isinstance(paths, (str, Path)) else paths
        self.pattern, self.megabytes = pattern, megabytes
        self.bytes_per_token, self.tokenizer_name = 1.0, "bytes"

    @property
    def vocab_size(self) -> int:
        return 256

    def encode(self, text: str) -> Tensor:
        return torch.tensor(list(text.encode()), dtype=torch.int64)

    def decode(self, ids: Tensor) -> str:
        return ByteTokenizer().decode(ids.tolist())

    def setup(self, stage: str) -> None:
        own = self.paths is None
        paths = self.paths or [sysconfig.get_path("stdlib")]
        files = found_files("paths", paths, self.pattern, ("site-packages", "dist-packages") if own else ())
        stream: Stream = ByteFiles(files)
        if self.megabytes is not None:
            stream = Slice(stream, 0, min(len(stream), int(self.megabytes * 2**20)))
        self._use(stream)
