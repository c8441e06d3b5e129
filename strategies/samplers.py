"""The samplers of loaders: the order of training data, and samples that are repeated to give groups equally many."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn  # type: ignore[attr-defined]
from lightning.pytorch.trainer.states import RunningStage
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, SequentialSampler

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def keep_order(trainer: Trainer) -> None:
    """Have a Trainer insert a sampler for training data that shuffles where the loader does, and not otherwise.

    Lightning's shuffles in any case: data whose loader has `shuffle=False`, or a sampler with an order of its own.
    """
    connector = trainer._data_connector
    choose = type(connector)._resolve_sampler

    def resolve(dataloader: DataLoader[Any], shuffle: bool, mode: RunningStage | None = None) -> Any:
        if mode == RunningStage.TRAINING and shuffle and not isinstance(dataloader.sampler, RandomSampler):
            shuffle = False
            if isinstance(dataloader.sampler, SequentialSampler):
                rank_zero_info(
                    "RingSequenceParallelStrategy: training data keeps its order, as its loader has shuffle=False"
                )
        return choose(connector, dataloader, shuffle=shuffle, mode=mode)

    setattr(connector, "_resolve_sampler", resolve)  # noqa: B010


def restore_order(trainer: Trainer) -> None:
    """Undo `keep_order`."""
    trainer._data_connector.__dict__.pop("_resolve_sampler", None)


def repeats(loader: Any) -> tuple[int, int, int] | None:
    """Return (samples, groups, samples of this rank without repeats) of a loader that repeats some, or None."""
    sampler: Any = getattr(loader, "sampler", None)
    is_plain = type(sampler) in (DistributedSampler, DistributedSamplerWrapper) and not sampler.drop_last
    if not is_plain and getattr(sampler, "end", None) != "repeat":  # of our `GlobalOrder`
        return None
    samples, groups = len(sampler.dataset), sampler.num_replicas
    return (samples, groups, len(range(sampler.rank, samples, groups))) if samples % groups else None


def repeated_in(loader: Any, batch_idx: int) -> int:
    """Return how many of the last samples of a batch are repeats, that another rank has as well."""
    found = repeats(loader)
    if found is None or type(loader.batch_sampler) is not BatchSampler:
        return 0
    begin: int = batch_idx * loader.batch_size
    end: int = min(begin + loader.batch_size, len(loader.sampler))
    return end - max(begin, min(end, found[2]))


class RepeatWarning:
    """Warns once of each number of samples that does not divide over the groups."""

    def __init__(self) -> None:
        self._known: set[tuple[int, int]] = set()

    def of(self, loader: Any) -> None:
        """Warn on rank 0 where a loader repeats samples."""
        found = repeats(loader)
        if found is None or found[:2] in self._known:
            return
        samples, groups, _ = found
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
