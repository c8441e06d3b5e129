"""A run that was stopped in the middle of an epoch goes on with the batch that follows."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def skip_finished_batches(trainer: Trainer) -> None:
    """Draw the batches that were trained on before the checkpoint: Lightning begins the epoch's data anew.

    Loaders that keep their own place are left alone.
    """
    loop = trainer.fit_loop.epoch_loop
    finished = loop.batch_progress.current.completed + int(loop.restarted_on_train_batch_end)
    fetcher, loader = trainer.fit_loop._data_fetcher, trainer.fit_loop._combined_loader
    if not loop.restarting or loader is None or fetcher is None:
        return
    if finished >= trainer.num_training_batches or all(hasattr(each, "load_state_dict") for each in loader.flattened):
        return
    for _ in range(finished):
        next(fetcher)
    fetcher.fetched -= finished  # the loop adds them itself
