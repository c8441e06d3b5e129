"""The bytes of files as tokens, without a tokenizer and without preparation."""

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
    """A data module of the bytes of files, concatenated in the order of their paths, with the end for validation.

    Rows are read from the files at each access; nothing is loaded beforehand.

    Args:
        paths: files and folders; by default the sources of the standard library of the running Python.
        tokens: number of bytes in a row.
        batch_size: rows of a batch, on each rank or each group of ranks that share sequences.
        pattern: pattern of the files that are read in folders and their subfolders, such as "*.txt".
        megabytes: number of megabytes of 2**20 bytes to read at most; None reads all.
        packed: packs whole files into rows, in which they neither attend to nor predict each other.  With False the
            stream is cut into rows regardless of files.
        validation_share: share of the bytes, at the end, that is for validation.
        seed: seed of the order of training rows.
        num_workers: worker processes of each rank that read ahead; 0 reads in the process of the rank.
        pin_memory: puts batches in pinned memory, from which copies to a GPU are faster.
        read_parts: where ranks share sequences, each reads only its own bytes.  With False it reads whole rows, which
            the strategy splits.
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
        is_default = self.paths is None
        paths = self.paths or [sysconfig.get_path("stdlib")]
        files = found_files("paths", paths, self.pattern, ("site-packages", "dist-packages") if is_default else ())
        stream: Stream = ByteFiles(files)
        if self.megabytes is not None:
            stream = Slice(stream, 0, min(len(stream), int(self.megabytes * 2**20)))
        self._set_rows(stream)
