"""The distributed samplers of loaders: the order of training data, and samples that they repeat."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn  # type: ignore[attr-defined]
from lightning.pytorch.trainer.states import RunningStage
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, SequentialSampler

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def keep_order(trainer: Trainer) -> None:
    """Make the distributed sampler that a Trainer inserts shuffle training data only if the loader itself shuffles.

    Lightning's shuffles training data even if the loader has `shuffle=False` or a sampler with another order.
    `SplitSteps.setup` calls it, before the Trainer asks for loaders.
    """
    connector = trainer._data_connector
    choose = type(connector)._resolve_sampler

    def resolve(dataloader: DataLoader[Any], shuffle: bool, mode: RunningStage | None = None) -> Any:
        """Return the sampler of a loader; the Trainer calls it in place of its own method."""
        if mode == RunningStage.TRAINING and shuffle and not isinstance(dataloader.sampler, RandomSampler):
            shuffle = False
            if isinstance(dataloader.sampler, SequentialSampler):
                rank_zero_info(
                    "RingSequenceParallelStrategy: training data keeps its order, as its loader has shuffle=False"
                )
        return choose(connector, dataloader, shuffle=shuffle, mode=mode)

    setattr(connector, "_resolve_sampler", resolve)  # noqa: B010


def restore_order(trainer: Trainer) -> None:
    """Undo `keep_order`; `SplitSteps.teardown` calls it at the end of a run."""
    trainer._data_connector.__dict__.pop("_resolve_sampler", None)


class Repeats(NamedTuple):
    """The numbers of samples of a loader whose sampler repeats some, so that all data-parallel groups get equally many.

    Attributes:
        samples: the number of samples of the dataset.
        groups: the number of data-parallel groups.
        own: the number of samples of this rank, without a repeat.
    """

    samples: int
    groups: int
    own: int


def repeats(loader: Any) -> Repeats | None:
    """Return the numbers of samples of a loader whose sampler repeats some; None if it does not.

    Known are the samplers that Lightning inserts, `DistributedSampler` and `GlobalOrder` of this package.
    """
    sampler: Any = getattr(loader, "sampler", None)
    is_plain = type(sampler) in (DistributedSampler, DistributedSamplerWrapper) and not sampler.drop_last
    if not is_plain and getattr(sampler, "end", None) != "repeat":  # "repeat" is an option of `GlobalOrder`
        return None
    samples, groups = len(sampler.dataset), sampler.num_replicas
    return Repeats(samples, groups, len(range(sampler.rank, samples, groups))) if samples % groups else None


def repeated_in(loader: Any, batch_idx: int) -> int:
    """Return how many of the last samples of a batch are repeats, which another data-parallel group counts.

    `LoaderWatch.send` asks for each batch outside of training.

    Args:
        loader: the loader of the batch; one with another sampler than `repeats` knows gives 0.
        batch_idx: the index of the batch in this rank's loader.
    """
    counts = repeats(loader)
    if counts is None or type(loader.batch_sampler) is not BatchSampler:
        return 0
    begin: int = batch_idx * loader.batch_size
    end: int = min(begin + loader.batch_size, len(loader.sampler))
    return end - max(begin, min(end, counts.own))


class RepeatWarning:
    """Warns of loaders whose number of samples does not divide over the data-parallel groups, once of each number."""

    def __init__(self) -> None:
        self._known: set[tuple[int, int]] = set()

    def check(self, loader: Any) -> None:
        """Warn on rank 0 if a loader repeats samples; `WatchedLoops.process_dataloader` calls it for each loader."""
        counts = repeats(loader)
        if counts is None or (counts.samples, counts.groups) in self._known:
            return
        samples, groups, _ = counts
        self._known.add((samples, groups))
        more = -samples % groups
        rank_zero_warn(
            f"{samples} samples do not divide over {groups} data-parallel groups, and {more} of them "
            f"{'are' if more > 1 else 'is'} repeated, so that groups have equally many: take a multiple of {groups} "
            f"samples, or a sampler that leaves some out.  In training a repeated sample counts twice in an epoch.  In "
            f"validation and test the metrics of LongNetModule and LongViTModule leave it out; what a module of your "
            f"own logs counts it twice, unless it leaves out the last "
            f"sequence_context(module).repeated_samples samples of a batch."
        )
