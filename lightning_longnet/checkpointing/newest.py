"""`newest_checkpoint`, and the check of a checkpoint by its manifest."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_longnet.checkpointing.commit import replaced, was_written, written
from lightning_longnet.checkpointing.index import check_entry, missing
from lightning_longnet.checkpointing.manifest import (
    MANIFEST,
    DamageError,
    Manifest,
    check_file_sizes,
    check_names,
    check_sums,
    form_of,
    read_manifest,
    reading,
)

if TYPE_CHECKING:
    from collections.abc import Collection


def newest_checkpoint(
    *folders: str | Path,
    forms: Collection[str] | None = None,
    skip: Collection[Path] = (),
    reads_all: bool = False,
    since: float = 0.0,
    resumable: bool = True,
) -> Path | None:
    """Return the newest checkpoint that a run can resume from, or None if the folders have none.

    A damaged checkpoint is skipped with a warning that names the file.  A checkpoint without a manifest, as earlier
    versions and other programs write it, is ordered by the time of its last change.

    Args:
        folders: folders with checkpoints, whose names end with ".ckpt" and do not begin with a dot.  If names of
            checkpoints contain a "/", pass the folders inside, too.
        forms: the formats of checkpoints that can be read: "file", "fsdp2" and "deepspeed"; all by default.
        skip: checkpoints that are ignored.
        reads_all: reads all bytes and compares their checksums; without it names, sizes and manifests are compared.
        since: leaves out checkpoints that were saved before this time, in seconds since the epoch.
        resumable: leaves out checkpoints of weights alone.
    """
    candidates: list[tuple[int, Path]] = []
    absent: dict[Path, int] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            continue
        gone = missing(folder).items()
        absent |= {path: saved for path, saved in gone if is_kept(path) and path.name not in replaced(folder)}
        for path in (*filter(is_kept, folder.glob("*.ckpt")), *replaced(folder).values()):
            if path in skip:
                continue
            try:
                with reading(path):
                    if not path.exists():
                        continue
                    manifest = _known_manifest(path)
                    form = form_of(path) if manifest is None else manifest.form
                    saved = path.stat().st_mtime_ns if manifest is None else manifest.saved
            except DamageError as damage:
                _warn(damage)
                continue
            if (manifest is None or manifest.is_resumable or not resumable) and (forms is None or form in forms):
                candidates.append((saved, path))
    candidates = [(saved, path) for saved, path in candidates if saved >= since * 1e9]
    newest = max(candidates, default=(int(since * 1e9), None))[0]
    for path in (each for each, saved in absent.items() if saved > newest and each not in skip):
        _warn(DamageError(f"{path} is missing"))
    for _, path in sorted(candidates, reverse=True):
        try:
            check_checkpoint(path, share=(0, 1) if reads_all else None)
        except DamageError as damage:
            _warn(damage)
            continue
        return path
    return None


def check_checkpoint(path: Path, share: tuple[int, int] | None = (0, 1)) -> Manifest | None:
    """Return the manifest of a checkpoint, or None if it has none; raise `DamageError` if it is damaged.

    A path without a checkpoint raises `DamageError`, too.

    Args:
        path: the checkpoint.
        share: (rank, ranks): the share of the files whose bytes are read; None reads none and compares sizes.
    """
    manifest = check_saved(path, share)
    with reading(path):
        if manifest is None and not form_of(path):
            raise DamageError(f"{path} holds no checkpoint")
    return manifest


def check_saved(path: Path, share: tuple[int, int] | None = (0, 1)) -> Manifest | None:
    """Do what `check_checkpoint` does, for a path that may be something else than a checkpoint: that returns None."""
    manifest = _known_manifest(path)
    if manifest is not None:
        check_names(manifest.files)
        check_file_sizes(path, manifest)
        if share is not None:
            check_sums(path, manifest, share)
    return manifest


def _known_manifest(path: Path) -> Manifest | None:
    """Return the manifest of a checkpoint, or None if it has none, after comparing it with the index of its folder."""
    manifest = read_manifest(path)
    if not path.name.endswith(".part"):  # one that was replaced is in no index
        check_entry(path, manifest)
    return manifest


def is_kept(path: Path) -> bool:
    """Return whether a checkpoint is meant to stay: Lightning's tuner saves others, whose names begin with a dot."""
    return not path.name.startswith(".")


def is_only_good(path: Path) -> bool:
    """Return whether a checkpoint is the only undamaged one of its folder, so that it must not be removed.

    The bytes of the checkpoint itself, and of those that this process wrote, are not read again.  The latter count in
    other folders of the run, too: the name "{epoch}-{val/loss}" puts each checkpoint in another folder.
    """
    if not is_kept(path):
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inside = (each for each in written() if _folder_of_run(each) == _folder_of_run(path))
        others = {*path.parent.glob("*.ckpt"), *inside} - {path}
        if any(_is_written(each) for each in filter(is_kept, others)):
            return False
        try:
            if check_checkpoint(path, share=None) is None:
                return False
        except DamageError:
            return False
        return newest_checkpoint(path.parent, skip={path}, reads_all=True) is None


def _folder_of_run(path: Path) -> Path:
    """Return the folder of a checkpoint, without those that values in its name make, as "epoch=0-val"."""
    folder = path.parent
    while "=" in folder.name:
        folder = folder.parent
    return folder


def _is_written(path: Path) -> bool:
    """Return whether this process wrote a checkpoint that a run can resume from and whose sizes are right."""
    try:
        manifest = check_checkpoint(path, share=None)
    except DamageError:
        return False
    return manifest is not None and manifest.is_resumable and was_written(path, manifest)


def unverified(path: Path) -> str:
    """Return the warning about a checkpoint without a manifest."""
    return f"{path} has no {MANIFEST}, as an earlier version or another program saved it: it cannot be verified"


def _warn(damage: DamageError) -> None:
    """Warn that a damaged checkpoint is skipped."""
    warnings.warn(f"{damage}; it is passed over", RuntimeWarning, stacklevel=3)
