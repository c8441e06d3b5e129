"""The options that a user gave, on the command line and in the configuration files that it names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_SECTIONS = ("trainer",)  # options whose value is always a dictionary


class Given(NamedTuple):
    """An option as the user gave it: its key and value, and the file that holds it, or "" for the command line."""

    key: str
    value: Any = None
    file: str = ""

    def __str__(self) -> str:
        return f"{self.key} in {self.file}" if self.file else f"--{self.key}"


def given_option(key: str, words: Sequence[str], value: str = "", is_whole: bool = False) -> Given:
    """Return an option as it was given.

    Args:
        key: its key, or with `is_whole` False the last part of it, which is what the parser of a class knows.
        words: the command line without the program's name.
        value: its value, which decides where several options end with the key.
        is_whole: whether nothing comes before the key.
    """
    matches = []
    for given in _all_given(words):
        plain = given.key.replace("init_args.", "").removesuffix(".class_path")
        if plain == key or (plain.endswith(f".{key}") and not is_whole):
            matches.append(given._replace(key=plain))
    alike = [given for given in matches if value and str(given.value) == value]
    return next(iter([*alike, *matches]), Given(key))


def config_files(words: Sequence[str]) -> Iterator[Path]:
    """Yield the configuration files that a command line names, the last first."""
    for i, word in reversed([*enumerate(words)]):
        name, equals, value = word.partition("=")
        if name in ("-c", "--config") and (equals or i + 1 < len(words)):
            path = Path(value if equals else words[i + 1])
            if path.is_file():
                yield path


def content(path: Path) -> dict[str, Any]:
    """Return the content of a configuration file; raise a ValueError with its path where it is none."""
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        got = "nothing" if values is None else f"a {type(values).__name__}"
        raise ValueError(f"{path} must hold options such as trainer, model and data, got {got}")
    for name in _SECTIONS:
        if values.get(name) is not None and not isinstance(values[name], dict):
            raise ValueError(f"{name} in {path} must hold options, got {values[name]!r}")
    return values


def _all_given(words: Sequence[str]) -> Iterator[Given]:
    """Yield the options of the command line, and those of the files that it names."""
    for i, word in enumerate(words):
        if word.startswith("--"):
            name, equals, value = word[2:].removesuffix("+").partition("=")
            value = value if equals else words[i + 1] if i + 1 < len(words) else ""
            yield Given(name.removesuffix("+"), value)
            if value.startswith(("{", "[")):
                yield from _flat(yaml.safe_load(value), name.removesuffix("+"))
    for path in config_files(words):
        yield from (given._replace(file=path.name) for given in _flat(content(path)))


def _flat(values: Any, path: str = "") -> Iterator[Given]:
    """Yield the options in nested dictionaries and lists by keys such as model.config.dim."""
    if isinstance(values, dict):
        for key, value in values.items():
            name = f"{path}.{key}" if path else str(key)
            yield Given(name, value)
            yield from _flat(value, name)
    elif isinstance(values, list):
        for value in values:
            yield from _flat(value, path)
