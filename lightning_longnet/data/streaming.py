"""Rows of a stream of unknown length, which is read from its beginning and distributed over ranks and workers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.utils.data import IterableDataset, get_worker_info

from lightning_longnet.data.rows import Cut, Row, Sample

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor


class StreamedRows(IterableDataset[Sample]):
    """The rows of one rank and one worker process, in the global order of the stream.

    Every rank and every worker reads the whole stream, and keeps its own rows: row n belongs to rank n % replicas, and
    the batches of a rank go to its workers round-robin, the order in which a DataLoader collects them.

    Args:
        texts: returns a new iterable of the tokens of the stream, in tensors of any length, the same on all ranks.
        identity: a text that is equal for equal streams on all ranks, and different for other streams.
        tokens: number of tokens in a row.
        batch_size: rows of a batch on each rank, the `batch_size` of the DataLoader.
        replicas: number of data-parallel groups.
        rank: index of this rank's group.
        cut: the part of each row that samples hold; all of it by default.
        drop_last: leaves out rows that do not fill a batch on all ranks.  With False, ranks without a row in the last
            batch get one that does not count.
    """

    def __init__(
        self,
        texts: Callable[[], Iterable[Tensor]],
        identity: str,
        tokens: int,
        batch_size: int,
        replicas: int = 1,
        rank: int = 0,
        cut: Cut | None = None,
        drop_last: bool = True,
    ) -> None:
        self.texts, self.tokens, self.batch_size = texts, tokens, batch_size
        self.replicas, self.rank, self.drop_last = replicas, rank, drop_last
        self.identity, self.cut = identity, cut or Cut(tokens)

    def __iter__(self) -> Iterator[Sample]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        for number, batch in enumerate(self._batches()):
            if number % workers == worker:
                yield from (self._sample(*row) for row in batch)

    def _batches(self) -> Iterator[list[tuple[int, Tensor, bool]]]:
        """Yield the batches of this rank, as many on each rank, of (row number, window, whether it counts)."""
        step_rows = self.batch_size * self.replicas
        batch, count, window = [], 0, None
        for window in windows(self.texts(), self.tokens):
            if count % self.replicas == self.rank:
                batch.append((count, window, True))
            count += 1
            if count % step_rows == 0:
                yield batch
                batch = []
        if window is None:
            raise ValueError(f"tokens must be less than those of the stream, got {self.tokens:,} and a shorter stream")
        if self.drop_last and count < step_rows:
            raise ValueError(
                f"batch_size must leave a batch for each of the {self.replicas} groups of ranks: the stream has "
                f"{count} rows of {self.tokens:,} tokens, got {self.batch_size}"
            )
        rows = -(-(count % step_rows) // self.replicas)
        if rows and not self.drop_last:
            yield batch if len(batch) == rows else [*batch, (count, window, False)]

    def _sample(self, number: int, window: Tensor, counts: bool) -> Sample:
        """Return this rank's part of a row."""

        def read(begin: int, end: int) -> Row:
            return {"input_ids": window[begin:end], "labels": window[begin + 1 : end + 1]}

        return self.cut.row(read, f"{self.identity}:{number}", counts)


def windows(texts: Iterable[Tensor], tokens: int) -> Iterator[Tensor]:
    """Cut texts (N,) into windows (tokens + 1,) that overlap by one token; an incomplete last one is left out."""
    held: list[Tensor] = []
    size = 0
    for text in texts:
        held.append(text)
        size += len(text)
        if size <= tokens:
            continue
        buffer, begin = torch.cat(held), 0
        while begin + tokens < size:
            yield buffer[begin : begin + tokens + 1]
            begin += tokens
        held = [buffer[begin:].clone()]
        size -= begin
