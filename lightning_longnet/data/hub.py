"""Texts of datasets of Hugging Face `datasets`, from the Hub or from files."""

from __future__ import annotations

import json
from functools import partial
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_longnet.data.base import StreamLoaders
from lightning_longnet.data.streaming import StreamedRows
from lightning_longnet.data.streams import Stream, entropy_of
from lightning_longnet.data.tokenizers import Tokenizer, lasting_name, tokenizer_of
from lightning_longnet.layers.loss import IGNORED
from lightning_longnet.trust import confined

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
_READ = 16  # texts of a streamed dataset that are read at a time
_EACH = 20  # every twentieth streamed text is for validation
_MEASURED = 2**22  # maximal number of tokens of a stream in which frequencies are counted


class HubData(StreamLoaders):
    """A data module of a column of texts, each a document that ends with the end token of the tokenizer.

    A column of chats, lists of messages {"role": ..., "content": ...}, is read by the tokenizer's chat template, which
    ends each document itself.  Where the template marks what the assistant says (`{% generation %}`), only that is
    trained: labels are -100 elsewhere.

    Texts are tokenised once, and the tokens are stored in the cache of `datasets`, from which rows are read.  With
    `streaming` nothing is stored: texts come in the order of the dataset, and every rank reads all of them.

    Args:
        path: a dataset of the Hub, a folder that `save_to_disk` wrote, or a file: .json, .jsonl, .txt, .csv, .parquet,
            .arrow.
        name: the name of a configuration of the dataset.
        split: the split for training.
        validation_split: the split for validation; by default the end of `split`, or every twentieth text of a stream.
        column: the column that holds the texts or the chats.
        tokenizer: the name or folder of a Hugging Face tokenizer, or "bytes".
        tokens: number of tokens in a row.
        batch_size: rows of a batch, on each rank or each group of ranks that share sequences.
        streaming: reads the dataset from its beginning, without an index, for data that is too large to store.
        packed: packs whole documents into rows, in which they neither attend to nor predict each other.  With False
            the stream is cut into rows regardless of documents.
        validation_share: share of `split`, at its end, that is for validation where there is no `validation_split`.
        seed: seed of the order of training rows.
        num_workers: worker processes of each rank that read ahead; 0 reads in the process of the rank.
        pin_memory: puts batches in pinned memory, from which copies to a GPU are faster.
        read_parts: where ranks share sequences, the samples of each hold only its own tokens.  With False they are
            whole rows, which the strategy splits.
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
        return lasting_name(self._tokenizer)

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
        """Tokenise on one rank of each machine, before the other ranks read the cache."""
        if not self.streaming:
            for split in filter(None, (self.split, self.validation_split)):
                self._tokens_of(split)

    def setup(self, stage: str) -> None:
        if self.streaming:
            self._measure()
            return
        stream = self._tokens_of(self.split)
        validation = self._tokens_of(self.validation_split) if self.validation_split else None
        self._set_rows(stream, validation)
        self.bytes_per_token = stream.bytes / len(stream)

    def _load(self, split: str) -> Any:
        """Return the dataset of a split, streamed or not; raise if it has no such split or column."""
        import datasets

        path = Path(self.path)
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            _check_saved(path)
            dataset = datasets.load_from_disk(self.path)
            if isinstance(dataset, datasets.DatasetDict):
                if split not in dataset:
                    raise ValueError(f"splits must be of {self.path}, {', '.join(dataset)}, got {split!r}")
                dataset = dataset[split]
            dataset = dataset.to_iterable_dataset() if self.streaming else dataset
        else:
            builder = _BUILDERS.get(path.suffix)
            source = (builder,) if builder else (self.path, self.name)
            files = self.path if builder else None
            try:
                dataset = datasets.load_dataset(*source, data_files=files, split=split, streaming=self.streaming)
            except ValueError as error:  # the split or the name does not exist
                raise ValueError(f"path {self.path}, split {split!r}: {error}") from error
        columns = dataset.column_names
        if columns is not None and self.column not in columns:
            raise ValueError(f"column must be one of {', '.join(columns)}, got {self.column!r}")
        return dataset

    def _tokens_of(self, split: str) -> TextStream:
        """Return the tokens of a split, from the cache of `datasets` where they are there."""
        dataset = self._load(split)
        options = {"column": self.column, "tokenizer": self._tokenizer}
        convert = chat_tokens_of if is_chat(dataset, self.column) else tokens_of
        dataset = dataset.map(convert, batched=True, fn_kwargs=options, remove_columns=dataset.column_names)
        return TextStream(dataset, repr((self.path, self.name, split, self.column, self._tokenizer)))

    # Streaming

    def texts(self, split: str, is_validation: bool) -> Iterator[Tensor]:
        """Yield the tokens of each streamed text of training or of validation, int64 with the end token.

        Without a `validation_split` both come from the same split, of which every twentieth text is for validation.
        """
        is_shared = self.validation_split is None
        # in batches: a dataset that is iterated text by text distributes its texts over worker processes itself
        batches = self._load(split).iter(_READ)
        for number, text in enumerate(text for batch in batches for text in batch[self.column]):
            if not is_shared or (number % _EACH == _EACH - 1) == is_validation:
                if isinstance(text, list):
                    raise ValueError(f"streaming must be False for a column of chats, as {self.column!r} is")
                ids = self.tokenizer.encode(checked_text(text, self.column))
                yield torch.tensor([*ids, self.tokenizer.end], dtype=torch.int64)

    def _measure(self) -> None:
        """Set `unigram_bits` and `bytes_per_token`, measured at the beginning of the validation data."""
        counts, size = torch.zeros(self.vocab_size, dtype=torch.int64), 0
        for ids in self.texts(self.validation_split or self.split, True):
            counts += torch.bincount(ids, minlength=self.vocab_size)
            size += len(self.tokenizer.decode(ids[:-1].tolist()).encode())
            if counts.sum() >= _MEASURED:
                break
        if not (total := int(counts.sum())):
            raise ValueError(f"validation_split must be given where a stream has fewer than {_EACH} texts")
        self.unigram_bits, self.bytes_per_token = entropy_of(counts), size / total

    def _stream_loader(self, split: str, is_validation: bool) -> DataLoader[Any]:
        """Return a DataLoader of streamed rows."""
        rows = StreamedRows(
            partial(self.texts, split, is_validation),
            repr((self.path, self.name, split, is_validation, self.column, self._tokenizer)),
            self.tokens,
            self.batch_size,
            *self._replicas(),
            self._cut(),
            drop_last=not is_validation,
        )
        return self._plain_loader(rows)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._stream_loader(self.split, False) if self.streaming else super().train_dataloader()

    def val_dataloader(self) -> DataLoader[Any]:
        if self.streaming:
            return self._stream_loader(self.validation_split or self.split, True)
        return super().val_dataloader()

    def predict_dataloader(self) -> DataLoader[Any]:
        return self.val_dataloader() if self.streaming else super().predict_dataloader()


def _check_saved(folder: Path) -> None:
    """Raise a ValueError where a folder that `save_to_disk` wrote names a file or a split outside of it."""
    names = []
    for file in (folder / "dataset_dict.json", *folder.rglob("state.json")):
        content = json.loads(file.read_text()) if file.is_file() else {}
        names += [file.parent / str(each) for each in content.get("splits", ())]
        names += [file.parent / str(each["filename"]) for each in content.get("_data_files", ())]
    for each in names:
        confined("path", each, folder)


class TextStream(Stream):
    """The tokens of a dataset that was tokenised by `tokens_of`, read from its files on disk.

    Args:
        texts: a dataset with the columns of `tokens_of`.
        identity: a text that is equal for equal data on all ranks, and different for other data.
    """

    def __init__(self, texts: Any, identity: str) -> None:
        self.texts = texts.with_format("torch", columns=["ids"])
        self.targets = texts.with_format("torch", columns=["labels"]) if "labels" in texts.column_names else None
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
        return self._column(self.texts, "ids", begin, end)

    def targets_of(self, tokens: Tensor, begin: int) -> Tensor:
        if self.targets is None or not len(tokens):
            return tokens
        return self._column(self.targets, "labels", begin, begin + len(tokens))

    def _column(self, texts: Any, name: str, begin: int, end: int) -> Tensor:
        """Return the values of a column for tokens `begin` to `end`."""
        first, last = torch.searchsorted(self._starts, torch.tensor([begin, end - 1]), right=True).tolist()
        parts = texts[first - 1 : last][name]
        return torch.cat(list(parts))[begin - int(self._starts[first - 1]) :][: end - begin].long()


def tokens_of(batch: dict[str, list[Any]], column: str, tokenizer: str) -> dict[str, list[Any]]:
    """Return the tokens of a batch of texts, their numbers and the bytes of the texts, as columns of a dataset.

    It is a function at module level because the cache of `datasets` identifies the function by its pickle.
    """
    encoder = tokenizer_of(tokenizer)
    texts = [checked_text(text, column) for text in batch[column]]
    ids = [[*encoder.encode(text), encoder.end] for text in texts]
    return {"ids": ids, "size": [len(each) for each in ids], "bytes": [len(text.encode()) for text in texts]}


def is_chat(dataset: Any, column: str) -> bool:
    """Return whether a column of a dataset holds lists of messages."""
    from datasets import Value

    features = dataset.features
    return features is not None and not isinstance(features[column], Value)


def chat_tokens_of(batch: dict[str, list[Any]], column: str, tokenizer: str) -> dict[str, list[Any]]:
    """Return the same as `tokens_of` for chats, and the labels of their tokens, -100 where nothing is trained."""
    encoder = tokenizer_of(tokenizer)
    chats = [checked_chat(chat, column) for chat in batch[column]]
    encoded = [encoder.encode_chat(chat) for chat in chats]
    return {
        "ids": [ids for ids, _ in encoded],
        "labels": [
            [i if is_trained else IGNORED for i, is_trained in zip(ids, trained, strict=True)]
            for ids, trained in encoded
        ],
        "size": [len(ids) for ids, _ in encoded],
        "bytes": [sum(len(str(message.get("content") or "").encode()) for message in chat) for chat in chats],
    }


def checked_chat(chat: Any, column: str) -> list[dict[str, Any]]:
    """Return a chat without fields that are None; raise a ValueError if it is no list of messages with a role."""
    if not isinstance(chat, list) or not all(isinstance(each, dict) and each.get("role") for each in chat):
        raise ValueError(
            f"column must hold texts, or lists of messages {{'role': ..., 'content': ...}}, {column!r} holds "
            f"{chat!r:.60}"
        )
    return [{name: value for name, value in message.items() if value is not None} for message in chat]


def checked_text(text: Any, column: str) -> str:
    """Return `text`; raise a ValueError that names the column if it is not a string."""
    if not isinstance(text, str):
        raise ValueError(f"column must hold texts, {column!r} holds {text!r:.60}: leave such rows out, or take another")
    return text
