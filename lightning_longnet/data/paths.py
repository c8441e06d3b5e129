"""Files by what a user says of them."""

from __future__ import annotations

import os
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def found_files(name: str, paths: Sequence[str | Path], pattern: str, without: Sequence[str] = ()) -> list[Path]:
    """The files among `paths`, and those of a pattern in its folders, however deep; sorted by path, each once.

    A file that has several names, by a link or because it was named twice, has the first of them: read twice, what is
    kept for validation would have been trained on.

    Args:
        name: of the argument that gave the paths, for messages.
        paths: files and folders.
        pattern: as "*.txt", of what is taken in folders.
        without: folders of these names are passed by; hidden ones always are.
    """
    found: set[Path] = set()
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{name} must be files or folders that are there, {path} is not")
        if path.is_dir():
            inside = set(_in_folder(path, pattern, without))
            if not inside:
                raise ValueError(f"{name} must hold files like {pattern!r}, found none in the folder {path}")
            found |= inside
        else:
            found.add(path)
    named: dict[Path, Path] = {}
    for path in sorted(found):
        named.setdefault(path.resolve(), path)
    files = list(named.values())
    if not any(path.stat().st_size for path in files):
        raise ValueError(f"{name} must hold some text, all {len(files)} files are empty")
    return files


def _in_folder(folder: Path, pattern: str, without: Sequence[str]) -> list[Path]:
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [each for each in folders if each not in without and not each.startswith(".")]
        found += [Path(place) / each for each in names if fnmatch(each, pattern) and not each.startswith(".")]
    return [path for path in found if path.is_file()]
