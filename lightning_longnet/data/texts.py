"""Text files as streams of tokens, which are read and tokenised a piece at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from lightning_longnet.data.tokenizing import PIECE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from lightning_longnet.data.tokenizers import Tokenizer

_LINE_BYTES = 4 * PIECE_BYTES  # longer lines are cut, so that no line needs more memory than this
_SHORT = 4096  # bytes of a file that is tokenised beforehand, as it may hold too few tokens


class Text(NamedTuple):
    """A text file, and its state when it was listed.

    Attributes:
        path: its path.
        size: its size in bytes.
        changed: its modification time in ns.
    """

    path: Path
    size: int
    changed: int


def texts_of(paths: Sequence[Path], tokenizer: Tokenizer, least: int) -> list[Text]:
    """Return the text files at these paths; raise a ValueError where one holds fewer than `least` tokens.

    Only short files are tokenised for that, so a longer one may still hold too few.
    """
    texts = []
    for path in paths:
        stat = path.stat()
        text = Text(path, stat.st_size, stat.st_mtime_ns)
        if text.size <= _SHORT:
            check_tokens(text, sum(map(len, TokenReader(text, tokenizer))), least)
        texts.append(text)
    return texts


def check_tokens(text: Text, tokens: int, least: int) -> None:
    """Raise a ValueError where a text has fewer than `least` tokens."""
    if tokens < least:
        minimum = "a token" if least == 1 else f"{least} tokens"
        held = "is empty" if text.size == 0 else f"holds {tokens}"
        raise ValueError(f"each file must hold at least {minimum}, {text.path} {held}")


class TokenReader:
    """The tokens of a text, in pieces of a few MiB of text.

    They are those that `longnet tokenize` writes, without the end token, unless a line is longer than 4 MiB: such lines
    are cut between two characters.

    Args:
        text: the text, in UTF-8.
        tokenizer: its tokenizer.
        vocab_size: size of the model's vocabulary; a token beyond it raises a ValueError.

    Attributes:
        bytes, tokens: how much has been read.
    """

    def __init__(self, text: Text, tokenizer: Tokenizer, vocab_size: int | None = None) -> None:
        self.text, self.tokenizer, self.vocab_size = text, tokenizer, vocab_size
        self.bytes = self.tokens = 0

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the tokens in their order, int64 (n,)."""
        for begin, raw in _pieces(self.text.path):
            try:
                ids = torch.tensor(self.tokenizer.encode(raw.decode()), dtype=torch.int64)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"files must hold text in UTF-8, {self.text.path} does not: {error.reason} at byte "
                    f"{begin + error.start}"
                ) from error
            highest = int(ids.max()) if len(ids) else 0
            if self.vocab_size is not None and highest >= self.vocab_size:
                raise ValueError(
                    f"tokenizer must be the model's: it gives token {highest}, and the model has {self.vocab_size}"
                )
            self.bytes, self.tokens = self.bytes + len(raw), self.tokens + len(ids)
            if len(ids):
                yield ids


def _pieces(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the index of the first byte and the bytes of each piece.

    A piece has the lines that begin before the next multiple of `PIECE_BYTES`, as those of `longnet tokenize`.
    """
    with path.open("rb") as opened:
        while True:
            begin = opened.tell()
            raw = opened.read(PIECE_BYTES - begin % PIECE_BYTES)
            if not raw:
                return
            if not raw.endswith(b"\n"):
                raw += opened.readline(_LINE_BYTES)
            while (following := opened.read(1)) and 0x80 <= following[0] < 0xC0 and not raw.endswith(b"\n"):
                raw += following  # the rest of a character
            if following:
                opened.seek(-1, 1)
            yield begin, raw


def regrouped(pieces: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Yield the tokens of consecutive pieces as blocks of `size` tokens, the last of which may be shorter."""
    held: list[Tensor] = []
    count = 0
    for piece in pieces:
        held.append(piece)
        count += len(piece)
        if count >= size:
            joined = torch.cat(held)
            *whole, rest = joined.split(size)
            if len(rest) == size:
                whole, rest = [*whole, rest], rest[:0]
            yield from whole
            held, count = [rest], len(rest)
    if count:
        yield torch.cat(held)
