"""The comparison over ranks of the batches that Lightning's loops take from their loaders."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from lightning.pytorch.loops.fetchers import _DataFetcher, _DataFetcherWrapper, _DataLoaderIterDataFetcher

from lightning_longnet.sequence.batches import checked_dims
from lightning_longnet.sequence.comparison import ENDED, FAULT, LAST, VALIDATES, BatchComparison, Note
from lightning_longnet.strategies.samplers import repeated_in

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning.pytorch import LightningModule, Trainer

    from lightning_longnet.sequence.context import SequenceContext


@dataclass
class LoopPass:
    """One pass of a Lightning loop over its loaders, such as an epoch of training.

    Attributes:
        batches: the number of batches of which this rank has sent a note.
        is_over: whether the notes have said that no rank has another batch.
        is_given: whether the loop has taken a batch of which no note was sent yet.
        index: the index of that batch in its loader.
    """

    batches: int = 0
    is_over: bool = False
    is_given: bool = False
    index: int = 0


def watch_fetcher(fetcher: _DataFetcher, end: Callable[[LoopPass], None]) -> LoopPass:
    """Return the current pass of a fetcher, the iterator from which a Lightning loop takes its batches.

    At the first call the fetcher's class is replaced by that of `_watched`, so that it calls `end` with the pass
    whenever it has no further batch.  `LoaderWatch` calls it at the start of a loop and for each batch.
    """
    watched: Any = fetcher
    if not hasattr(fetcher, "sequence_pass"):
        fetcher.__class__ = _watched(type(fetcher))
        watched.sequence_pass, watched.sequence_end = LoopPass(is_given=True), end
        _watch_iterator(fetcher)
    current: LoopPass = watched.sequence_pass
    return current


class _WatchedIterator(_DataFetcherWrapper):
    """The iterator of a `training_step(dataloader_iter)`, which takes its batches itself."""

    def __next__(self) -> Any:
        """Return the next batch, and note in the fetcher's `LoopPass` that it is not compared yet."""
        fetcher: Any = self.data_fetcher
        try:
            item = super().__next__()
        except StopIteration:
            fetcher.sequence_end(fetcher.sequence_pass)
            raise
        fetcher.sequence_pass.is_given, fetcher.sequence_pass.index = True, item[1]
        return item


def _watch_iterator(fetcher: _DataFetcher) -> None:
    """Watch the iterator that a fetcher gives to a `training_step(dataloader_iter)`, if its step takes one."""
    if isinstance(fetcher, _DataLoaderIterDataFetcher):
        fetcher.iterator_wrapper.__class__ = _WatchedIterator


@cache
def _watched(kind: type[_DataFetcher]) -> type[_DataFetcher]:
    """Return a subclass of a class of fetchers, which `watch_fetcher` gives to a fetcher as its class.

    It begins a new `LoopPass` with each iteration, notes each batch in it, and calls the attribute `sequence_end` with
    it at the end: Lightning has no hook for the end of a loader.
    """

    class Watched(kind):  # type: ignore[misc, valid-type]
        """A fetcher with a `LoopPass`."""

        def __iter__(self) -> Any:
            self.sequence_pass = LoopPass()
            made = super().__iter__()
            _watch_iterator(self)
            return made

        def __next__(self) -> Any:
            try:
                item = super().__next__()
            except StopIteration:
                self.sequence_end(self.sequence_pass)
                raise
            if not isinstance(self, _DataLoaderIterDataFetcher):
                self.sequence_pass.is_given, self.sequence_pass.index = True, item[1]
            return item

    return Watched


