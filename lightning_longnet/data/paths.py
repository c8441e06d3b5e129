"""Collection of files from paths that a user gives."""

from __future__ import annotations

import os
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def found_files(
    name: str, paths: Sequence[str | Path], pattern: str, without: Sequence[str] = (), *, is_sorted: bool = True
) -> list[Path]:
    """Return the files among `paths` and the files in their folders that match a pattern, each once.

    A file that is reached by several paths, through links or repeated arguments, is listed under the first of them.
    Listed twice, it could be both in the training and in the validation data.

    Args:
        name: the argument that holds the paths, for error messages.
        paths: files and folders; folders are searched with their subfolders.
        pattern: pattern of file names in folders, such as "*.txt".
        without: names of subfolders that are skipped; hidden ones always are.
        is_sorted: whether all files are sorted by path; else only those of each folder are, in the order of `paths`.
    """
    collected: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{name} must be files or folders that are there, {path} is not")
        if path.is_dir():
            inside = set(_in_folder(path, pattern, without))
            if not inside:
                raise ValueError(
                    f"{name} must hold files like {pattern!r}, found none in the folder {path.resolve()}"
                    f"{_most_frequent(path, without)}"
                )
            collected += sorted(inside)
        else:
            collected.append(path)
    by_target: dict[Path, Path] = {}
    folders: dict[Path, Path] = {}
    for path in sorted(collected) if is_sorted else collected:
        by_target.setdefault(_target(path, folders), path)
    files = list(by_target.values())
    if not any(path.stat().st_size for path in files):
        raise ValueError(f"{name} must hold some text, all {len(files)} files are empty")
    return files


def _target(path: Path, folders: dict[Path, Path]) -> Path:
    """Return the file that a path leads to; `folders` keeps what their folders lead to, as one holds many files."""
    if path.is_symlink():
        return path.resolve()
    if path.parent not in folders:
        folders[path.parent] = path.parent.resolve()
    return folders[path.parent] / path.name


def _in_folder(folder: Path, pattern: str, without: Sequence[str]) -> list[Path]:
    """Return the files in a folder and its subfolders that match."""
    matches = []
    for directory, folders, names in os.walk(folder):
        folders[:] = [each for each in folders if each not in without and not each.startswith(".")]
        matches += [Path(directory) / each for each in names if fnmatch(each, pattern) and not each.startswith(".")]
    return [path for path in matches if path.is_file()]


def _most_frequent(folder: Path, without: Sequence[str]) -> str:
    """Return the pattern that fits most files of a folder, as the end of an error message."""
    suffixes = Counter(path.suffix for path in _in_folder(folder, "*.*", without) if path.suffix)
    if not suffixes:
        return ""
    suffix, count = suffixes.most_common(1)[0]
    return f"; it has {count} {'file' if count == 1 else 'files'} *{suffix}: pattern='*{suffix}'"
