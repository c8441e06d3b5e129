"""The errors of the parser as one line for users: the option as it was given, the reason, and the nearest right one."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import TYPE_CHECKING

import lightning as L

from lightning_longnet.cli.classes import nearest_class, subclasses
from lightning_longnet.cli.given import given_option

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lightning.pytorch.cli import LightningArgumentParser

_PATTERN = "{branches: [{segment_length: 256, dilation_rate: 1, is_causal: true}]}"
_STRATEGY = "lightning_longnet.strategies.RingSequenceParallelStrategy"
_UNKNOWN = (
    re.compile(r"Option '(?P<key>[^']+)' is not accepted"),
    re.compile(r"Group '(?P<group>[^']+)' does not accept option '(?P<key>[^']+)'"),
    re.compile(r"Subcommand '[^']+' does not accept option '(?P<key>[^']+)'"),
    re.compile(r"unrecognized arguments: --(?P<key>[\w.]+)"),
)
# Errors that name a class, in the order in which they are preferred to the others of a value
_CLASS = (
    re.compile(r"Problem with given class_path '(?P<path>[^']+)': (?P<reason>.*)"),
    re.compile(r"Import path (?P<path>\S+) (?P<reason>does not correspond to a subclass of .*)"),
    re.compile(r"Type .* expects a function or a callable class: (?P<reason>.*)"),
    re.compile(r"Expected a dot import path string: (?P<path>\S+)"),
)
# what the parser says of a value that describes no object at all, with a list of what would
_NO_OBJECT = re.compile(r"Not a valid subclass of (\w+).*?Subclass types expect one of:.*")


def explained(message: str, parser: LightningArgumentParser, words: Sequence[str]) -> str:
    """Return an error of a parser as one line.

    Args:
        message: the parser's own message.
        parser: the parser that raised it; that of a class knows the keys below this class alone.
        words: the command line without the program's name.
    """
    line = " ".join(message.split())
    is_whole = not getattr(parser, "_inner_parser", False)
    for pattern in _UNKNOWN:
        if match := pattern.match(line):
            key = ".".join(filter(None, (match.groupdict().get("group"), match["key"])))
            return _unknown(key, parser, words, is_whole)
    if line.startswith("the following arguments are required: "):
        return _required(line.partition(": ")[2].split(", "), parser)
    if match := re.match(r'Parser key "([^"]+)":', message):
        reason = _reason(message[match.end() :])
        given = given_option(match[1], words, re.split(", got |;", reason)[-1], is_whole)
        return f"{given}: {_advised(given.key, reason)}"
    if match := re.fullmatch(r"unrecognized arguments: (-?)([^-\s]\S*)", line):
        meant = f"-{match[1]}{match[2]}" if match[1] else f"--config {match[2]}"
        line += f"; did you mean {meant}?" if match[1] or match[2].endswith((".yaml", ".yml")) else ""
    return line


def _unknown(key: str, parser: LightningArgumentParser, words: Sequence[str], is_whole: bool) -> str:
    given = given_option(key, words, is_whole=is_whole)
    head, _, tail = key.rpartition(".")
    keys = [*_keys(parser, words)]
    # beside it first: all keys of a group are alike in the group's name
    siblings = [each.rpartition(".")[2] for each in keys if each.rpartition(".")[0] == head]
    near = [f"{head}.{each}" if head else each for each in get_close_matches(tail, siblings, 1)]
    near = near or get_close_matches(key, keys, 1, 0.8)
    if not near:
        return f"no option {given}"
    meant = given.key.removesuffix(key) + near[0]
    return f"no option {given}; did you mean {meant if given.file else f'--{meant}'}?"


def _keys(parser: LightningArgumentParser, words: Sequence[str]) -> Iterator[str]:
    """Yield the keys that a parser takes, with those of the command that the words name."""
    for action in parser._actions:
        if isinstance(action.choices, dict) and words and words[0] in action.choices:
            yield from _keys(action.choices[words[0]], words[1:])
        elif not action.dest.endswith("help"):
            yield action.dest


def _required(keys: Sequence[str], parser: LightningArgumentParser) -> str:
    prefix = "--"
    for section, base in (("model", L.LightningModule), ("data", L.LightningDataModule)):
        if {each.__name__ for each in subclasses(base)} & set(parser.groups or ()):
            prefix = f"--{section}."
    text = "; ".join(f"{prefix}{key} must be given" for key in keys)
    if "config.pattern" in keys:
        text += f": which keys each token attends to, as in {prefix}config.pattern='{_PATTERN}'"
    return text


def _reason(message: str) -> str:
    """Return why a value does not fit, from a message that may hold an error for each type that it could have."""
    errors = [each for each in _errors(message) if "NoneType" not in each]
    for pattern in _CLASS:
        for error in errors:
            if match := pattern.match(error):
                groups = match.groupdict()
                path, reason = groups.get("path"), groups.get("reason", "no class of this name is known")
                missing = re.search(r"module '([^']+)' has no attribute '([^']+)'", reason)
                path = path or (".".join(missing.groups()) if missing else "")
                return f"{reason}{'' if path in reason else f', got {path}'}{nearest_class(path)}"
    shown = [_plain(_NO_OBJECT.sub(r"expected the arguments of a \1", each)) for each in errors]
    reason = "; ".join(dict.fromkeys(shown))
    value = re.search(r"Given value: (.*)", message)
    return reason if ", got " in reason or not value else f"{reason}, got {value[1][:80]}"


def _errors(message: str) -> list[str]:
    """Return the errors that a message lists, each as one line, or the message itself."""
    before, header, after = message.partition("Errors:\n")
    if not header:
        return [" ".join(before.split())]
    bullets = list(re.finditer(r"^( *)- ", after, re.MULTILINE))
    begins = [each for each in bullets if len(each[1]) == len(bullets[0][1])]  # deeper ones are lists in an error
    end = re.search(r"^ *Given value type:", after, re.MULTILINE)
    ends = [*(each.start() for each in begins[1:]), end.start() if end else len(after)]
    return [" ".join(after[begin.end() : end].split()) for begin, end in zip(begins, ends, strict=True)]


def _advised(key: str, reason: str) -> str:
    """Return a reason with what the options that newcomers get wrong look like."""
    if key.endswith("config.pattern"):
        return f"{reason}; a pattern looks like {_PATTERN}"
    if key == "trainer.strategy" and (name := re.match(r"no class of this name is known, got (\w+)", reason)):
        return f"arguments of a strategy need its class, such as {_STRATEGY}, got the name {name[1]}"
    return reason


def _plain(text: str) -> str:
    """Return a text with types as users write them."""
    text = re.sub(r"typing\.Literal\[([^\]]*)\]", r"one of \1", re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text))
    text = re.sub(r"Expected a (?=[aeiou])", "expected an ", text.replace("Expected a one of", "expected one of"))
    return text.replace("Expected a", "expected a").replace(". Got value:", ", got")
