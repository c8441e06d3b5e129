"""Streams of tokens that are addressed by index and read at each access, without loading the whole stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from functools import cached_property
from hashlib import sha256
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

CHUNK, MEASURED = 2**20, 2**24  # tokens that are read at a time, and in total, to count frequencies


class Stream(ABC):
    """A sequence of tokens with the indices at which documents begin."""

    identity: str  # a text that is equal for equal streams on all ranks, and different for other streams

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _read(self, begin: int, end: int) -> Tensor: ...

    @property
    @abstractmethod
    def starts(self) -> Tensor:
        """The indices at which documents begin, int64, ascending from 0."""

    def read(self, begin: int, end: int) -> Tensor:
        """Return tokens `begin` to `end`, int64 (end - begin,)."""
        if not 0 <= begin <= end <= len(self):
            raise ValueError(f"begin and end must lie within the {len(self):,} tokens there are, got {begin}, {end}")
        return self._read(begin, end) if begin < end else torch.empty(0, dtype=torch.int64)

    def targets_of(self, tokens: Tensor, begin: int) -> Tensor:
        """Return tokens that were read from `begin` on as labels: -100 where a model is not trained to predict one."""
        return tokens


class _ConcatenatedFiles(Stream):
    """The concatenation of files, each a document unless a subclass overrides `starts`; empty files are left out."""

    def __init__(self, paths: Sequence[Path], sizes: Sequence[int]) -> None:
        files = [(path, size) for path, size in zip(paths, sizes, strict=True) if size > 0]
        self.paths = [path for path, _ in files]
        self._borders = list(accumulate((size for _, size in files), initial=0))
        sizes_by_name = repr([(path.name, size) for path, size in files])
        self.identity = sha256(sizes_by_name.encode()).hexdigest()[:16]

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
        """Return tokens `begin` to `end` of the file with this index."""
        raise NotImplementedError


class ByteFiles(_ConcatenatedFiles):
    """The bytes of files as tokens; each file is a document."""

    def __init__(self, paths: Sequence[str | Path]) -> None:
        given = [Path(path) for path in paths]
        super().__init__(given, [path.stat().st_size for path in given])

    def _read_file(self, file: int, begin: int, end: int) -> Tensor:
        with self.paths[file].open("rb") as opened:
            opened.seek(begin)
            content = bytearray(opened.read(end - begin))
        if len(content) < end - begin:
            raise ValueError(f"paths must not change while they are read: {self.paths[file]} has become shorter")
        return torch.frombuffer(content, dtype=torch.uint8).long()


class TokenFiles(_ConcatenatedFiles):
    """The tokens in .npy files of unsigned integers, which are memory-mapped.

    Args:
        paths: the shards, in their order.
        documents: a file for each shard with the indices at which documents begin in it.  Without these files the
            stream is one document.
        vocab_size: the size of the vocabulary, below which every token that is read must be; None checks nothing.
    """

    def __init__(
        self, paths: Sequence[str | Path], documents: Sequence[str | Path] = (), vocab_size: int | None = None
    ) -> None:
        self.vocab_size = vocab_size
        given = [Path(path) for path in paths]
        sizes = []
        for path in given:
            array = _open_mapped(path)
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
        starts, begin = [np.zeros(1, np.int64)], 0
        for path, size in self._documents:
            starts.append(_starts_of(path, size) + begin)
            begin += size
        return torch.from_numpy(np.unique(np.concatenate(starts)))

    @cached_property
    def _maps(self) -> dict[int, Any]:
        return {}

    def _read_file(self, file: int, begin: int, end: int) -> Tensor:
        if file not in self._maps:
            self._maps[file] = _open_mapped(self.paths[file])
        tokens = torch.from_numpy(self._maps[file][begin:end].astype(np.int64))
        if self.vocab_size is not None and len(tokens) and int(tokens.max()) >= self.vocab_size:
            place = int((tokens >= self.vocab_size).int().argmax())
            raise ValueError(
                f"vocab_size must be more than every token, got {self.vocab_size:,}, and token {begin + place:,} of "
                f"{self.paths[file]} is {int(tokens[place]):,}"
            )
        return tokens

    def __getstate__(self) -> dict[str, Any]:
        # pickle would copy the content of the memory maps
        return {name: value for name, value in self.__dict__.items() if name != "_maps"}


def _open_mapped(path: Path) -> Any:
    """Return the array of a .npy file, memory-mapped; raise a ValueError that names the file if it is incomplete."""
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, BadZipFile) as error:
        raise ValueError(f"{path} must be a whole .npy file: {str(error).splitlines()[0]}") from None
    if not isinstance(loaded, np.ndarray):
        raise ValueError(f"{path} must be a whole .npy file, got an archive of several")
    return loaded


def _starts_of(path: Path, size: int) -> Any:
    """Return the indices at which documents begin in a shard of this many tokens; raise a ValueError for others."""
    starts = np.array(_open_mapped(path))
    if starts.ndim != 1 or starts.dtype.kind not in "iu":
        raise ValueError(f"{path} must hold a row of integers, got {starts.dtype} of shape {starts.shape}")
    # a shard may begin within a document, and an empty one holds none
    starts = starts.astype(np.int64)
    if len(starts) and (starts[0] < 0 or starts[-1] > size or (np.diff(starts) < 0).any()):
        raise ValueError(f"{path} must hold ascending indices of the {size:,} tokens of its shard, got {starts[:5]}...")
    return starts


class Slice(Stream):
    """Tokens `begin` to `end` of another stream.  The first token begins a document."""

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

    def targets_of(self, tokens: Tensor, begin: int) -> Tensor:
        return self.stream.targets_of(tokens, self.begin + begin)


def read_samples(stream: Stream) -> None:
    """Read up to `MEASURED` tokens in pieces from all over a stream: errors of its files show before training.

    All ranks that open the stream read the same, and so raise the same.
    """
    size = len(stream)
    pieces = -(-min(size, MEASURED) // CHUNK)
    for i in range(pieces):
        begin = i * size // pieces
        stream.read(begin, min(begin + CHUNK, (i + 1) * size // pieces))


def documents_of(stream: Stream) -> Iterator[tuple[int, int]]:
    """Return (begin, end) of each document."""
    return pairwise([*stream.starts.tolist(), len(stream)])


def entropy_bits(stream: Stream, vocab_size: int) -> float:
    """Return the entropy of the token frequencies of a stream, in bits per token.

    It is the loss of a model that knows only the frequencies.  They are counted in the first `MEASURED` tokens.  A
    token that is not below `vocab_size` raises a ValueError.
    """
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for begin in range(0, min(len(stream), MEASURED), CHUNK):
        chunk = stream.read(begin, min(begin + CHUNK, len(stream), MEASURED))
        if (highest := int(chunk.max())) >= vocab_size:
            raise ValueError(f"vocab_size must be more than every token, got {vocab_size:,} and a token {highest:,}")
        counts += torch.bincount(chunk, minlength=vocab_size)
    return entropy_of(counts)


def entropy_of(counts: Tensor) -> float:
    """Return the entropy in bits of the distribution that `counts` (vocab_size,) describe."""
    share = counts[counts > 0].double() / counts.sum()
    return -float((share * share.log2()).sum())
