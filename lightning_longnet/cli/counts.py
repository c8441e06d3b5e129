"""Numbers of tokens as users write them, such as 64k, and numbers of things as messages write them."""

from __future__ import annotations

import argparse
import re
from typing import Any

_SIZES = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "b": 2**30}
_COUNT = re.compile(r"([+-]?[\d_.]+(?:e[+-]?\d+)?)([kmgb]?)", re.IGNORECASE)
# of the Trainer's commands
_OPTIONS = (
    *("--data.tokens", "--data.init_args.tokens"),
    *("--model.generated_tokens", "--model.init_args.generated_tokens"),
)
_COMMANDS = ("fit.", "validate.", "test.", "predict.")  # which a file for all of them may have sections for


def token_count(text: str) -> int:
    """Return a whole number, which may be written as 1e6, 64k, 1M or 1B: k is 2**10, M is 2**20, G and B are 2**30."""
    count = _count(text)
    if count is None:
        raise argparse.ArgumentTypeError(
            f"must be a whole number, got {text!r}; 64k stands for 65,536, and 1M for 1,048,576"
        )
    return count


def _count(text: str) -> int | None:
    """Return the whole number that a text stands for; None where it stands for none."""
    match = _COUNT.fullmatch(text)
    if match is None:
        return None
    size = _SIZES[match[2].lower()]
    try:
        return int(match[1]) * size
    except ValueError:
        pass
    try:
        value = float(match[1]) * size
    except ValueError:
        return None
    return int(value) if value.is_integer() else None


def plain_counts(words: list[str]) -> list[str]:
    """Return a command line with plain numbers in the place of those such as 64k, in the options that count tokens."""
    found = list(words)
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name not in _OPTIONS or not (equals or i + 1 < len(words)):
            continue
        count = _count(value if equals else words[i + 1])
        if count is not None:
            found[i if equals else i + 1] = f"{name}={count}" if equals else str(count)
    return found


def plain_values(values: Any) -> Any:
    """Return the content of a configuration file with plain numbers in the place of those such as 64k, likewise."""
    if not isinstance(values, dict):  # the parser reads each value of the command line by itself
        return values
    for command in ("", *_COMMANDS):
        for option in _OPTIONS:
            *parents, name = f"{command}{option[2:]}".split(".")
            holder: Any = values
            for parent in parents:
                holder = holder.get(parent) if isinstance(holder, dict) else None
            given = holder.get(name) if isinstance(holder, dict) else None
            if isinstance(given, str) and (count := _count(given)) is not None:
                holder[name] = count
    return values


def counted(count: int, noun: str) -> str:
    """Return a number with its noun, as in "1 file" and "2,000 files"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
