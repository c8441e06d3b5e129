"""The index of a folder, `.checkpoints.json`: its newest checkpoint, and which one was saved under each name.

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
    """What the index says of a checkpoint.

    Attributes:
        saved: when it was saved, in nanoseconds since 1970.
        manifest: the checksum of its manifest.
    """

    saved: int
    manifest: str


class Index(NamedTuple):
    """The content of the index of a folder.

    Attributes:
        series: a random text that the manifests of all checkpoints saved in this folder have; see `Manifest`.
        entries: the entries by the names of the checkpoints.
    """

    series: str
    entries: dict[str, Entry]


def read_index(folder: Path) -> Index:
    """Return the index of a folder, an empty one if there is none; a damaged one is ignored with a warning."""
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
    """Add a checkpoint to the index of its folder, or remove one; `commit` and `remove` call it.

    The content of the index is on the disk before the file has its name.  The name need not be, as an older index is
    right, too.

    Args:
        folder: the folder.
        name: the name of the checkpoint.
        manifest: its manifest; None removes the checkpoint from the index.
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
    """Return the CRC-32 of the content of an index, in eight hexadecimal digits."""
    return f"{zlib.crc32(json.dumps([index.series, sorted(index.entries.items())]).encode()):08x}"


def check_entry(path: Path, manifest: Manifest | None) -> None:
    """Raise `DamageError` if the index has another checkpoint under the name of this one, and this is no newer save.

    Args:
        path: the checkpoint.
        manifest: its manifest; None if it has none.
    """
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
    """Return (time, series) for the manifest of a new checkpoint in a folder.

    The time is that of now in nanoseconds since 1970, or a later one, so that it is later than all in the index.
    """
    index = read_index(folder)
    return max([time.time_ns(), *(entry.saved + 1 for entry in index.entries.values())]), index.series or uuid4().hex


def missing(folder: Path) -> dict[Path, int]:
    """Return the times at which the checkpoints were saved that the index has and that are not there, by path."""
    entries = read_index(folder).entries
    return {folder / name: entry.saved for name, entry in entries.items() if not os.path.lexists(folder / name)}


def sync(path: Path) -> None:
    """Wait until the disk holds the content of a closed file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
