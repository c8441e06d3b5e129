"""Manifests: what a checkpoint holds, with the size and the checksum of each file.

A folder keeps its manifest in manifest.json, which is written last.  A checkpoint in one file keeps it at its end, as
the comment of the zip archive that `torch.save` writes, so that one rename replaces both.

The checksum is CRC-32.  It finds every damage of up to 32 neighbouring bits, and misses others once in four billion
times; zlib computes 1.3 GB/s on a core that computes 0.46 GB/s of SHA-256, and more than a disk writes.  It is no
protection against someone who forges a checkpoint: reading without running code is.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

MANIFEST = "manifest.json"
WHOLE = "."  # the name of the only file of a checkpoint in one file
ZIP_END = b"PK\x05\x06"  # where the record at the end of a zip archive begins
ZIP_END_BYTES = 22
DERIVED = ("checkpoint_universal", "latest_universal")  # what conversions write into a checkpoint of DeepSpeed

_FORMAT = 1
_MARK = b"lightning-longnet manifest\n"
_LONGEST_COMMENT = 2**16 - 1
_PIECE = 2**22  # bytes that are read at once
_DATA = (".pt", ".distcp")  # files that engines look for by their names


class DamageError(ValueError):
    """The error for a checkpoint that is not what was saved; the message is one line that names the file."""


class FileSum(NamedTuple):
    """The number of bytes of a file, and their CRC-32 as eight hexadecimal digits."""

    bytes: int
    crc32: str


@dataclass(frozen=True)
class Manifest:
    """The description of what a checkpoint holds.

    Attributes:
        name: the name that the checkpoint was saved under.
        saved: when it was saved, in nanoseconds since 1970, and later than every earlier checkpoint of its folder.
        series: a random text, the same for all checkpoints that were saved in one folder.
        step: the steps of the optimizer before it.
        epoch: the epochs before it.
        is_resumable: whether it holds optimizers and callbacks beside the weights.
        form: its format, "file", "fsdp2" or "deepspeed"; see `form_of`.
        engine: the sharding that wrote it, or "".
        world: the number of ranks that wrote it.
        mesh: the sizes of their mesh by axis.
        versions: the versions of the packages that wrote it, by name.
        files: the checksums of its files by their paths in the folder; by `WHOLE` for a checkpoint in one file.
    """

    name: str
    saved: int
    series: str
    step: int
    epoch: int
    is_resumable: bool
    form: str
    engine: str
    world: int
    mesh: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, FileSum] = field(default_factory=dict)

    @cached_property
    def checksum(self) -> str:
        """The CRC-32 of the manifest itself, in eight hexadecimal digits."""
        return f"{zlib.crc32(json.dumps(self._values(), sort_keys=True).encode()):08x}"

    def _values(self) -> dict[str, Any]:
        """Return the manifest as plain values, without its checksum."""
        values = asdict(self)
        return values | {"format": _FORMAT, "files": {name: each._asdict() for name, each in self.files.items()}}

    def text(self) -> str:
        """Return the manifest as JSON, for `manifest.json`."""
        return json.dumps(self._values() | {"checksum": self.checksum}, indent=1)

    def comment(self) -> bytes:
        """Return the manifest as the comment of a zip archive, for a checkpoint in one file."""
        comment = _MARK + json.dumps(self._values() | {"checksum": self.checksum}).encode()
        assert len(comment) <= _LONGEST_COMMENT
        return comment


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an OSError inside the block into a `DamageError`, for which callers take another checkpoint."""
    try:
        yield
    except OSError as error:
        raise DamageError(f"{error.filename or path} cannot be read: {error.strerror}") from None


def parse(text: str | bytes, where: str) -> Manifest:
    """Return the manifest that a text holds; raise `DamageError` if it is not as it was written.

    Args:
        text: the JSON of `Manifest.text` or of `Manifest.comment`.
        where: the name of the file, for the message.
    """
    try:
        values = json.loads(text)
        checksum, form = values.pop("checksum"), values.pop("format")
        files = {name: FileSum(**each) for name, each in values.pop("files").items()}
        manifest = Manifest(**values, files=files)
    except (ValueError, TypeError, KeyError, AttributeError):  # from a byte that changed anywhere in it
        raise DamageError(f"{where} is damaged: it holds no manifest") from None
    if form != _FORMAT:
        raise DamageError(f"{where} has format {form}, which only a newer version of lightning-longnet reads")
    if manifest.checksum != checksum:
        raise DamageError(f"{where} is damaged: its checksum is not that of its content")
    return manifest


