"""`ManifestCheckpointIO`: a plugin of Lightning that saves checkpoints in one file, complete or not at all."""

from __future__ import annotations

import warnings
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol

from lightning_longnet.checkpointing.background import BackgroundWriter, in_memory
from lightning_longnet.checkpointing.commit import commit, discard, remove, unfinished_path
from lightning_longnet.checkpointing.index import next_place
from lightning_longnet.checkpointing.manifest import WHOLE, DamageError, FileSum, Manifest
from lightning_longnet.checkpointing.newest import check_checkpoint, is_only_good, newest_checkpoint, unverified
from lightning_longnet.checkpointing.streams import save_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lightning.fabric.utilities.types import _PATH

    from lightning_longnet.checkpointing.streams import SummedFile

_FACTS = ("global_step", "epoch", "callbacks")
_PACKAGES = ("lightning-longnet", "lightning", "torch", "deepspeed")


class ManifestCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints that are complete or absent, and verifies them when it reads them.

    `Trainer(plugins=ManifestCheckpointIO())` uses it with any strategy of Lightning that saves checkpoints in one file;
    `RingSequenceParallelStrategy` uses it by itself.  A file is written under a temporary name with a manifest at its
    end, and renamed when the disk holds it; `torch.load` reads it like any other file.  Loading compares the checksum.
    If a checkpoint is damaged, one line names it, and the newest valid one in its folder is loaded instead.  The last
    valid checkpoint of a folder is never removed.  Lightning itself saves to other protocols, such as s3://.

    Args:
        background: a save returns when the checkpoint is copied to the memory of the host.  A thread writes it and
            renames it when the disk holds it.  A save waits for the previous one, and raises its error; so does
            `teardown`.

    Attributes:
        engine: what the manifests name as the engine.
        mesh: what they name as the mesh of ranks.
    """

    saves_whole = True  # `Preemption` saves under the final name

    def __init__(self, background: bool = False) -> None:
        self.background, self.writer = background, BackgroundWriter()
        self.engine = ""
        self.mesh: dict[str, int] = {}
        self._checked: Path | None = None
        self._removals: list[_PATH] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any = None) -> None:
        """Save a checkpoint, or begin to in the background; the strategy calls it on rank 0."""
        if storage_options is not None or not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)  # which takes no options
            return
        final = Path(path).absolute()
        if self.background:
            self.wait()
            copy, facts = in_memory(checkpoint), facts_of(checkpoint)
            self.writer.begin(lambda: self._save(copy.write_to, facts, final))
        else:
            self._save(lambda file: torch.save(checkpoint, file), checkpoint, final)  # type: ignore[arg-type]

    def _save(self, write: Callable[[SummedFile], None], checkpoint: Mapping[str, Any], final: Path) -> None:
        """Write a checkpoint with its manifest under a temporary name, and rename it to `final`.

        Args:
            write: writes the content to a file.
            checkpoint: the content, or `facts_of` it, for the manifest.
            final: the absolute path.
        """
        unfinished = unfinished_path(final)
        try:
            manifest = save_whole(
                write,
                unfinished,
                lambda sums: self.describe(final, checkpoint, sums),
                in_threads=not self.background,
            )
            commit(unfinished, final, manifest)
        finally:
            discard(unfinished)  # which is there after an error

    def teardown(self) -> None:
        """Wait for a save in the background; the strategy calls it at the end of a run."""
        self.wait()
        super().teardown()

    def wait(self) -> None:
        """Wait for a save in the background, and remove the checkpoints that were to be removed after it.

        If the save failed, its error is raised, and nothing is removed.
        """
        removals, self._removals = self._removals, []
        self.writer.take()
        for path in removals:
            self._remove(path)

    def forget_removals(self) -> None:
        """Keep the checkpoints that were to be removed after a save in the background, which has failed.

        The strategy calls it on all ranks, as the error may have been on another rank.
        """
        self._removals.clear()

    def describe(self, final: Path, checkpoint: Mapping[str, Any], sums: FileSum | dict[str, FileSum]) -> Manifest:
        """Return the manifest of a checkpoint that is being saved, for a file or a folder.

        Args:
            final: the path that the checkpoint will have.
            checkpoint: its content, as the Trainer gives it, or `facts_of` it.
            sums: the checksum of the file, or those of the files of a folder by their paths in it.
        """
        saved, series = next_place(final.parent)
        is_file = isinstance(sums, FileSum)
        return Manifest(
            name=final.name,
            saved=saved,
            series=series,
            step=int(checkpoint.get("global_step", 0)),
            epoch=int(checkpoint.get("epoch", 0)),
            is_resumable="callbacks" in checkpoint,  # without save_weights_only
            form="file" if is_file else "deepspeed" if self.engine.startswith("deepspeed") else "fsdp2",
            engine=self.engine,
            world=dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1,
            mesh=self.mesh,
            versions=_versions(),
            files={WHOLE: sums} if isinstance(sums, FileSum) else dict(sorted(sums.items())),
        )

    def load_checkpoint(self, path: _PATH, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Return the content of a checkpoint, or of the newest good one in its folder if it is damaged.

        Lightning's strategies call it on each rank.
        """
        self.wait()
        if _is_local_file_protocol(path) and Path(path) != self._checked:
            path = good_checkpoint(Path(path))
        self._checked = None
        content: dict[str, Any] = super().load_checkpoint(path, *arguments, **options)
        return content

    def accept(self, path: Path) -> None:
        """Have the next load of `path` skip the check, as the strategy of this package has made it on all ranks."""
        self._checked = path

    def remove_checkpoint(self, path: _PATH) -> None:
        """Remove a checkpoint, as `ModelCheckpoint` asks after a newer save, or after that save in the background."""
        if not self.writer.is_idle:
            self._removals.append(path)  # the save that replaces it may still fail
        else:
            self._remove(path)

    def _remove(self, path: _PATH) -> None:
        """Remove a checkpoint, unless it is the only undamaged one of its folder."""
        if not _is_local_file_protocol(path):
            super().remove_checkpoint(path)
        elif is_only_good(Path(path).absolute()):
            warnings.warn(f"{path} is kept: no other checkpoint in its folder is good", RuntimeWarning, stacklevel=2)
        else:
            remove(Path(path).absolute())


def good_checkpoint(path: Path) -> Path:
    """Return `path` if that checkpoint is not damaged, else the newest undamaged one in its folder, with a warning.

    A ValueError is raised if there is none.  A checkpoint without a manifest is returned with a warning.
    """
    try:
        if check_checkpoint(path) is None:
            warnings.warn(unverified(path), RuntimeWarning, stacklevel=2)
        return path
    except DamageError as damage:
        other = newest_checkpoint(path.parent, forms={"file"}, skip={path}, reads_all=True)
        if other is None:
            raise ValueError(f"{damage}; its folder has no good checkpoint") from None
        warnings.warn(f"{damage}; loading {other}, the newest good checkpoint", RuntimeWarning, stacklevel=2)
        return other


def facts_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a checkpoint from which `ManifestCheckpointIO.describe` makes a manifest.

    They are small, so that the weights need not be kept for it: the step, the epoch, and whether there are "callbacks".
    """
    return {name: None if name == "callbacks" else checkpoint[name] for name in _FACTS if name in checkpoint}


@cache
def _versions() -> dict[str, str]:
    """Return the versions of the installed packages that write checkpoints, by name."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
