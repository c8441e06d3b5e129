"""Text to numbers and back: bytes, or a Hugging Face tokenizer.  Neither torch nor Lightning is needed."""

from __future__ import annotations

from functools import cached_property, lru_cache
from importlib.util import find_spec
from typing import Any, Protocol

BYTES = "bytes"
UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # what stands for no text


class Tokenizer(Protocol):
    """A tokenizer of text.

    Attributes:
        name: by which `tokenizer_of` finds it.
        vocab_size: tokens are numbers below it.
        end: the token that stands after a document.
    """

    name: str

    @property
    def vocab_size(self) -> int: ...

    @property
    def end(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


class ByteTokenizer:
    """Bytes; the byte 0, which no text has, ends a document."""

    name, vocab_size, end = BYTES, 256, 0

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        """A model may know more tokens than there are bytes, and draw one of those."""
        return b"".join(bytes([i]) if i < 256 else UNKNOWN.encode() for i in ids).decode(errors="replace")


class HubTokenizer:
    """That of a Hugging Face model, by its name or the folder where it lies."""

    def __init__(self, name: str) -> None:
        if find_spec("transformers") is None:
            raise ModuleNotFoundError(
                f"tokenizer {name!r} needs transformers: pip install 'lightning-longnet[hf]', or take {BYTES!r}"
            )
        from transformers import AutoTokenizer

        self.name = name
        try:
            self._found: Any = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise ValueError(
                f"tokenizer must be {BYTES!r}, the name of a Hugging Face tokenizer or the folder of one, got "
                f"{name!r}: {first}"
            ) from error

    @cached_property
    def vocab_size(self) -> int:
        return len(self._found)

    @cached_property
    def end(self) -> int:
        for token in (self._found.eos_token_id, self._found.sep_token_id):
            if token is not None:
                return int(token)
        raise ValueError(f"tokenizer must have a token for the end of a document (eos or sep), {self.name!r} has none")

    def encode(self, text: str) -> list[int]:
        found: list[int] = self._found(text, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    def decode(self, ids: list[int]) -> str:
        text: str = self._found.decode(ids)
        return text


@lru_cache(4)
def tokenizer_of(name: str) -> Tokenizer:
    return ByteTokenizer() if name == BYTES else HubTokenizer(name)