class LoaderWatch:
    """Compares the batches of the ranks and the ends of their loaders; if they differ, all ranks raise a ValueError.

    Each rank sends a `Note` of each batch of a loop.  A step begins only when the notes of all ranks have arrived, as
    its collectives would hang if one rank had another batch or none.  A rank whose loader has ended sends notes of the
    end until all ranks have ended.

    Args:
        context: the context of the strategy.
        timeout: seconds after which a rank that waits for another raises an error.
        gathers: whether ranks gather parameters in each forward, so that all ranks need equally many batches, not only
            those that share sequences.
    """

    def __init__(self, context: SequenceContext, timeout: float, *, gathers: bool) -> None:
        self.context, self.gathers = context, gathers
        self._fault, self._current = "", LoopPass()
        self._is_alike = False
        self._comparison: BatchComparison | None = None
        if context.mesh is not None and context.sequence_parallel_size > 1 and dist.get_backend() != "fake":
            # messages of the host, which do not wait for a GPU
            backend = "gloo" if dist.is_gloo_available() else None
            group = dist.new_group(backend=backend, timeout=timedelta(seconds=timeout))
            assert isinstance(group, dist.ProcessGroup)
            self._comparison = BatchComparison(context.mesh.mesh, group)

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        """The process groups of the notes, which keep the long timeout (`Timeouts.kept`), as ranks wait between steps.

        It is empty where no ranks share sequences.
        """
        return [] if self._comparison is None else [self._comparison.group]

    def begin(self, trainer: Trainer) -> None:
        """Watch the fetcher of the loop that runs now; `WatchedLoops` calls it when a loop starts."""
        self._pass_of(trainer)

    def send(self, module: LightningModule, batch: Any, dataloader_idx: int) -> int:
        """Send the note of a loop's batch to all ranks; return how many of its last samples are repeats.

        `SplitSteps.batch_to_device` calls it with the whole batch, and the step then calls `receive`, which waits for
        the notes of the others.  Batches from elsewhere, as from a callback, are not compared.  The number of repeats
        is 0 in training, and otherwise that of `repeated_in`.
        """
        trainer = module.trainer
        current = self._pass_of(trainer)
        if current is None or not current.is_given:
            return 0
        current.is_given = False
        current.batches += 1
        self._compare(module, batch, dataloader_idx, current)
        loaders = getattr(trainer._active_loop, "_combined_loader", None)
        if trainer.training or loaders is None or (loaders._mode != "sequential" and len(loaders.flattened) > 1):
            return 0
        return repeated_in(loaders.flattened[dataloader_idx], current.index)

    def _compare(self, module: LightningModule, batch: Any, dataloader_idx: int, current: LoopPass) -> None:
        """Start the exchange of notes about a batch; the note of a wrong batch says no more than that.

        If no ranks share sequences, there are no notes, and `SequenceContext.check_same` compares the first batch of a
        pass alone.
        """
        trainer = module.trainer
        if self._comparison is None:
            if current.batches == 1:
                self.context.check_same(batch, getattr(module, "sequence_dims", {}))
            return
        self.receive()
        dims = checked_dims(getattr(module, "sequence_dims", {}))
        self._fault, self._current = self.context.fault_of(batch, dims) or _fault_by(module, batch), current
        self._is_alike = self.gathers or trainer.training
        when = f"{trainer.state.stage} {dataloader_idx}"
        self._comparison.send(
            Note(FAULT, 0, 0) if self._fault else Note.of(batch, when, _state(trainer), _rates(trainer))
        )
        # a wrong batch gets no step that would wait, and a step that takes batches itself has begun already
        if self._fault or batch is None or isinstance(_fetcher(trainer), _DataLoaderIterDataFetcher):
            self.receive()

    def receive(self) -> None:
        """Wait for the notes of all ranks, and raise a ValueError on all of them if the notes differ.

        `WatchedLoops` calls it before each step, and `SplitSteps` before a check that all ranks make together.  If no
        note was sent since the last call, it does nothing.
        """
        if self._comparison is not None and self._comparison.is_pending:
            notes = self._comparison.receive()
            self._current.is_over = self._comparison.check(
                notes, self._fault, self._current.batches, is_alike=self._is_alike
            )

    def send_end(self, current: LoopPass) -> None:
        """Send notes of the end, one for each step of the other ranks, until all ranks have ended.

        A watched fetcher calls it when it has no further batch.  Other data-parallel groups may go on in evaluation.
        Where ranks need equally many batches, `receive` raises a ValueError on all ranks instead.
        """
        self.receive()
        while self._comparison is not None and not current.is_over:
            self._fault, self._current = "", current
            self._comparison.send(Note(ENDED, 0, current.batches))
            self.receive()

    def _pass_of(self, trainer: Trainer) -> LoopPass | None:
        """Return the pass of the loop that runs now; None outside of loops."""
        fetcher = _fetcher(trainer)
        return None if fetcher is None else watch_fetcher(fetcher, self.send_end)


def _fault_by(module: LightningModule, batch: Any) -> str:
    """Return the error message of a module's method `batch_fault` for a batch; "" if it has none or finds nothing.

    The modules of this package have one.
    """
    find = getattr(module, "batch_fault", None)
    return "" if find is None else str(find(batch))


def _fetcher(trainer: Trainer) -> _DataFetcher | None:
    """Return the fetcher of the loop that runs now; None outside of loops."""
    fetcher: _DataFetcher | None = getattr(trainer._active_loop, "_data_fetcher", None)
    return fetcher


def _state(trainer: Trainer) -> int:
    """Return the `state` of the note of a batch: LAST if no batch follows, plus VALIDATES if a validation follows."""
    return LAST * _is_last(trainer) + VALIDATES * (trainer.training and _validates(trainer))


def _rates(trainer: Trainer) -> list[float]:
    """Return the learning rates of all parameter groups to seven digits; none outside of training.

    Tensors on a GPU are left out, as reading them would wait for it.
    """
    if not trainer.training:
        return []
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    rates: list[Any] = [group.get("lr") for group in groups]
    known = [float(rate) for rate in rates if isinstance(rate, (int, float)) or getattr(rate, "is_cpu", False)]
    # seven digits: the cosine of another processor may differ in the last one
    return [float(f"{rate:.7g}") for rate in known]


def _validates(trainer: Trainer) -> bool:
    """Return whether Lightning validates after this training batch, by `val_check_interval` and the batches so far."""
    loop, every = trainer.fit_loop.epoch_loop, trainer.val_check_batch
    if every is None or every == float("inf") or not loop._should_check_val_epoch():
        return False
    by_epoch = trainer.check_val_every_n_epoch is not None
    progress = loop.batch_progress.current if by_epoch else loop.batch_progress.total
    return (progress.ready + 1) % every == 0


def _is_last(trainer: Trainer) -> bool:
    """Return whether the loop ends after its batch.

    It does at the end of the loader, at a limit of batches, and in training at `max_steps`.
    """
    fetcher = _fetcher(trainer)
    if fetcher is None or fetcher.done or not trainer.training:
        return fetcher is not None and fetcher.done
    loop, per_step = trainer.fit_loop.epoch_loop, trainer.accumulate_grad_batches
    ready = loop.batch_progress.current.ready + 1
    if ready >= trainer.num_training_batches:
        return True
    is_step = trainer.lightning_module.automatic_optimization and ready % per_step == 0
    return is_step and 0 <= trainer.fit_loop.max_steps <= trainer.global_step + 1
