"""Tokens that are addressed by their number and read when they are wanted: no stream is ever loaded whole."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from functools import cached_property
from hashlib import sha256
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

CHUNK, MEASURED = 2**20, 2**24  # tokens that are read at a time, and at most, to count them


class Stream(ABC):
    """Tokens one after the other, with the places where documents begin."""

    identity: str  # the same for equal streams on all ranks; others have another

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _read(self, begin: int, end: int) -> Tensor: ...

    @property
    @abstractmethod
    def starts(self) -> Tensor:
        """Where documents begin, in rising order; the first is 0."""

    def read(self, begin: int, end: int) -> Tensor:
        """Tokens `begin` to `end`, int64."""
        if not 0 <= begin <= end <= len(self):
            raise ValueError(f"begin and end must lie within the {len(self):,} tokens there are, got {begin}, {end}")
        return self._read(begin, end) if begin < end else torch.empty(0, dtype=torch.int64)


class _Joined(Stream):
    """Files one after the other."""

    def __init__(self, paths: Sequence[Path], sizes: Sequence[int]) -> None:
        held = [(path, size) for path, size in zip(paths, sizes, strict=True) if size > 0]
        self.paths = [path for path, _ in held]
        self._borders = list(accumulate((size for _, size in held), initial=0))
        named = repr([(path.name, size) for path, size in held])
        self.identity = sha256(named.encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return self._borders[-1]

    @property
    def starts(self) -> Tensor:
        return torch.tensor(self._borders[:-1] or [0])

    def _read(self, begin: int, end: int) -> Tensor:
        parts, file = [], bisect_right(self._borders, begin) - 1
        while begin < end:
            first, last = self._borders[file : file + 2]
            stop = min(end, last)
            parts.append(self._read_file(file, begin - first, stop - first))
            begin, file = stop, file + 1
        return torch.cat(parts)

    def _read_file(self, file: int, begin: int, end: int) -> Tensor:
        raise NotImplementedError


class ByteFiles(_Joined):
    """The bytes of files, a document each."""

    def __init__(self, paths: Sequence[str | Path]) -> None:
        given = [Path(path) for path in paths]
        super().__init__(given, [path.stat().st_size for path in given])

    def _read_file(self, file: int, begin: int, end: int) -> Tensor:
        with self.paths[file].open("rb") as opened:
            opened.seek(begin)
            found = bytearray(opened.read(end - begin))
        if len(found) < end - begin:
            raise ValueError(f"paths must not change while they are read: {self.paths[file]} has become shorter")
        return torch.frombuffer(found, dtype=torch.uint8).long()


class TokenFiles(_Joined):
    """Numpy files of unsigned integers, mapped into memory.

    Args:
        paths: the shards, in their order.
        documents: as many files, each of the places in its shard where documents begin; one document where there are
            none.
    """

    def __init__(self, paths: Sequence[str | Path], documents: Sequence[str | Path] = ()) -> None:
        given = [Path(path) for path in paths]
        sizes = []
        for path in given:
            array = _mapped(path)
            if array.ndim != 1 or array.dtype not in (np.uint8, np.uint16, np.uint32):
                raise ValueError(
                    f"{path} must hold tokens, one row of uint8, uint16 or uint32, got {array.dtype} of shape "
                    f"{array.shape}"
                )
            sizes.append(len(array))
        super().__init__(given, sizes)
        self._documents = [(Path(path), size) for path, size in zip(documents, sizes, strict=bool(documents))]

    @cached_property
    def starts(self) -> Tensor:
        found, begin = [np.zeros(1, np.int64)], 0
        for path, size in self._documents:
            found.append(np.load(path) + begin)
            begin += size
        return torch.from_numpy(np.unique(np.concatenate(found)))

    @cached_property
    def _maps(self) -> dict[int, Any]:
        return {}

    def _read_file(self, file: int, begin: int, end: int) -> Tensor:
        if file not in self._maps:
            self._maps[file] = _mapped(self.paths[file])
        return torch.from_numpy(self._maps[file][begin:end].astype(np.int64))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_maps"}  # else sent as all they hold


def _mapped(path: Path) -> Any:
    try:
        return np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} must be a whole .npy file: {error}") from error


class Slice(Stream):
    """Tokens `begin` to `end` of another."""

    def __init__(self, stream: Stream, begin: int, end: int) -> None:
        assert 0 <= begin <= end <= len(stream)
        self.stream, self.begin, self.end = stream, begin, end
        self.identity = f"{stream.identity}[{begin}:{end}]"

    def __len__(self) -> int:
        return self.end - self.begin

    @property
    def starts(self) -> Tensor:
        starts = self.stream.starts
        inside = starts[(starts > self.begin) & (starts < self.end)] - self.begin
        return torch.cat([torch.zeros(1, dtype=torch.int64), inside])

    def _read(self, begin: int, end: int) -> Tensor:
        return self.stream.read(self.begin + begin, self.begin + end)


def documents_of(stream: Stream) -> Iterator[tuple[int, int]]:
    """(begin, end) of each."""
    return pairwise([*stream.starts.tolist(), len(stream)])


def entropy_bits(stream: Stream, vocab_size: int) -> float:
    """Of the frequencies of its tokens: what a model reaches that knows nothing else, in bits per token.

    They are counted in its first `MEASURED` tokens.
    """
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for begin in range(0, min(len(stream), MEASURED), CHUNK):
        chunk = stream.read(begin, min(begin + CHUNK, len(stream), MEASURED))
        if (highest := int(chunk.max())) >= vocab_size:
            raise ValueError(f"vocab_size must be more than every token, got {vocab_size:,} and a token {highest:,}")
        counts += torch.bincount(chunk, minlength=vocab_size)
    return entropy_of(counts)


def entropy_of(counts: Tensor) -> float:
    """In bits, of what was counted so often."""
    share = counts[counts > 0].double() / counts.sum()
    return -float((share * share.log2()).sum())
