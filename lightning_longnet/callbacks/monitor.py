"""`Monitor`: callbacks that count on each rank, and gather at logging steps, all of them in one collective.

Every key that a callback logs, the same for CSVLogger, TensorBoard and W&B; a step is one of the optimiser:

    throughput/tokens_per_second        of all ranks, padding included, since the last logging step
    throughput/samples_per_second       whole sequences, however many ranks share one
    throughput/step_seconds_mean        of the steps since the last logging step, without validation
    throughput/step_seconds_p50         of the last steps, as _p90 and _max; the slowest rank's
    throughput/waiting_seconds          of a step outside of it, for data and callbacks; the longest of any rank
    throughput/tokens                   since the run began
    throughput/padding_share            of the tokens of the logged step, where the batch has an attention_mask
    throughput/mfu                      operations that the model requires, as a share of the devices' peak
    throughput/hfu                      operations that are done, likewise
    throughput/computed_pairs_ratio     pairs that attention computes over those that its patterns show
    memory/peak_gib_max                 the most that any rank has held since it began; also _median and _min
    memory/peak_rank                    which rank that is
    memory/current_gib_max              now; also _median and _min
    memory/parameters_gib               on the rank of the highest peak, as gradients_gib, optimizer_gib, exchange_gib
    memory/activations_gib              there: the peak, less those, and on a CPU less what was held before the run
    exchange/sent_bytes                 for attention in the logged step, all ranks together
    exchange/sent_bytes_max             the most that one rank sent
    exchange/predicted_bytes            what the plan predicts for sent_bytes
    exchange/branch_W_R_bytes           what the plan predicts for a branch, beyond the finer branches
    exchange/messages                   in the logged step, all ranks together
    exchange/flight_seconds             a step: from the start of messages until they had come; mean of the ranks
    exchange/waited_seconds             a step: waited for them; mean of the ranks
    exchange/waited_seconds_max         of the rank that waited longest
    exchange/hidden_share               the share of the flight in which ranks computed
    exchange/slowest_rank               which the others wait for: it waits least itself, here and for their losses
    guard/skipped_steps                 since the run began

A module logs train/loss, train/bits_per_byte, val/loss, val/bits_per_byte and val/perplexity.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import Callback

from lightning_longnet.callbacks.host import everywhere, host_group
from lightning_longnet.sequence import sequence_context

if TYPE_CHECKING:
    import torch.distributed as dist
    from lightning.pytorch import LightningModule, Trainer


class Monitor(Callback):
    """The base of callbacks that log figures of all ranks at the Trainer's logging steps.

    A subclass defines `names`, `own_numbers` and `figures_of`; its own hooks call those of this class.  The last of a
    Trainer's monitors gathers the numbers of all of them, on the host.  Ranks do not communicate between logging steps,
    and do not wait for a GPU.

    Attributes:
        names: the names of the numbers of each rank, in the order of `own_numbers`.
        figures: the figures that were logged last, by key.
        by_rank: the numbers of each rank that they were computed of, by name.
    """

    names: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}
        self.by_rank: dict[str, list[float]] = {}
        self._own: list[float] = []
        self._group: dist.ProcessGroup | None = None

    def own_numbers(self, trainer: Trainer, module: LightningModule, batch: Any) -> list[float]:
        """Return the numbers of this rank since the last call, in the order of `names`.

        `on_train_batch_end` calls it on all ranks at logging steps, with the batch of that step.
        """
        raise NotImplementedError

    def figures_of(self, gathered: dict[str, torch.Tensor]) -> dict[str, float]:
        """Return the figures to log by key; `on_train_batch_end` calls it on all ranks at logging steps.

        Args:
            gathered: the numbers of all ranks by name, each (ranks,) in float64.
        """
        raise NotImplementedError

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the group of the host, in the monitor that gathers for all; on all ranks together."""
        self._group = host_group(trainer) if _monitors(trainer)[-1] is self else None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the list of calls of attention until the next training batch."""
        sequence_context(pl_module).traffic.calls = None  # the list would grow, as nothing empties it

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the list of calls of attention."""
        sequence_context(pl_module).traffic.calls = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """At a logging step gather the numbers of all ranks, and log the figures, in the last of the monitors."""
        if not is_logging_step(trainer):
            return
        self._own = self.own_numbers(trainer, pl_module, batch)
        assert len(self._own) == len(self.names)
        monitors = _monitors(trainer)
        if self is not monitors[-1]:
            return
        gathered = everywhere([number for each in monitors for number in each._own], self._group)
        first = 0
        for each in monitors:
            columns = gathered[:, first : first + len(each.names)].unbind(1)
            first += len(each.names)
            by_name = dict(zip(each.names, columns, strict=True))
            each.by_rank = {name: column.tolist() for name, column in by_name.items()}
            each.figures = each.figures_of(by_name)
            # in float64: bytes are whole numbers, and more than float32 can count
            values = {key: torch.tensor(value, dtype=torch.float64) for key, value in each.figures.items()}
            pl_module.log_dict(values, on_step=True, on_epoch=False, batch_size=1)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the group, which another process does not have."""
        return {**self.__dict__, "_group": None}


def _monitors(trainer: Trainer) -> list[Monitor]:
    """Return the monitors of a Trainer, in the order in which it calls them."""
    return [each for each in trainer.callbacks if isinstance(each, Monitor)]  # type: ignore[attr-defined]


def is_logging_step(trainer: Trainer) -> bool:
    """Return whether an optimizer step ends with this batch that the Trainer logs; the same on all ranks.

    Callbacks call it in `on_train_batch_end`, and `LossWatch` of the strategy in the step.  It goes by
    `log_every_n_steps`.
    """
    if trainer.fit_loop._should_accumulate():
        return False
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    step = trainer.fit_loop.epoch_loop._batches_that_stepped + 1
    is_trial = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
    return is_trial or (every > 0 and step % every == 0)
