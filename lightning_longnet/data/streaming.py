"""Rows of a stream whose length nobody knows: it is read from its beginning, and rows are dealt out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.utils.data import IterableDataset, get_worker_info

from lightning_longnet.data.rows import Cut, Row, Sample

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor


class StreamedRows(IterableDataset[Sample]):
    """The rows of one rank and one worker process, in an order that depends on neither.

    Every rank and worker reads all of the stream and keeps what is its own: row n goes to rank n % replicas, and
    batches to worker processes in turn, as a DataLoader asks them.

    Args:
        texts: begins the stream anew, and gives its tokens some at a time, the same on all ranks.
        identity: of the stream.
        tokens: in a row.
        batch_size: rows of a step on each rank, as the DataLoader has it.
        replicas: ranks that are handed different rows.
        rank: this one among them.
        cut: what of each row is handed out; all of it by default.
        drop_last: leave out rows that fill no batch of all ranks; otherwise ranks that have none for the last batch are
            handed one that does not count.
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
                yield from (self._handed(*row) for row in batch)

    def _batches(self) -> Iterator[list[tuple[int, Tensor, bool]]]:
        """Those of this rank, which are as many on all ranks."""
        together = self.batch_size * self.replicas
        batch, count, window = [], 0, None
        for window in windows(self.texts(), self.tokens):
            if count % self.replicas == self.rank:
                batch.append((count, window, True))
            count += 1
            if count % together == 0:
                yield batch
                batch = []
        if window is None:
            raise ValueError(f"tokens must be less than those of the stream, got {self.tokens:,} and a shorter stream")
        if self.drop_last and count < together:
            raise ValueError(
                f"batch_size must leave a batch for each of the {self.replicas} groups of ranks: the stream has "
                f"{count} rows of {self.tokens:,} tokens, got {self.batch_size}"
            )
        rows = -(-(count % together) // self.replicas)
        if rows and not self.drop_last:
            yield batch if len(batch) == rows else [*batch, (count, window, False)]

    def _handed(self, number: int, window: Tensor, counts: bool) -> Sample:
        def read(begin: int, end: int) -> Row:
            return {"input_ids": window[begin:end], "labels": window[begin + 1 : end + 1]}

        return self.cut.row(read, f"{self.identity}:{number}", counts)


def windows(texts: Iterable[Tensor], tokens: int) -> Iterator[Tensor]:
    """Of tokens + 1 each, the last token of one being the first of the next; what is left at the end is left out."""
    held: list[Tensor] = []
    size = 0
    for text in texts:
        held.append(text)
        size += len(text)
        if size <= tokens:
            continue
        joined, begin = torch.cat(held), 0
        while begin + tokens < size:
            yield joined[begin : begin + tokens + 1]
            begin += tokens
        held = [joined[begin:].clone()]
        size -= begin
