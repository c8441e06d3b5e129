"""Tokens in .npy files, as `longnet tokenize` writes them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_longnet.data.base import StreamLoaders
from lightning_longnet.data.streams import TokenFiles, read_samples
from lightning_longnet.data.tokenizers import Tokenizer, lasting_name, tokenizer_of
from lightning_longnet.data.tokenizing import DESCRIPTION_FILE, PLAN_FILE, document_file, read_description
from lightning_longnet.trust import confined

if TYPE_CHECKING:
    from torch import Tensor


class TokenFileData(StreamLoaders):
    """A data module of memory-mapped shards of tokens, with the end of the tokens for validation.

    Args:
        path: a folder that `longnet tokenize` wrote, or a folder of other .npy files, each a one-dimensional array of
            uint8, uint16 or uint32, which are concatenated in the order of their names.
        tokens: number of tokens in a row.
        batch_size: rows of a batch, on each rank or each group of ranks that share sequences.
        tokenizer: the name or folder of a Hugging Face tokenizer, or "bytes"; by default the one that made the files.
            It is loaded when a text is encoded or decoded.
        vocab_size: size of the vocabulary; required where there is no tokens.json.
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
        path: str,
        tokens: int = 4096,
        batch_size: int = 1,
        tokenizer: str | None = None,
        vocab_size: int | None = None,
        packed: bool = False,
        validation_share: float = 0.05,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
        read_parts: bool = True,
    ) -> None:
        super().__init__(tokens, batch_size, packed, validation_share, seed, num_workers, pin_memory, read_parts)
        self.folder, self._tokenizer = Path(path), tokenizer
        content = self._description(vocab_size)
        self._vocab_size: int = content["vocab_size"]
        self.bytes_per_token = content.get("bytes_per_token")
        self._made_with: str | None = content.get("tokenizer")
        self._shards = [self._inside(name) for name in content["shards"]]

    def _inside(self, name: str) -> Path:
        """Return the path of a file of the folder; raise a ValueError where it leads out of it."""
        return confined(f"the files of {DESCRIPTION_FILE}", self.folder / name, self.folder)

    def _description(self, vocab_size: int | None) -> dict[str, Any]:
        """Return the content of tokens.json, or a dictionary of the .npy files where there is none."""
        file = self.folder / DESCRIPTION_FILE
        if not self.folder.is_dir():
            raise FileNotFoundError(f"path must be a folder of tokens, there is no folder {self.folder}")
        if not file.exists():
            if (self.folder / PLAN_FILE).exists():
                raise ValueError(
                    f"path must hold tokens that are complete: those in {self.folder} are not; start the same `longnet "
                    f"tokenize` again, which goes on where it stopped"
                )
            shards = sorted(each.name for each in self.folder.glob("*.npy"))
            if not shards:
                raise ValueError(f"path must hold {DESCRIPTION_FILE} or .npy files, found none in {self.folder}")
            if vocab_size is None:
                raise ValueError(f"vocab_size must be given where there is no {DESCRIPTION_FILE}, as in {self.folder}")
            return {"vocab_size": vocab_size, "shards": shards}
        content = read_description(self._inside(file.name))
        if missing := [name for name in ("vocab_size", "shards") if name not in content]:
            raise ValueError(f"path must hold a {DESCRIPTION_FILE} of longnet tokenize, {file} has no {missing[0]}")
        _check_types(file, content)
        if vocab_size not in (None, content["vocab_size"]):
            raise ValueError(
                f"vocab_size must be that of the tokens in {self.folder}, {content['vocab_size']:,}, got {vocab_size:,}"
            )
        return content

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def tokenizer_name(self) -> str | None:
        name = self._tokenizer or self._made_with
        return None if name is None else lasting_name(name)

    @property
    def tokenizer(self) -> Tokenizer:
        name = self.tokenizer_name
        if name is None:
            raise ValueError(f"tokenizer must be given: nothing in {self.folder} says what its tokens stand for")
        if Path(name).is_absolute() and not Path(name).exists():
            raise ValueError(
                f"tokenizer must be given: {name}, which made the tokens in {self.folder}, is not there any more"
            )
        tokenizer = tokenizer_of(name)
        if tokenizer.vocab_size != self.vocab_size:
            raise ValueError(
                f"tokenizer must have the vocabulary of the tokens in {self.folder}, {self.vocab_size:,}, got {name!r} "
                f"of {tokenizer.vocab_size:,}"
            )
        return tokenizer

    def encode(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer.encode(text), dtype=torch.int64)

    def decode(self, ids: Tensor) -> str:
        return self.tokenizer.decode(ids.tolist())

    def setup(self, stage: str) -> None:
        if missing := [path for path in self._shards if not path.exists()]:
            raise FileNotFoundError(
                f"path must hold all shards that its {DESCRIPTION_FILE} names, {missing[0]} is not there"
            )
        documents = [self._inside(document_file(path).name) for path in self._shards] if self._made_with else []
        stream = TokenFiles(self._shards, documents, self.vocab_size)
        read_samples(stream)
        self._set_rows(stream)


def _check_types(file: Path, content: dict[str, Any]) -> None:
    """Raise a ValueError where a value in tokens.json is not of the type that `longnet tokenize` writes."""
    types: dict[str, Any] = {"vocab_size": int, "shards": list}
    types |= {"tokenizer": str | None, "bytes_per_token": int | float | None}
    for name, kind in types.items():
        value = content.get(name)
        is_wrong = not isinstance(value, kind) or (name == "vocab_size" and content[name] < 1)
        if is_wrong or (name == "shards" and not all(isinstance(each, str) for each in content[name])):
            raise ValueError(f"{name} in {file} must be as longnet tokenize leaves it, got {str(value)[:80]!r}")
