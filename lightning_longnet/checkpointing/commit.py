"""Renaming a checkpoint to its final name when all of it is on the disk, and removing one at once.

A checkpoint is written under a temporary name, `.unfinished-HOST-PID-NUMBER-NAME.part`, in the folder where it will
stand.  A folder that it replaces is renamed to `.replaced-...` first and removed last.  A process that was killed
leaves such names behind, which the next save in the folder removes; `newest_checkpoint` reads a `.replaced-` one where
the name itself is not there.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from itertools import count
from typing import TYPE_CHECKING

from lightning_longnet.checkpointing.index import record, sync
from lightning_longnet.checkpointing.manifest import MANIFEST

if TYPE_CHECKING:
    from pathlib import Path

    from lightning_longnet.checkpointing.manifest import Manifest

_UNFINISHED, _REPLACED, _REMOVED = ".unfinished", ".replaced", ".removed"
_SUFFIX = ".part"
_DAY = 86400.0
_numbers = count()
_written: dict[Path, str] = {}  # the checkpoints of this process, and the checksums of their manifests


def unfinished_path(final: Path) -> Path:
    """Return a free temporary path beside `final`, to which a save writes first.

    The folder is made if it is not there, and cleaned of what killed processes left.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    _sweep(final.parent)
    return _beside(final, _UNFINISHED)


def _beside(final: Path, kind: str) -> Path:
    """Return a free temporary path beside `final`; `kind` is one of the three prefixes."""
    # Lightning reads a number from any name with "ckpt_" in it, and would resume from a file that does not exist
    name = final.name.replace("%", "%25").replace("_", "%5F")
    host = socket.gethostname().replace("-", "")
    return final.with_name(f"{kind}-{host}-{os.getpid()}-{next(_numbers)}-{name}{_SUFFIX}")


def replaced(folder: Path) -> dict[str, Path]:
    """Return the checkpoints of a folder that a save was replacing when it was killed, by the names that they had.

    It was killed after it had renamed the former checkpoint, and before the new one had the name.
    """
    placed = {}
    for path in folder.glob(f"{_REPLACED}-*{_SUFFIX}"):
        name = path.name.removesuffix(_SUFFIX).split("-", 4)[4].replace("%5F", "_").replace("%25", "%")
        if not os.path.lexists(folder / name):
            placed[name] = path
    return placed


def seal(folder: Path, manifest: Manifest) -> None:
    """Write the manifest into the folder of a checkpoint, and wait until the disk holds it and all names in the folder.

    A save calls it when all other files are written, so that a folder with a manifest is complete.
    """
    with (folder / MANIFEST).open("w") as file:
        file.write(manifest.text())
        file.flush()
        os.fsync(file.fileno())
    for path in (folder, *(each for each in folder.rglob("*") if each.is_dir())):
        sync(path)


def commit(unfinished: Path, final: Path, manifest: Manifest) -> None:
    """Rename a checkpoint, all of which is on the disk, to its final name, and record it in the index of its folder.

    Args:
        unfinished: the file or folder under its temporary name.
        final: the final path; a checkpoint that has it is replaced.
        manifest: the manifest of the new checkpoint.
    """
    former = None
    if os.path.lexists(final) and (unfinished.is_dir() or final.is_dir()):  # which one rename cannot replace
        former = _beside(final, _REPLACED)
        final.rename(former)
    unfinished.replace(final)
    sync(final.parent)
    record(final.parent, final.name, manifest)
    _written[final] = manifest.checksum
    if former is not None:
        discard(former)


def remove(path: Path) -> None:
    """Remove a checkpoint, if it is there: it is renamed first, so that no part of it is ever left under its name."""
    if not os.path.lexists(path):
        return
    _written.pop(path, None)
    doomed = _beside(path, _REMOVED)
    path.rename(doomed)
    record(path.parent, path.name, None)
    discard(doomed)


def written() -> list[Path]:
    """Return the paths of the checkpoints that this process has written and not removed."""
    return list(_written)


def was_written(path: Path, manifest: Manifest) -> bool:
    """Return whether this process wrote the checkpoint with this manifest, so that its bytes need not be read again."""
    return _written.get(path) == manifest.checksum


def discard(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    """Remove temporary files that ended processes of this machine left in a folder, and any that are a day old.

    A checkpoint that was being replaced gets its name again.
    """
    for name, path in replaced(folder).items():
        if _is_left(path):
            path.rename(folder / name)  # it was killed between the two renames
    for kind in (_UNFINISHED, _REPLACED, _REMOVED):
        for path in folder.glob(f"{kind}-*{_SUFFIX}"):
            if _is_left(path):
                discard(path)


def _is_left(path: Path) -> bool:
    """Return whether nobody writes to a temporary path any more, by the process in its name or its age."""
    _, host, process, *_ = path.name.split("-")
    if host == socket.gethostname().replace("-", "") and process.isdecimal():
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
    try:
        return time.time() - path.lstat().st_mtime > _DAY
    except FileNotFoundError:  # which another process removed
        return False
