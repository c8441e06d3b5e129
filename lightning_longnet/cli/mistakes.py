"""The errors of the parser as one line for users: the option as it was given, the reason, and the nearest right one."""

from __future__ import annotations

import re
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import lightning as L
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import Strategy

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lightning.pytorch.cli import LightningArgumentParser

_BASES = (L.LightningModule, L.LightningDataModule, Callback, Strategy)
_PATTERN = "'{branches: [{segment_length: 256, dilation_rate: 1, is_causal: true}]}'"
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


class Given(NamedTuple):
    """An option as the user gave it: its key, and the file that holds it, or an empty text for the command line."""

    key: str
    file: str = ""

    def __str__(self) -> str:
        return f"{self.key} in {self.file}" if self.file else f"--{self.key}"


def explained(message: str, parser: LightningArgumentParser, words: Sequence[str]) -> str:
    """Return an error of a parser as one line.

    Args:
        message: the parser's own message.
        parser: the parser that raised it; that of a class knows the keys below this class alone.
        words: the command line without the program's name.
    """
    line = " ".join(message.split())
    for pattern in _UNKNOWN:
        if match := pattern.match(line):
            return _unknown(".".join(filter(None, (match.groupdict().get("group"), match["key"]))), parser, words)
    if line.startswith("the following arguments are required: "):
        return _required(line.partition(": ")[2].split(", "), parser)
    if match := re.match(r'Parser key "([^"]+)":', message):
        return f"{_given(match[1], words)}: {_reason(message[match.end() :])}"
    if "Problems parsing config" in line:
        broken = next(
            (path for path in config_files(words) if content(path) is None and path.read_text().strip()), None
        )
        line = f"{broken} is no YAML: {line.partition(': ')[2]}" if broken else line
    return line


def class_of(path: str, base: type) -> type:
    """Return the class of a path, or of the name of a subclass of `base` that is loaded; raise a ValueError without.

    The message says why there is none, and names the nearest.
    """
    module, _, name = path.rpartition(".")
    if not module:
        found = next((each for each in _subclasses(base) if each.__name__ == name), None)
        if found is None:
            raise ValueError(f"model must be the path of a class, got {path!r}{_nearest(path)}")
        return found
    try:
        value: Any = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model must be the path of a class, got {path!r}: {error}{_nearest(path)}") from None
    if isinstance(value, type) and not issubclass(value, base):
        raise ValueError(f"model must be the path of a {base.__name__}, got {path!r}, which is none")
    return value  # type: ignore[no-any-return]  # a function that makes one serves as well


def nearest(name: str, names: Sequence[str]) -> str:
    """Return the question whether the nearest of `names` was meant, or an empty text where none is near."""
    near = get_close_matches(name, names, 1)
    return f"; did you mean {near[0]}?" if near else ""


def _unknown(key: str, parser: LightningArgumentParser, words: Sequence[str]) -> str:
    given = _given(key, words)
    head, _, tail = key.rpartition(".")
    keys = [*_keys(parser, words)]
    # beside it first: all keys of a group are alike in the group's name
    siblings = [each.rpartition(".")[2] for each in keys if each.rpartition(".")[0] == head]
    near = [f"{head}.{each}" if head else each for each in get_close_matches(tail, siblings, 1)]
    near = near or get_close_matches(key, keys, 1, 0.8)
    question = f"; did you mean {given._replace(key=given.key.removesuffix(key) + near[0], file='')}?" if near else ""
    if given.file:
        question = question.replace("--", "", 1)
    return f"no option {given}{question}"


def _keys(parser: LightningArgumentParser, words: Sequence[str]) -> Iterator[str]:
    """Yield the keys that a parser takes, with those of the command that the words name."""
    for action in parser._actions:
        if isinstance(action.choices, dict) and words and words[0] in action.choices:
            yield from _keys(action.choices[words[0]], words[1:])
        elif not action.dest.endswith("help"):
            yield action.dest


def _required(keys: Sequence[str], parser: LightningArgumentParser) -> str:
    names = {each.__name__ for each in _subclasses(L.LightningModule)}
    prefix = "--model." if names & set(parser.groups or ()) else "--"
    lines = [f"{prefix}{key} must be given" for key in keys]
    if "config.pattern" in keys:
        lines.append(f"which keys each token attends to, as in {prefix}config.pattern={_PATTERN}")
    return ": ".join(["; ".join(lines[: len(keys)]), *lines[len(keys) :]])


