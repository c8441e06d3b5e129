"""What all data of tokens offers, and how its loaders are made."""

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
    """What a module may ask of a data module of tokens.

    Attributes:
        vocab_size: tokens are numbers below it.
        bytes_per_token: of text, on average; 1.0 where tokens are bytes, None where they are no text.
        unigram_bits: entropy of the frequencies of the validation data's tokens, in bits per token: what a model that
            has seen nothing but those comes to.  NaN before `setup`.
        tokenizer_name: a Hugging Face tokenizer, or "bytes"; None where tokens are no text.  Checkpoints keep it.
    """

    bytes_per_token: float | None
    unigram_bits: float

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> Tensor:
        """Tokens of a text, (N,)."""

    def decode(self, ids: Tensor) -> str:
        """The text of tokens (N,)."""


def check_positive(**numbers: Any) -> None:
    for name, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")


class Loaders(L.LightningDataModule):
    """A data module whose samples come in one order, whoever is handed them.

    The order is a function of `seed` and of the epoch alone: what all ranks together work on in a step is the same
    whichever of them share sequences, and however many worker processes there are.

    Args:
        batch_size: samples of a step, on each rank or group of ranks that share sequences.
        seed: of the order of training samples.
        num_workers: processes of each rank that read ahead; 0 reads when a batch is wanted.
        pin_memory: hand out batches in memory from which GPUs copy faster.
    """

    def __init__(self, batch_size: int, seed: int = 0, num_workers: int = 0, pin_memory: bool = False) -> None:
        super().__init__()
        check_positive(batch_size=batch_size)
        if not isinstance(num_workers, int) or isinstance(num_workers, bool) or num_workers < 0:
            raise ValueError(f"num_workers must be an integer, at least 0, got {num_workers!r}")
        self.batch_size, self.seed = batch_size, seed
        self.num_workers, self.pin_memory = num_workers, pin_memory

    def _context(self) -> SequenceContext:
        """That of the strategy; one for whole sequences where there is none."""
        found = getattr(getattr(self.trainer, "strategy", None), "sequence_context", None)
        return found if isinstance(found, SequenceContext) else SequenceContext()

    def _dealt(self) -> tuple[int, int]:
        """(how many groups of ranks are handed different samples, which is this one's), under any strategy."""
        told = getattr(self.trainer, "distributed_sampler_kwargs", None) or {"num_replicas": 1, "rank": 0}
        return told["num_replicas"], told["rank"]

    def _loader(self, samples: Any, shuffle: bool, end: End) -> DataLoader[Any]:
        order = GlobalOrder(len(samples), self.batch_size, *self._dealt(), self.seed, shuffle, end)
        return self._plain_loader(samples, sampler=order, drop_last=end == "drop")

    def _plain_loader(self, samples: Dataset[Any], **told: Any) -> DataLoader[Any]:
        return DataLoader(
            samples,
            batch_size=self.batch_size,  # by its name: Lightning makes loaders for prediction anew
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            persistent_workers=self.num_workers > 0,
            **told,
        )


class RowLoaders(Loaders):
    """Of rows of tokens, whose ranks read only what they hold.

    Subclasses set `train_rows` and `val_rows` in `setup`, and offer what `TokenData` asks for.

    Args:
        tokens: in a row.
        batch_size: rows of a step, on each rank or group of ranks that share sequences.
        seed: of the order of training rows.
        num_workers: processes of each rank that read ahead; 0 reads when a batch is wanted.
        pin_memory: hand out batches in memory from which GPUs copy faster.
        read_parts: where ranks share sequences each reads its own tokens alone; False: whole rows, which the strategy
            cuts.
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
        """Tokens are numbers below it."""

    @abstractmethod
    def encode(self, text: str) -> Tensor:
        """Tokens of a text, (N,)."""

    @abstractmethod
    def decode(self, ids: Tensor) -> str:
        """The text of tokens (N,)."""

    def _cut(self) -> Cut:
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
        return self._loader(RowParts(self.train_rows, self._cut()), True, "drop")

    def val_dataloader(self) -> DataLoader[Any]:
        """Each row counts once: ranks that have none for the last batch are handed one without targets."""
        return self._loader(RowParts(self.val_rows, self._cut()), False, "ignore")

    def test_dataloader(self) -> DataLoader[Any]:
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._loader(RowParts(self.val_rows, self._cut()), False, "ragged")


class StreamLoaders(RowLoaders):
    """Of rows that are cut out of a stream, the last of it kept for validation.

    Args:
        tokens: in a row.
        batch_size: rows of a step, on each rank or group of ranks that share sequences.
        packed: whole documents packed into rows, which see and predict nothing of each other; otherwise the stream is
            cut into rows wherever they end.
        validation_share: how much of the stream, its end, is for validation.
        seed: of the order of training rows.
        num_workers: processes of each rank that read ahead; 0 reads when a batch is wanted.
        pin_memory: hand out batches in memory from which GPUs copy faster.
        read_parts: where ranks share sequences each reads its own tokens alone; False: whole rows, which the strategy
            cuts.
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

    def _use(self, stream: Stream, validation: Stream | None = None) -> None:
        """Make the rows: of the stream and its end, or of one stream and another."""
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
