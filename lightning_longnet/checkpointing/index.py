"""The index of a folder: the pointer to its newest checkpoint, and which checkpoint was saved under each name.

It is written after a checkpoint has its name.  Where the two differ, the checkpoint's own manifest shows whether the
checkpoint is newer than the index, as after a kill in between, or is another one in its place.
"""

from __future__ import annotations

import json
import os
import time
import warnings
import zlib
from typing import TYPE_CHECKING, NamedTuple
from uuid import uuid4

from lightning_longnet.checkpointing.manifest import DamageError

if TYPE_CHECKING:
    from pathlib import Path

    from lightning_longnet.checkpointing.manifest import Manifest

INDEX = ".checkpoints.json"
_FORMAT = 1


class Entry(NamedTuple):
    """The time at which a checkpoint was saved, and the checksum of its manifest."""

    saved: int
    manifest: str


class Index(NamedTuple):
    """The content of the index of a folder: its series, and the entries by the names of checkpoints."""

    series: str
    entries: dict[str, Entry]


def read_index(folder: Path) -> Index:
    """Return the index of a folder, which is empty where there is none; a damaged one is ignored with a warning."""
    try:
        text = (folder / INDEX).read_text()
    except (FileNotFoundError, NotADirectoryError):
        return Index("", {})
    except (OSError, UnicodeDecodeError):
        text = ""
    try:
        values = json.loads(text)
        entries = {name: Entry(**each) for name, each in values["checkpoints"].items()}
        index = Index(values["series"], entries)
        if values["checksum"] == _checksum(index):
            return index
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    warnings.warn(
        f"{folder / INDEX} is damaged and ignored; the checkpoints' own manifests count", RuntimeWarning, stacklevel=2
    )
    return Index("", {})


def record(folder: Path, name: str, manifest: Manifest | None) -> None:
    """Let the index name a checkpoint as the newest of its folder, or forget one.

    Its content is on the disk before it has its name; the name itself need not be, as an older index is right, too.
    """
    index = read_index(folder)
    entries = {each: entry for each, entry in index.entries.items() if os.path.lexists(folder / each)}
    entries.pop(name, None)
    if manifest is not None:
        index = Index(index.series or manifest.series, entries)
        entries[name] = Entry(manifest.saved, manifest.checksum)
    index = Index(index.series, entries)
    newest = max(entries, key=lambda each: entries[each].saved, default=None)
    values = {
        "format": _FORMAT,
        "series": index.series,
        "newest": newest,
        "checkpoints": {each: entry._asdict() for each, entry in entries.items()},
        "checksum": _checksum(index),
    }
    unfinished = folder / f"{INDEX}.{os.getpid()}.part"
    with unfinished.open("w") as file:
        json.dump(values, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(folder / INDEX)


def _checksum(index: Index) -> str:
    return f"{zlib.crc32(json.dumps([index.series, sorted(index.entries.items())]).encode()):08x}"


def check_entry(path: Path, manifest: Manifest | None) -> None:
    """Raise `DamageError` where the index knows another checkpoint under this name, and this is no newer save."""
    index = read_index(path.parent)
    entry = index.entries.get(path.name)
    if entry is None:
        return
    if manifest is None:
        raise DamageError(f"{path} has lost its manifest")
    is_newer = manifest.saved > entry.saved and (manifest.name, manifest.series) == (path.name, index.series)
    if manifest.checksum != entry.manifest and not is_newer:
        raise DamageError(
            f"{path} is not what was last saved under this name: it is {manifest.name} of step {manifest.step}"
        )


def next_place(folder: Path) -> tuple[int, str]:
    """Return the time of a save, which is later than that of every earlier one in the folder, and its series."""
    index = read_index(folder)
    return max([time.time_ns(), *(entry.saved + 1 for entry in index.entries.values())]), index.series or uuid4().hex


def missing(folder: Path) -> dict[Path, int]:
    """Return the checkpoints that the index names and that are not there, and when they were saved."""
    entries = read_index(folder).entries
    return {folder / name: entry.saved for name, entry in entries.items() if not os.path.lexists(folder / name)}


def sync(path: Path) -> None:
    """Wait until the disk holds the bytes of a file that is closed, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
