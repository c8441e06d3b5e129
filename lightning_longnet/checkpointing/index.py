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

from lightning_longnet.checkpointing.manifest import DamageError

if TYPE_CHECKING:
    from pathlib import Path

    from lightning_longnet.checkpointing.manifest import Manifest

INDEX = ".checkpoints.json"
_FORMAT = 1


class Entry(NamedTuple):
    """When a checkpoint was saved, and the checksum of its manifest."""

    saved: int
    manifest: str


def read_index(folder: Path) -> dict[str, Entry]:
    """Return the entries of a folder's index by the names of checkpoints; a damaged index is ignored with a warning."""
    try:
        text = (folder / INDEX).read_text()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except UnicodeDecodeError:
        text = ""
    try:
        values = json.loads(text)
        entries = {name: Entry(**each) for name, each in values["checkpoints"].items()}
        if values["checksum"] == _checksum(entries):
            return entries
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    warnings.warn(
        f"{folder / INDEX} is damaged and ignored; the checkpoints' own manifests count", RuntimeWarning, stacklevel=2
    )
    return {}


def record(folder: Path, name: str, manifest: Manifest | None) -> None:
    """Let the index name a checkpoint as the newest of its folder, or forget one.

    Its content is on the disk before it has its name; the name itself need not be, as an older index is right, too.
    """
    entries = {each: entry for each, entry in read_index(folder).items() if os.path.lexists(folder / each)}
    entries.pop(name, None)
    if manifest is not None:
        entries[name] = Entry(manifest.saved, manifest.checksum)
    newest = max(entries, key=lambda each: entries[each].saved, default=None)
    values = {
        "format": _FORMAT,
        "newest": newest,
        "checkpoints": {each: entry._asdict() for each, entry in entries.items()},
        "checksum": _checksum(entries),
    }
    unfinished = folder / f"{INDEX}.{os.getpid()}.part"
    with unfinished.open("w") as file:
        json.dump(values, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(folder / INDEX)


def _checksum(entries: dict[str, Entry]) -> str:
    return f"{zlib.crc32(json.dumps(sorted(entries.items())).encode()):08x}"


def check_entry(path: Path, manifest: Manifest | None) -> None:
    """Raise `DamageError` where the index knows another checkpoint under this name, and this is no newer save."""
    entry = read_index(path.parent).get(path.name)
    if entry is None:
        return
    if manifest is None:
        raise DamageError(f"{path} has lost its manifest")
    is_newer = manifest.name == path.name and manifest.saved > entry.saved
    if manifest.checksum != entry.manifest and not is_newer:
        raise DamageError(
            f"{path} is not what was last saved under this name: it is {manifest.name} of step {manifest.step}"
        )


def next_time(folder: Path) -> int:
    """Return the time now, or more where the clock is behind that of an earlier save."""
    return max([time.time_ns(), *(entry.saved + 1 for entry in read_index(folder).values())])


def sync_folder(folder: Path) -> None:
    """Wait until the disk holds the names in a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
