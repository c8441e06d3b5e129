"""Tokenizers: bytes, or a tokenizer of Hugging Face.  This module imports neither torch nor Lightning."""

from __future__ import annotations

from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from lightning_longnet.trust import is_trusted

BYTES = "bytes"
UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # the text of a token that has none


class Tokenizer(Protocol):
    """A tokenizer of text.

    Attributes:
        name: the argument of `tokenizer_of` that returns it.
        vocab_size: size of the vocabulary.
        end: the token that ends a document.
    """

    name: str

    @property
    def vocab_size(self) -> int: ...

    @property
    def end(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def encode_chat(self, messages: list[dict[str, Any]]) -> tuple[list[int], list[bool]]:
        """Return the tokens of a chat, and whether a model is trained to predict each."""

    def decode(self, ids: list[int]) -> str: ...

    def special_tokens(self) -> dict[str, int]:
        """Return the tokens for the `generation_config.json` of transformers, such as `eos_token_id`."""

    def save(self, folder: Path) -> None:
        """Write the files that `AutoTokenizer.from_pretrained(folder)` reads."""


class ByteTokenizer:
    """The tokenizer of UTF-8 bytes.  The byte 0 ends a document; texts are assumed not to contain it."""

    name, vocab_size, end = BYTES, 256, 0

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_chat(self, messages: list[dict[str, Any]]) -> tuple[list[int], list[bool]]:
        raise ValueError("tokenizer must be one with a chat template for a column of chats, got 'bytes'")

    def decode(self, ids: list[int]) -> str:
        """Return the text of tokens.

        The vocabulary of a model may be larger than 256; such tokens become `UNKNOWN`.
        """
        return b"".join(bytes([i]) if i < 256 else UNKNOWN.encode() for i in ids).decode(errors="replace")

    def special_tokens(self) -> dict[str, int]:
        return {"eos_token_id": self.end, "pad_token_id": self.end}

    def save(self, folder: Path) -> None:
        """Write a tokenizer of transformers whose tokens are the same bytes."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        # token 0 is named by its character and not as ByteLevel does, so that texts which contain it have it here too
        end = "\0"
        names = {**{name: i for i, name in enumerate(_byte_names()) if i}, end: self.end}
        tokenizer = Tokenizer(models.BPE(names, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        special = AddedToken(end, special=True, normalized=False)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            eos_token=special,
            pad_token=special,
            padding_side="left",
            clean_up_tokenization_spaces=False,
            model_input_names=["input_ids", "attention_mask"],
        ).save_pretrained(folder)


def _byte_names() -> list[str]:
    """Return the characters by which ByteLevel of `tokenizers` names the 256 bytes."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}  # of Latin 1; others get characters from 256 on
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


class HubTokenizer:
    """The tokenizer of a Hugging Face model, given its name or its folder."""

    def __init__(self, name: str) -> None:
        if find_spec("transformers") is None:
            raise ModuleNotFoundError(
                f"tokenizer {name!r} needs transformers: pip install 'lightning-longnet[hf]', or take {BYTES!r}"
            )
        from transformers import AutoTokenizer

        self.name = name
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=is_trusted())
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise ValueError(
                f"tokenizer must be {BYTES!r}, the name of a Hugging Face tokenizer or the folder of one, got "
                f"{name!r}: {first}"
            ) from error

    @cached_property
    def vocab_size(self) -> int:
        return len(self._tokenizer)

    @cached_property
    def end(self) -> int:
        for token in (self._tokenizer.eos_token_id, self._tokenizer.sep_token_id):
            if token is not None:
                return int(token)
        raise ValueError(f"tokenizer must have a token for the end of a document (eos or sep), {self.name!r} has none")

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    @cached_property
    def begin(self) -> list[int]:
        """The special tokens that this tokenizer puts before a text, such as `<bos>`."""
        text = "a"
        ids: list[int] = self._tokenizer(text)["input_ids"]
        own = self.encode(text)
        starts = [i for i in range(len(ids)) if ids[i : i + len(own)] == own]
        return ids[: starts[0]] if starts else []

    def encode_chat(self, messages: list[dict[str, Any]]) -> tuple[list[int], list[bool]]:
        """Return the tokens of a chat by the chat template, and whether a model is trained to predict each.

        These are what the assistant says, where the template marks that with `{% generation %}`; else all.
        """
        template = self._tokenizer.chat_template
        if not template:
            raise ValueError(f"tokenizer must have a chat template for a column of chats, {self.name!r} has none")
        marks = "{% generation" in str(template).replace("{%-", "{%")
        encoded = self._tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=marks
        )
        ids = list(encoded["input_ids"])
        return ids, [bool(each) for each in encoded["assistant_masks"]] if marks else [True] * len(ids)

    def decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids)
        return text

    def special_tokens(self) -> dict[str, int]:
        named = {f"{name}_token_id": getattr(self._tokenizer, f"{name}_token_id") for name in ("bos", "pad")}
        tokens = {name: token for name, token in named.items() if token is not None}
        if self._tokenizer.eos_token_id is not None or self._tokenizer.sep_token_id is not None:
            tokens = {"eos_token_id": self.end, "pad_token_id": self.end, **tokens}
        return tokens

    def save(self, folder: Path) -> None:
        self._tokenizer.save_pretrained(folder)


def lasting_name(name: str) -> str:
    """Return a name that finds the same tokenizer from any folder: for a folder its absolute path."""
    return str(Path(name).resolve()) if name != BYTES and Path(name).is_dir() else name


@lru_cache(4)
def tokenizer_of(name: str) -> Tokenizer:
    """Return the tokenizer of this name, folder, or "bytes"."""
    return ByteTokenizer() if name == BYTES else HubTokenizer(name)
