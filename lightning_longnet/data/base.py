"""The interface of data modules of tokens, and base classes that make their data loaders."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import lightning as L
from torch.utils.data import DataLoader

from lightning_longnet.data.order import End, GlobalOrder
from lightning_longnet.data.packing import PackedRows
from lightning_longnet.data.rows import Cut, RowParts, Rows, Windows
from lightning_longnet.data.streams import Slice, Stream, entropy_bits
from lightning_longnet.sequence import SequenceContext

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import Dataset


@runtime_checkable
class TokenData(Protocol):
    """The attributes and methods of a data module of tokens that LightningModules and callbacks read.

    Attributes:
        vocab_size: size of the vocabulary.
        bytes_per_token: average number of bytes of text per token; 1.0 where tokens are bytes, None where they are not
            text.
        unigram_bits: entropy of the token frequencies of the validation data, in bits per token, which is the loss of a
            model that knows only those frequencies.  NaN before `setup`.
        tokenizer_name: the name of a Hugging Face tokenizer, or "bytes"; None where tokens are not text.  Checkpoints
            save it.
    """

    bytes_per_token: float | None
    unigram_bits: float

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> Tensor:
        """Return the tokens of a text, int64 (N,)."""

    def decode(self, ids: Tensor) -> str:
        """Return the text of tokens (N,)."""


def check_positive(**numbers: Any) -> None:
    """Raise a ValueError unless each keyword argument is a positive integer."""
    for name, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")


class Loaders(L.LightningDataModule):
    """A data module with one global order of samples, which is distributed over the data-parallel ranks.

    The order depends only on `seed` and the epoch.  The samples of a step, of all ranks together, are therefore the
    same for any number of ranks that share sequences, and for any number of worker processes.

    Args:
        batch_size: samples of a batch, on each rank or each group of ranks that share sequences.
        seed: seed of the order of training samples.
        num_workers: worker processes of each rank that read ahead; 0 reads in the process of the rank.
        pin_memory: puts batches in pinned memory, from which copies to a GPU are faster.
    """

    def __init__(self, batch_size: int, seed: int = 0, num_workers: int = 0, pin_memory: bool = False) -> None:
        super().__init__()
        check_positive(batch_size=batch_size)
        if not isinstance(num_workers, int) or isinstance(num_workers, bool) or num_workers < 0:
            raise ValueError(f"num_workers must be an integer, at least 0, got {num_workers!r}")
        self.batch_size, self.seed = batch_size, seed
        self.num_workers, self.pin_memory = num_workers, pin_memory

    def _context(self) -> SequenceContext:
        """Return the context of the strategy, or one for whole sequences if the strategy has none."""
        context = getattr(getattr(self.trainer, "strategy", None), "sequence_context", None)
        return context if isinstance(context, SequenceContext) else SequenceContext()

    def _replicas(self) -> tuple[int, int]:
        """Return the number of data-parallel groups, and the index of this rank's group, under any strategy."""
        sampler = getattr(self.trainer, "distributed_sampler_kwargs", None) or {"num_replicas": 1, "rank": 0}
        return sampler["num_replicas"], sampler["rank"]

    def _loader(self, samples: Any, shuffle: bool, end: End) -> DataLoader[Any]:
        """Return a DataLoader over this group's samples; see `GlobalOrder` for `shuffle` and `end`."""
        order = GlobalOrder(len(samples), self.batch_size, *self._replicas(), self.seed, shuffle, end)
        return self._plain_loader(samples, sampler=order, drop_last=end == "drop")

    def _plain_loader(self, samples: Dataset[Any], **options: Any) -> DataLoader[Any]:
        """Return a DataLoader with the batch size, workers and memory of this data module."""
        return DataLoader(
            samples,
            batch_size=self.batch_size,  # a keyword: Lightning makes loaders for prediction anew from these
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            persistent_workers=self.num_workers > 0,
            **options,
        )