def form_of(path: Path) -> str:
    """Return the format of a checkpoint, or "" if the path holds none.

    It is "file" for any file, "fsdp2" for a folder of torch.distributed.checkpoint, and "deepspeed" for one of
    DeepSpeed.
    """
    if path.is_file():
        return "file"
    if (path / ".metadata").is_file():
        return "fsdp2"
    return "deepspeed" if (path / "latest").is_file() or any(path.glob("checkpoint/*_states.pt")) else ""


def read_manifest(path: Path) -> Manifest | None:
    """Return the manifest of a checkpoint, or None if it has none; raise `DamageError` if it cannot be read."""
    with reading(path):
        return _read_manifest(path)


def _read_manifest(path: Path) -> Manifest | None:
    """Do what `read_manifest` does, but raise an OSError as it is."""
    if not path.exists():
        raise DamageError(f"{path} does not exist")
    if path.is_dir():
        inside = path / MANIFEST
        return parse(inside.read_bytes(), str(inside)) if inside.is_file() else None
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if not size:
            raise DamageError(f"{path} is empty")
        file.seek(max(0, size - _LONGEST_COMMENT - ZIP_END_BYTES))
        tail = file.read()
        file.seek(0)
        is_zip = file.read(4) == b"PK\x03\x04"
    comment = _comment_of(tail)
    if comment is None and not is_zip and _MARK not in tail:
        return None  # of another program, or of a version of torch that wrote pickles
    if comment is None or (comment and not comment.startswith(_MARK)):
        raise DamageError(f"{path} is damaged or cut off: its end is not that of a checkpoint")
    return parse(comment.removeprefix(_MARK), str(path)) if comment else None


def _comment_of(tail: bytes) -> bytes | None:
    """Return the comment of the zip archive that ends with these bytes, or None if they are no end of an archive."""
    start = tail.rfind(ZIP_END)
    if start < 0 or len(tail) < start + ZIP_END_BYTES:
        return None
    comment = tail[start + ZIP_END_BYTES :]
    return comment if struct.unpack("<H", tail[start + 20 : start + 22])[0] == len(comment) else None


def check_file_sizes(path: Path, manifest: Manifest) -> None:
    """Raise `DamageError` if a file of a checkpoint is missing or has another size, or one is not in the manifest."""
    with reading(path):
        _check_file_sizes(path, manifest)


def _check_file_sizes(path: Path, manifest: Manifest) -> None:
    """Do what `check_file_sizes` does, but raise an OSError as it is."""
    for name, expected in manifest.files.items():
        file = path / name
        if not file.is_file():
            raise DamageError(f"{file} is missing")
        size = file.stat().st_size - (len(manifest.comment()) if name == WHOLE else 0)
        if size != expected.bytes:
            raise DamageError(f"{file} has {size} bytes in the place of {expected.bytes}")
    if path.is_dir():
        for name in files_of(path):
            if name not in manifest.files and name.endswith(_DATA) and not name.startswith(DERIVED):
                raise DamageError(f"{path / name} is not of this checkpoint")


def check_sums(path: Path, manifest: Manifest, share: tuple[int, int] = (0, 1)) -> None:
    """Raise `DamageError` if the checksum of a file is not that of the manifest.

    Args:
        path: the checkpoint.
        manifest: its manifest.
        share: (rank, ranks): each rank reads its share of the files; by default all of them.
    """
    by_size = sorted(manifest.files, key=lambda name: (-manifest.files[name].bytes, name))
    for name in by_size[share[0] :: share[1]]:
        with reading(path / name):
            actual = sum_of(path / name, manifest.files[name].bytes, is_whole=name == WHOLE)
        if actual != manifest.files[name]:
            raise DamageError(
                f"{path / name} is damaged: its checksum is {actual.crc32}, not {manifest.files[name].crc32}"
            )


def sum_of(path: Path, size: int | None = None, *, is_whole: bool = False) -> FileSum:
    """Return the size and the checksum of a file.

    Args:
        path: the file.
        size: how many bytes to read from its beginning; all by default.
        is_whole: the bytes are a zip archive to which a comment was added: its length, in the last two bytes, is read
            as 0, as it was before.
    """
    left = path.stat().st_size if size is None else size
    length, crc = left, 0
    with path.open("rb", buffering=0) as file:
        while left and (piece := file.read(min(left, _PIECE))):
            left -= len(piece)
            if is_whole and not left:
                piece = piece[:-2] + b"\0\0"  # which torch wrote before the comment was added
            crc = zlib.crc32(piece, crc)
    return FileSum(length - left, f"{crc:08x}")


def files_of(folder: Path) -> Iterator[str]:
    """Yield the paths of the files in a folder, relative to it, but not that of the manifest."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST:
            yield name


def check_names(names: Iterable[str]) -> None:
    """Raise `DamageError` if a name of a file in a manifest leads outside of the checkpoint's folder."""
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DamageError(f"{MANIFEST} names {name!r}, which is outside of the checkpoint")
