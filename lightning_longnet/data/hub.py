"""Texts of Hugging Face `datasets`, from the Hub or from files."""

from __future__ import annotations

from functools import partial
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_longnet.data.base import StreamLoaders
from lightning_longnet.data.streaming import StreamedRows
from lightning_longnet.data.streams import Stream, entropy_of
from lightning_longnet.data.tokenizers import Tokenizer, tokenizer_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from torch.utils.data import DataLoader

_BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".txt": "text",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_READ = 16  # texts of a stream that are read at a time
_EACH = 20  # of so many streamed documents one is for validation
_MEASURED = 2**22  # tokens of a stream that the frequencies of tokens are counted in, at most


class HubData(StreamLoaders):
    """A column of texts, each a document with a token for its end.

    Texts are turned into tokens once and kept in the cache of `datasets`; rows are read from there.  With `streaming`
    nothing is kept: texts come in the order in which they are stored, and every rank reads all of them.

    Args:
        path: a dataset of the Hub, a folder that `save_to_disk` wrote, or a file: .json, .jsonl, .txt, .csv, .parquet,
            .arrow.
        name: which of its configurations.
        split: of the data that is trained on.
        validation_split: of the validation data; by default the end of `split`, or every twentieth text of a stream.
        column: that of the text.
        tokenizer: a Hugging Face tokenizer, by its name or folder, or "bytes".
        tokens: in a row.
        batch_size: rows of a step, on each rank or group of ranks that share sequences.
        streaming: read from the beginning, without an index: for data too large to be kept.
        packed: whole documents packed into rows, which see and predict nothing of each other; otherwise the stream is
            cut into rows wherever they end.
        validation_share: how much of the stream, its end, is for validation where there is no split of it.
        seed: of the order of training rows.
        num_workers: processes of each rank that read ahead; 0 reads when a batch is wanted.
        pin_memory: hand out batches in memory from which GPUs copy faster.
        read_parts: where ranks share sequences each is handed its own tokens alone; False: whole rows, which the
            strategy cuts.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        split: str = "train",
        validation_split: str | None = None,
        column: str = "text",
        tokenizer: str = "bytes",
        tokens: int = 4096,
        batch_size: int = 1,
        streaming: bool = False,
        packed: bool = False,
        validation_share: float = 0.05,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
        read_parts: bool = True,
    ) -> None:
        super().__init__(tokens, batch_size, packed, validation_share, seed, num_workers, pin_memory, read_parts)
        if find_spec("datasets") is None:
            raise ModuleNotFoundError("HubData needs datasets: pip install 'lightning-longnet[hf]'")
        if streaming and packed:
            raise ValueError("packed must be False with streaming: a stream is read once, and not sorted")
        if Path(path).suffix in _BUILDERS and not Path(path).exists():
            raise FileNotFoundError(f"path must be a dataset of the Hub or one that is there, there is no {path}")
        self.path, self.name, self.split, self.validation_split = str(path), name, split, validation_split
        self.column, self.streaming, self._tokenizer = column, streaming, tokenizer

    @property
    def tokenizer_name(self) -> str:
        return self._tokenizer

    @property
    def tokenizer(self) -> Tokenizer:
        return tokenizer_of(self._tokenizer)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def encode(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer.encode(text), dtype=torch.int64)

    def decode(self, ids: Tensor) -> str:
        return self.tokenizer.decode(ids.tolist())

    def prepare_data(self) -> None:
        """On one rank of each machine, before the others look into the cache."""
        if not self.streaming:
            for split in filter(None, (self.split, self.validation_split)):
                self._tokens_of(split)

    def setup(self, stage: str) -> None:
        if self.streaming:
            self._measure()
            return
        stream = self._tokens_of(self.split)
        validation = self._tokens_of(self.validation_split) if self.validation_split else None
        self._use(stream, validation)
        self.bytes_per_token = stream.bytes / len(stream)

    def _loaded(self, split: str) -> Any:
        import datasets

        path = Path(self.path)
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            found = datasets.load_from_disk(self.path)
            if isinstance(found, datasets.DatasetDict):
                if split not in found:
                    raise ValueError(f"splits must be of {self.path}, {', '.join(found)}, got {split!r}")
                found = found[split]
            found = found.to_iterable_dataset() if self.streaming else found
        else:
            builder = _BUILDERS.get(path.suffix)
            told = (builder,) if builder else (self.path, self.name)
            files = self.path if builder else None
            try:
                found = datasets.load_dataset(*told, data_files=files, split=split, streaming=self.streaming)
            except ValueError as error:  # of a split or a name that there is none of
                raise ValueError(f"path {self.path}, split {split!r}: {error}") from error
        columns = found.column_names
        if columns is not None and self.column not in columns:
            raise ValueError(f"column must be one of {', '.join(columns)}, got {self.column!r}")
        return found

    def _tokens_of(self, split: str) -> TextStream:
        found = self._loaded(split)
        told = {"column": self.column, "tokenizer": self._tokenizer}
        found = found.map(tokens_of, batched=True, fn_kwargs=told, remove_columns=found.column_names)
        return TextStream(found, repr((self.path, self.name, split, self.column, self._tokenizer)))

    # Streaming

    def texts(self, split: str, is_validation: bool) -> Iterator[Tensor]:
        """The tokens of each text, those of training and of validation apart where they share a split."""
        shares = self.validation_split is None
        # in batches: one by one, `datasets` would give each worker process texts of its own
        batches = self._loaded(split).iter(_READ)
        for number, text in enumerate(text for batch in batches for text in batch[self.column]):
            if not shares or (number % _EACH == _EACH - 1) == is_validation:
                ids = self.tokenizer.encode(checked_text(text, self.column))
                yield torch.tensor([*ids, self.tokenizer.end], dtype=torch.int64)

    def _measure(self) -> None:
        """The frequencies of tokens, and their bytes, in the beginning of the validation data."""
        counts, size = torch.zeros(self.vocab_size, dtype=torch.int64), 0
        for ids in self.texts(self.validation_split or self.split, True):
            counts += torch.bincount(ids, minlength=self.vocab_size)
            size += len(self.tokenizer.decode(ids[:-1].tolist()).encode())
            if counts.sum() >= _MEASURED:
                break
        if not (total := int(counts.sum())):
            raise ValueError(f"validation_split must be given where a stream has fewer than {_EACH} texts")
        self.unigram_bits, self.bytes_per_token = entropy_of(counts), size / total

    def _streamed(self, split: str, is_validation: bool) -> DataLoader[Any]:
        rows = StreamedRows(
            partial(self.texts, split, is_validation),
            repr((self.path, self.name, split, is_validation, self.column, self._tokenizer)),
            self.tokens,
            self.batch_size,
            *self._dealt(),
            self._cut(),
            drop_last=not is_validation,
        )
        return self._plain_loader(rows)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._streamed(self.split, False) if self.streaming else super().train_dataloader()

    def val_dataloader(self) -> DataLoader[Any]:
        if self.streaming:
            return self._streamed(self.validation_split or self.split, True)
        return super().val_dataloader()

    def predict_dataloader(self) -> DataLoader[Any]:
        return self.val_dataloader() if self.streaming else super().predict_dataloader()


class TextStream(Stream):
    """The tokens of the texts of a dataset, each with its end; read from its files on disk."""

    def __init__(self, texts: Any, identity: str) -> None:
        self.texts = texts.with_format("torch", columns=["ids"])
        sizes = texts.with_format("torch", columns=["size", "bytes"])[:]
        self.bytes = int(sizes["bytes"].sum())
        ends = sizes["size"].cumsum(0)
        self._starts = torch.cat([torch.zeros(1, dtype=torch.int64), ends])
        self.identity = sha256(f"{identity} {len(texts)} {len(self)}".encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def starts(self) -> Tensor:
        return self._starts[:-1]

    def _read(self, begin: int, end: int) -> Tensor:
        first, last = torch.searchsorted(self._starts, torch.tensor([begin, end - 1]), right=True).tolist()
        parts = self.texts[first - 1 : last]["ids"]
        return torch.cat(list(parts))[begin - int(self._starts[first - 1]) :][: end - begin].long()


def tokens_of(batch: dict[str, list[Any]], column: str, tokenizer: str) -> dict[str, list[Any]]:
    """What `datasets` keeps of some texts; a function of this module, so that its cache knows it again."""
    tool = tokenizer_of(tokenizer)
    texts = [checked_text(text, column) for text in batch[column]]
    ids = [[*tool.encode(text), tool.end] for text in texts]
    return {"ids": ids, "size": [len(each) for each in ids], "bytes": [len(text.encode()) for text in texts]}


def checked_text(text: Any, column: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"column must hold texts, {column!r} holds {text!r:.60}: leave such rows out, or take another")
    return text
