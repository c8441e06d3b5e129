"""Resuming in the middle of an epoch with the batch after the last one that was trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def skip_finished_batches(trainer: Trainer) -> None:
    """Skip the batches of the epoch that were trained on before the checkpoint, as Lightning starts its data over.

    `SplitSteps.on_train_start` calls it on each rank, before the first step; without a checkpoint it does nothing.

    A sampler with `skip_samples`, as our data modules have, skips them without reading.  Batches of other samplers are
    read again and thrown away.  The order of an epoch must not depend on earlier random numbers, so `set_epoch` is
    called on samplers that have it, as those that Lightning inserts.  Loaders that keep their own state are left alone,
    and so is a `training_step` that takes the iterator itself.
    """
    loop = trainer.fit_loop.epoch_loop
    epoch = trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
    fetcher, loader = trainer.fit_loop._data_fetcher, trainer.fit_loop._combined_loader
    if not trainer.fit_loop.is_resuming or loader is None or fetcher is None:
        return
    if loop.restarting and not loop.restarted_on_train_batch_end:
        # the dropout mask depends on this number; a step that was not finished must not count twice
        loop.batch_progress.total.reset_on_restart()
    if isinstance(fetcher, _DataLoaderIterDataFetcher) or all(hasattr(x, "load_state_dict") for x in loader.flattened):
        return
    if epoch > 0:
        # workers have begun to read in the order of epoch 0, so the iterator is made again
        for dataloader in loader.flattened:
            _set_sampler_epoch(dataloader, epoch)
        iter(fetcher)
    # a checkpoint that is saved at the end of a batch does not count this batch as completed yet
    finished = loop.batch_progress.current.completed + int(loop.restarted_on_train_batch_end)
    if not loop.restarting or finished >= trainer.num_training_batches:
        return  # a new epoch begins
    sampler: Any = getattr(loader.flattened[0], "sampler", None)
    if len(loader.flattened) == 1 and hasattr(sampler, "skip_samples"):
        sampler.skip_samples(finished * loader.flattened[0].batch_size)
        iter(fetcher)  # the fetcher counts from 0; the loop adds the skipped batches
        return
    for done in range(finished):
        try:
            next(fetcher)
        except StopIteration:
            raise ValueError(
                f"the checkpoint was saved after {finished} batches of an epoch, and the training data has {done}: "
                f"resume with the data, the batch size and the number of ranks that it was saved with"
            ) from None
    fetcher.fetched -= finished  # the loop adds the skipped batches itself
