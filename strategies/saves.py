"""The part of the strategy that saves checkpoints, complete or not at all, and loads those that are not damaged."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.fabric.utilities.distributed import _distributed_is_initialized
from lightning.fabric.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn

from lightning_longnet.checkpointing.checkpoint_io import ManifestCheckpointIO, facts_of
from lightning_longnet.checkpointing.commit import commit, discard, seal, unfinished_path
from lightning_longnet.checkpointing.index import sync
from lightning_longnet.checkpointing.manifest import DamageError, FileSum, files_of, sum_of
from lightning_longnet.checkpointing.newest import check_checkpoint, newest_checkpoint, unverified
from lightning_longnet.sequence.agreement import fault_of_rank_zero
from lightning_longnet.strategies.checks import check_background_saves
from lightning_longnet.strategies.forms import fault_of_form
from lightning_longnet.supervision.record import SAVE

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning.fabric.plugins import CheckpointIO

    from lightning_longnet.checkpointing.background import MemoryFile
    from lightning_longnet.sequence.context import SequenceContext
    from lightning_longnet.strategies.phases import Progress

_FAULTS = (OSError, RuntimeError, ValueError, TypeError, AttributeError, pickle.PicklingError)


def writing_faults() -> tuple[type[BaseException], ...]:
    """Return what writing raises: a full disk, a folder that cannot be written, content that cannot be pickled.

    The exception of torch.distributed.checkpoint is among them once that is imported: importing it takes a while, and
    no other code raises it.  `except` clauses of saves call it when something was raised.
    """
    api = sys.modules.get("torch.distributed.checkpoint.api")
    return _FAULTS if api is None else (*_FAULTS, api.CheckpointException)


class Pending(NamedTuple):
    """A save that goes on in the background.

    Attributes:
        final: the path of the checkpoint.
        unfinished: the folder in which it is written until then; None for a checkpoint in one file.
        content: what the manifest of a folder is to say of the checkpoint; see `facts_of`.
    """

    final: Path
    unfinished: Path | None = None
    content: dict[str, Any] = {}  # noqa: RUF012  nobody writes to it


class CheckpointSaves(ParallelStrategy):
    """Saves checkpoints that are complete or absent, and loads only those that are as they were saved.

    A sharding that saves one file does so through the `checkpoint_io`, on rank 0.  The others save a folder, into which
    each rank writes its files.  Rank 0 adds the manifest, with the checksums of all files, and renames the folder.  An
    error of one rank is raised on all.
    """

    saves_whole = True  # `Preemption` saves under the final name
    forms: tuple[str, ...] = ("file",)  # the formats of checkpoints that it loads: "file", "fsdp2", "deepspeed"
    sharding: str
    sequence_context: SequenceContext
    background_saves = False
    _is_training = False
    _pending: Pending | None = None
    progress: Progress

    def _interrupt(self, phase: str) -> None:
        """Begin a phase in which ranks may wait long for each other; `MarkedPhases` does it."""
        raise NotImplementedError

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """The plugin by which Lightning and this class save and load files: the user's, or a `ManifestCheckpointIO`."""
        if self._checkpoint_io is None:
            self._checkpoint_io = ManifestCheckpointIO(self.background_saves)
        elif isinstance(self._checkpoint_io, _WrappingCheckpointIO):
            self._checkpoint_io.checkpoint_io = ManifestCheckpointIO()  # it is used where the plugin wraps none
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        """Take the plugin of the user, which the Trainer sets; a ValueError is raised with `background_saves`."""
        check_background_saves(self.background_saves, io)
        self._checkpoint_io = io

    # Saving

    def _saves_folders(self) -> bool:
        """Return whether each rank writes its files into a folder, and not rank 0 everything into one file.

        `save_checkpoint` asks.  It is False for DDP; the subclasses for FSDP2 and DeepSpeed override it.
        """
        return False

    def _write_folder(self, checkpoint: dict[str, Any], folder: Path) -> dict[str, FileSum]:
        """Write this rank's files into a folder; return the checksum of each by its path in the folder.

        All ranks call it together.  The subclasses for FSDP2 and DeepSpeed define it.
        """
        raise NotImplementedError

    def _copy_folder(self, checkpoint: dict[str, Any], folder: Path) -> dict[str, MemoryFile]:
        """Make a folder; return the files, in memory, that this rank is to write into it, by their paths there.

        All ranks call it together, for a save in the background.  The subclasses for FSDP2 and DeepSpeed define it.
        """
        raise NotImplementedError

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Save a checkpoint as a file or a folder; the Trainer calls it on all ranks together.

        With FSDP2 it does so through the method of the subclass.  With `background_saves` it returns, in training, when
        the content is in memory; `settle_saves` finishes the save later.
        """
        path = self.broadcast(filepath)
        self.settle_saves()
        if not self._saves_folders():
            self._describe(self.checkpoint_io)
            # not super(): Lightning's method for FSDP2 removes a folder of this name before the file is written
            self._together(path, lambda: Strategy.save_checkpoint(self, checkpoint, path, storage_options))
            if self.background_saves:
                self._pending = Pending(path)
        elif storage_options is not None or not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            self._save_folder(checkpoint, Path(path).absolute())
        if not self._is_training:
            self.settle_saves()

    def _save_folder(self, checkpoint: dict[str, Any], final: Path) -> None:
        """Save a checkpoint as the folder `final`, or begin to, with `background_saves`.

        Each rank writes its files into a folder under another name, which then gets its manifest and its name.
        """
        content = facts_of(checkpoint)
        (unfinished, *_) = self._together(final, lambda: unfinished_path(final) if self.is_global_zero else None)
        if self.background_saves:
            self._together(final, lambda: self._begin_folder(checkpoint, unfinished))
            self._pending = Pending(final, unfinished, content)
            return
        try:
            parts = self._together(final, lambda: self._write_folder(checkpoint, unfinished))
            self._together(final, lambda: self._finish_folder(unfinished, final, content, parts))
        finally:
            if self.is_global_zero:
                discard(unfinished)  # the folder is there after an error

    def _begin_folder(self, checkpoint: dict[str, Any], unfinished: Path) -> None:
        """Copy this rank's files to memory, on all ranks together, and start to write them in a thread."""
        files = self._copy_folder(checkpoint, unfinished)
        io: Any = self.checkpoint_io
        io.writer.begin(lambda: {name: file.store(unfinished / name) for name, file in files.items()})

    def settle_saves(self, is_awaited: bool = True) -> None:
        """Finish the save in the background, if there is one; all ranks call this together.

        `SplitSteps.training_step` calls it before each step, `save_checkpoint` before each save and, outside of
        training, after it, `on_train_end`, and `atomic_save` for `Preemption`.  Checkpoints that the new one replaces
        are removed here.  An error of writing is raised here on all ranks, and then none is removed.

        Args:
            is_awaited: whether to wait until all ranks have written their files.  With False, as before a step, it
                returns without an effect if some rank has not.
        """
        pending = self._pending
        if pending is None:
            return
        io: Any = self.checkpoint_io
        if not is_awaited and not all(self._gathered(io.writer.is_done)):
            return
        self._pending, phase = None, self.progress.phase
        self._interrupt(SAVE)
        try:
            parts = self._together(pending.final, io.writer.take)
            if pending.unfinished is not None:
                folder: tuple[Path, Path, dict[str, Any]] = (pending.unfinished, pending.final, pending.content)
                self._together(pending.final, lambda: self._finish_folder(*folder, parts))
            # removes the checkpoints that this one replaces; the result was taken above
            self._together(pending.final, io.wait)
            self.progress.mark(phase)
        finally:
            io.forget_removals()  # after an error the checkpoints that this one was to replace stay
            if self.is_global_zero and pending.unfinished is not None:
                discard(pending.unfinished)  # the folder is there after an error

    def on_train_start(self) -> None:
        """Allow saves in the background from now on; Lightning calls it before the first step of `fit`."""
        self._is_training = True
        super().on_train_start()

    def on_train_end(self) -> None:
        """Finish the save in the background; later saves return when they are written.

        Lightning calls it on all ranks at the end of `fit`.
        """
        self._is_training = False
        self.settle_saves()
        super().on_train_end()

    def teardown(self) -> None:
        """End a save in the background that no `settle_saves` has finished, because the run failed.

        The Trainer calls it at the end of a run, also after an error; it sends nothing.
        """
        pending, self._pending = self._pending, None
        if pending is not None and pending.unfinished is not None:  # the run failed: the folder gets no name
            io: Any = self.checkpoint_io
            io.forget_removals()
            try:
                io.writer.take()
            except writing_faults() as error:  # this error must not replace that of the run
                rank_zero_warn(f"the checkpoint {pending.final} is not saved: {error}", category=RuntimeWarning)
        super().teardown()

    def _finish_folder(
        self, unfinished: Path, final: Path, checkpoint: dict[str, Any], parts: list[dict[str, FileSum]]
    ) -> None:
        """Write the manifest of a folder on rank 0, and give the folder its final name.

        Args:
            unfinished, final: the folder as it is, and as it is to be named.
            checkpoint: what the manifest says of the checkpoint; see `facts_of`.
            parts: the checksums of the files of each rank, by their names.
        """
        if not self.is_global_zero:
            return
        sums = {name: each for part in parts for name, each in part.items()}
        for name in files_of(unfinished):
            if name not in sums:  # a small file that torch or DeepSpeed writes by itself
                sums[name] = sum_of(unfinished / name)
                sync(unfinished / name)
        writer = ManifestCheckpointIO()
        self._describe(writer)
        manifest = writer.describe(final, checkpoint, sums)
        seal(unfinished, manifest)
        commit(unfinished, final, manifest)

    def _describe(self, writer: CheckpointIO) -> None:
        """Have a writer name this sharding and mesh in the manifests that it writes."""
        if isinstance(writer, _WrappingCheckpointIO):
            assert writer.checkpoint_io is not None
            writer = writer.checkpoint_io
        if isinstance(writer, ManifestCheckpointIO):
            context = self.sequence_context
            sizes = (context.data_parallel_size, context.sequence_parallel_size)
            writer.engine = self.sharding
            writer.mesh = dict(zip(("data_parallel", "sequence_parallel"), sizes, strict=True))

    def _together(self, path: Any, attempt: Callable[[], Any]) -> list[Any]:
        """Call `attempt` on all ranks, and return what it returned on each; an error of one rank is raised on all.

        Args:
            path: the checkpoint that is saved, for the message.
            attempt: does a part of the save.
        """
        result, error = None, None
        try:
            result = attempt()
        except writing_faults() as fault:
            error = fault
        results = self._gathered((result, "" if error is None else f"{type(error).__name__}: {error}"))
        faults = [f"rank {rank}: {fault}" for rank, (_, fault) in enumerate(results) if fault]
        if faults:
            raise RuntimeError(f"the checkpoint {path} is not saved: {faults[0]}") from error
        return [each for each, _ in results]

    def _gathered(self, value: Any) -> list[Any]:
        """Return the values of all ranks in their order; all call it together, with values that can be pickled."""
        if not _distributed_is_initialized() or dist.get_backend() == "fake":
            return [value]
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values

    # Loading

    def agreed_checkpoint(self, chosen: Any) -> Any:
        """Return on all ranks the checkpoint that rank 0 resumes from, or None; all ranks call this together.

        Ranks choose before they are connected, and a file system may show them different files.  The methods that
        `lightning_longnet.strategies.last` puts into Lightning call it when a checkpoint is to be loaded.

        Args:
            chosen: the path that this rank has chosen, or None.
        """
        choices = self._gathered(None if chosen is None else str(chosen))
        for rank, choice in enumerate(choices):
            if choice != choices[0]:
                text = f"rank {rank} finds {choice or 'no checkpoint'}, and all ranks take what rank 0 finds"
                rank_zero_warn(f"{text}: {choices[0] or 'no checkpoint'}", category=RuntimeWarning)
                break
        return chosen if chosen is not None and str(chosen) == choices[0] else choices[0]

    def _load_from(self, path: Any, weights_only: bool | None) -> dict[str, Any]:
        """Load an undamaged checkpoint as Lightning's strategy does, and return its content.

        With DDP that is by the `checkpoint_io`.  The subclass for FSDP2 overrides it; that for DeepSpeed calls it, for
        Lightning's `DeepSpeedStrategy`, once it has checked and perhaps converted the files.
        """
        if isinstance(self.checkpoint_io, ManifestCheckpointIO):
            self.checkpoint_io.accept(Path(path))
        return super().load_checkpoint(path, weights_only)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Return the content of a checkpoint, after checking that it is as it was saved.

        Lightning calls it on all ranks of a run that is given a `ckpt_path`, with DDP through the method of the
        subclass.  If the checkpoint is damaged, `fit` loads the newest other one, with a warning.
        """
        path = self.broadcast(checkpoint_path)
        if _is_local_file_protocol(path):
            path = self._good_checkpoint(Path(path))
            if fault := fault_of_rank_zero(self, lambda: fault_of_form(path, self.forms, self.sharding)):
                raise ValueError(fault)
        return self._load_from(path, weights_only)

    def _good_checkpoint(self, asked: Path) -> Path:
        """Return on all ranks the checkpoint to load: `asked`, if it is not damaged.

        Otherwise it is in `fit` the newest undamaged one of the run or beside it, with a warning; other loops raise a
        ValueError.
        """
        from lightning_longnet.strategies.restart import search_beside  # that module imports this one

        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        path, bad = asked, set[Path]()
        while fault := self._fault(path):
            bad.add(path)
            other = None
            if self.is_global_zero and trainer.state.fn == TrainerFn.FITTING:
                folders, skip, since = search_beside(trainer, asked)
                other = newest_checkpoint(*folders, forms=self.forms, skip={*bad, *skip}, since=since)
            other = self.broadcast(other)
            if other is None:
                rest = "there is no other good checkpoint" if trainer.state.fn == TrainerFn.FITTING else "give another"
                raise ValueError(f"{fault}; {rest}")
            rank_zero_warn(f"{fault}; loading {other}, the newest other one", category=RuntimeWarning)
            path = other
        if path != asked:
            # the log names this path, and ModelCheckpoint does not remove it
            trainer._checkpoint_connector._ckpt_path = path
        return path

    def _fault(self, path: Path) -> str:
        """Return on all ranks how a checkpoint is damaged, or ""; all ranks call it together.

        Rank 0 reads the manifest and the sizes of files, and then each rank compares the checksums of its share of the
        files.  A checkpoint without a manifest cannot be checked: rank 0 warns of it.
        """
        fault, note = "", ""  # `note`: why nothing can be compared, as there is no manifest
        if self.is_global_zero:
            try:
                note = "" if check_checkpoint(path, share=None) is not None else unverified(path)
            except DamageError as damage:
                fault = str(damage)
        fault, note = self.broadcast((fault, note))
        if note:
            rank_zero_warn(note, category=RuntimeWarning)
        if fault or note:
            return fault
        try:
            check_checkpoint(path, share=(self.global_rank, self.world_size))
        except DamageError as damage:
            fault = str(damage)
        return next((each for each in self._gathered(fault) if each), "")
