"""Tokens in numpy files, as `longnet tokenize` leaves them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_longnet.data.base import StreamLoaders
from lightning_longnet.data.streams import TokenFiles
from lightning_longnet.data.tokenizers import Tokenizer, tokenizer_of
from lightning_longnet.data.tokenizing import DESCRIPTION_FILE, PLAN_FILE, document_file, read_description

if TYPE_CHECKING:
    from torch import Tensor


class TokenFileData(StreamLoaders):
    """Shards of tokens, mapped into memory; the end of them for validation.

    Args:
        path: the folder that `longnet tokenize` wrote, or one of .npy files of anyone's: a row of uint8, uint16 or
            uint32 each, joined in the order of their names.
        tokens: in a row.
        batch_size: rows of a step, on each rank or group of ranks that share sequences.
        tokenizer: a Hugging Face tokenizer, by its name or folder, or "bytes"; by default the one that the files were
            made with.  Loaded when a text is encoded or decoded.
        vocab_size: tokens are numbers below it; needed where there is no tokens.json.
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
        told = self._description(vocab_size)
        self._vocab_size: int = told["vocab_size"]
        self.bytes_per_token = told.get("bytes_per_token")
        self._made_with: str | None = told.get("tokenizer")
        self._shards = [self.folder / name for name in told["shards"]]

    def _description(self, vocab_size: int | None) -> dict[str, Any]:
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
        told = read_description(file)
        if missing := [name for name in ("vocab_size", "shards") if name not in told]:
            raise ValueError(f"path must hold a {DESCRIPTION_FILE} of longnet tokenize, {file} has no {missing[0]}")
        if vocab_size not in (None, told["vocab_size"]):
            raise ValueError(
                f"vocab_size must be that of the tokens in {self.folder}, {told['vocab_size']:,}, got {vocab_size:,}"
            )
        return told

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def tokenizer_name(self) -> str | None:
        return self._tokenizer or self._made_with

    @property
    def tokenizer(self) -> Tokenizer:
        name = self.tokenizer_name
        if name is None:
            raise ValueError(f"tokenizer must be given: nothing in {self.folder} says what its tokens stand for")
        found = tokenizer_of(name)
        if found.vocab_size != self.vocab_size:
            raise ValueError(
                f"tokenizer must have the vocabulary of the tokens in {self.folder}, {self.vocab_size:,}, got {name!r} "
                f"of {found.vocab_size:,}"
            )
        return found

    def encode(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer.encode(text), dtype=torch.int64)

    def decode(self, ids: Tensor) -> str:
        return self.tokenizer.decode(ids.tolist())

    def setup(self, stage: str) -> None:
        if missing := [path for path in self._shards if not path.exists()]:
            raise FileNotFoundError(
                f"path must hold all shards that its {DESCRIPTION_FILE} names, {missing[0]} is not there"
            )
        borders = [document_file(path) for path in self._shards] if self._made_with else []
        self._use(TokenFiles(self._shards, borders))