class RowLoaders(Loaders):
    """A data module of rows of tokens, of which each rank reads only the tokens that it holds.

    Subclasses set `train_rows` and `val_rows` in `setup`, and implement `TokenData`.

    Args:
        tokens: number of tokens in a row.
        batch_size: rows of a batch, on each rank or each group of ranks that share sequences.
        seed: seed of the order of training rows.
        num_workers: worker processes of each rank that read ahead; 0 reads in the process of the rank.
        pin_memory: puts batches in pinned memory, from which copies to a GPU are faster.
        read_parts: where ranks share sequences, each reads only its own tokens.  With False it reads whole rows, which
            the strategy splits.
    """

    train_rows: Rows
    val_rows: Rows
    bytes_per_token: float | None = None
    unigram_bits: float = math.nan

    def __init__(
        self,
        tokens: int,
        batch_size: int,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
        read_parts: bool = True,
    ) -> None:
        super().__init__(batch_size, seed, num_workers, pin_memory)
        check_positive(tokens=tokens)
        self.tokens, self.read_parts = tokens, read_parts

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """The size of the vocabulary."""

    @abstractmethod
    def encode(self, text: str) -> Tensor:
        """Return the tokens of a text, int64 (N,)."""

    @abstractmethod
    def decode(self, ids: Tensor) -> str:
        """Return the text of tokens (N,)."""

    def _cut(self) -> Cut:
        """Return the part of each row that this rank reads."""
        context = self._context()
        ranks = context.sequence_parallel_size
        if self.tokens < ranks:
            raise ValueError(
                f"tokens must be at least one for each of {ranks} ranks that share a row, got {self.tokens}"
            )
        if ranks == 1 or not self.read_parts:
            return Cut(self.tokens)
        return Cut(self.tokens, context.placement_of(self.tokens), context.sequence_parallel_rank)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return shuffled rows; those that do not fill a batch of all ranks are left out."""
        return self._loader(RowParts(self.train_rows, self._cut()), True, "drop")

    def val_dataloader(self) -> DataLoader[Any]:
        """Return rows in their order, each once.  Ranks without a row in the last batch get one without targets."""
        return self._loader(RowParts(self.val_rows, self._cut()), False, "ignore")

    def test_dataloader(self) -> DataLoader[Any]:
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the validation rows in their order, each once; the last batch may be smaller or missing on a rank."""
        return self._loader(RowParts(self.val_rows, self._cut()), False, "ragged")


class StreamLoaders(RowLoaders):
    """A data module of rows that are cut from a stream, whose end is for validation.

    Args:
        tokens: number of tokens in a row.
        batch_size: rows of a batch, on each rank or each group of ranks that share sequences.
        packed: packs whole documents into rows, in which they neither attend to nor predict each other.  With False
            the stream is cut into rows regardless of documents.
        validation_share: share of the stream, at its end, that is for validation.
        seed: seed of the order of training rows.
        num_workers: worker processes of each rank that read ahead; 0 reads in the process of the rank.
        pin_memory: puts batches in pinned memory, from which copies to a GPU are faster.
        read_parts: where ranks share sequences, each reads only its own tokens.  With False it reads whole rows, which
            the strategy splits.
    """

    def __init__(
        self,
        tokens: int,
        batch_size: int,
        packed: bool = False,
        validation_share: float = 0.05,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
        read_parts: bool = True,
    ) -> None:
        super().__init__(tokens, batch_size, seed, num_workers, pin_memory, read_parts)
        if not 0 < validation_share < 1:
            raise ValueError(f"validation_share must be more than 0 and less than 1, got {validation_share!r}")
        self.packed, self.validation_share = packed, validation_share

    def _set_rows(self, stream: Stream, validation: Stream | None = None) -> None:
        """Set `train_rows`, `val_rows` and `unigram_bits`.

        Args:
            stream: the training data, and the validation data at its end if `validation` is None.
            validation: the validation data.
        """
        if validation is None:
            cut = len(stream) - int(len(stream) * self.validation_share)
            if not self.packed and min(cut, len(stream) - cut) <= self.tokens:
                raise ValueError(
                    f"tokens must be less than the data has: {cut:,} tokens for training and {len(stream) - cut:,} for "
                    f"validation (validation_share {self.validation_share}), got {self.tokens:,}"
                )
            stream, validation = Slice(stream, 0, cut), Slice(stream, cut, len(stream))
        kind = PackedRows if self.packed else Windows
        self.unigram_bits = entropy_bits(validation, self.vocab_size)
        self.train_rows, self.val_rows = kind(stream, self.tokens), kind(validation, self.tokens)