def _reason(message: str) -> str:
    """Return why a value does not fit, from a message that may hold an error for each type that it could have."""
    lines = [line.strip() for line in message.splitlines()]
    errors: list[str] = []
    if "Errors:" in lines:
        for line in lines[lines.index("Errors:") + 1 :]:
            if line.startswith("Given value"):
                break
            if line.startswith("- "):
                errors.append(line.removeprefix("- "))
            elif errors:
                errors[-1] += f" {line}"
        errors = [each for each in errors if "NoneType" not in each]
    else:
        errors = [" ".join(filter(None, lines))]
    for pattern in _CLASS:
        for error in errors:
            if match := pattern.match(error):
                found = match.groupdict()
                path, reason = found.get("path"), found.get("reason", "no class of this name is known")
                missing = re.search(r"module '([^']+)' has no attribute '([^']+)'", reason)
                path = path or (".".join(missing.groups()) if missing else "")
                return f"{reason}{'' if path in reason else f', got {path}'}{_nearest(path)}"
    value = next((line.partition(": ")[2] for line in lines if line.startswith("Given value: ")), "")
    reason = _plain("; ".join(errors))
    return reason if ", got " in reason or not value else f"{reason}, got {value[:80]}"


def _plain(text: str) -> str:
    """Return a text with types as users write them."""
    text = re.sub(r"typing\.Literal\[([^\]]*)\]", r"one of \1", re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text))
    text = re.sub(r"Expected a (?=[aeiou])", "expected an ", text.replace("Expected a one of", "expected one of"))
    return text.replace("Expected a", "expected a").replace(". Got value:", ", got")


def _nearest(path: str) -> str:
    """Return the question whether the nearest class was meant: of its module, or of those that are loaded."""
    module, _, name = path.rpartition(".")
    loaded: dict[str, str] = {
        each.__name__: f"{each.__module__}.{each.__name__}" for base in _BASES for each in _subclasses(base)
    }
    try:
        names = [each for each in dir(import_module(module)) if not each.startswith("_")] if module else []
    except ImportError:
        names = []
    if near := get_close_matches(name, names, 1):
        return f"; did you mean {module}.{near[0]}?"
    near = get_close_matches(name, loaded, 1)
    return f"; did you mean {near[0] if not module else loaded[near[0]]}?" if near else ""


def _subclasses(base: type) -> Iterator[type]:
    each: type
    for each in type.__subclasses__(base):
        yield each
        yield from _subclasses(each)


def _given(key: str, words: Sequence[str]) -> Given:
    """Return a key as the user gave it, with the file that holds it; the parser of a class knows only its last part."""
    for given in _all_given(words):
        plain = given.key.replace("init_args.", "").removesuffix(".class_path")
        if plain == key or plain.endswith(f".{key}"):
            return given._replace(key=plain)
    return Given(key)


def _all_given(words: Sequence[str]) -> Iterator[Given]:
    """Yield the options of the command line, and those of the files that it names."""
    for word in words:
        if word.startswith("--"):
            yield Given(word[2:].partition("=")[0].removesuffix("+"))
    for path in config_files(words):
        yield from (Given(key, path.name) for key in _flat(content(path)))


def config_files(words: Sequence[str]) -> Iterator[Path]:
    """Yield the configuration files that a command line names, the last first."""
    for i, word in reversed([*enumerate(words)]):
        name, equals, value = word.partition("=")
        if name in ("-c", "--config") and (equals or i + 1 < len(words)):
            path = Path(value if equals else words[i + 1])
            if path.is_file():
                yield path


def content(path: Path) -> Any:
    """Return the content of a YAML file, or None for a file that is none: the parser says what is wrong with it."""
    try:
        return yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        return None


def _flat(values: Any, path: str = "") -> Iterator[str]:
    """Yield the keys of nested dictionaries and lists, such as model.config.dim."""
    if isinstance(values, dict):
        for key, value in values.items():
            name = f"{path}.{key}" if path else str(key)
            yield name
            yield from _flat(value, name)
    elif isinstance(values, list):
        for value in values:
            yield from _flat(value, path)
