"""The global order of the samples of an epoch, which depends only on the seed and the epoch."""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch.utils.data import DistributedSampler

if TYPE_CHECKING:
    from collections.abc import Iterator

End = Literal["drop", "ignore", "repeat", "ragged"]


def seed_of(*words: Any) -> int:
    """Return a seed, a non-negative integer below 2**56, that is a hash of all arguments."""
    return int.from_bytes(sha256(repr(words).encode()).digest()[:7], "big")


class GlobalOrder(DistributedSampler[int]):
    """A sampler with one order for all ranks, of which data-parallel rank r takes samples r, r + replicas, ...

    The samples of a step, of all ranks together, depend on their number, `batch_size * replicas`, but not on how it is
    divided, on how many ranks share sequences, or on worker processes.  As it is a DistributedSampler, Lightning does
    not replace it, and calls `set_epoch`.

    Args:
        samples: number of samples.
        batch_size: samples of a batch on each rank.
        replicas: number of data-parallel groups; see `sequence_context(module).data_parallel_size`.
        rank: index of this rank's group.
        seed: seed of the order.
        shuffle: False keeps the order of the dataset.
        end: treatment of the last samples.  "drop" leaves out those that do not fill a batch on all ranks.  With the
            others, a rank without a sample in the last batch gets: an index past the last sample, for a sample that
            does not count ("ignore"); one of the first samples again ("repeat"); nothing ("ragged").
    """

    def __init__(
        self,
        samples: int,
        batch_size: int,
        replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        end: End = "drop",
    ) -> None:
        if end not in get_args(End):
            raise ValueError(f"end must be one of {', '.join(map(repr, get_args(End)))}, got {end!r}")
        step_samples = batch_size * replicas
        if end == "drop" and samples < step_samples:
            raise ValueError(
                f"batch_size must leave a batch for each of the {replicas} groups of ranks: there are {samples} "
                f"samples, got {batch_size}"
            )
        super().__init__(range(samples), replicas, rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.samples, self.end, self._skipped = samples, end, 0
        if end == "drop":
            self.total_size = samples // step_samples * step_samples
        elif end == "ragged":
            self.total_size = samples
        else:
            self.total_size = -(-samples // replicas) * replicas
        self.num_samples = len(range(rank, self.total_size, replicas))

    def __len__(self) -> int:
        return self.num_samples

    def skip_samples(self, samples: int) -> None:
        """Skip this many of the samples of this rank in the next pass, without reading them, to resume an epoch."""
        if not 0 <= samples <= self.num_samples:
            raise ValueError(f"samples must be at most the {self.num_samples} of this rank, got {samples}")
        self._skipped = samples

    def __iter__(self) -> Iterator[int]:
        begin, self._skipped = self.rank + self._skipped * self.num_replicas, 0
        order = self._order()
        for place in range(begin, self.total_size, self.num_replicas):
            if place < self.samples:
                yield int(order[place])
            else:
                yield int(order[place % self.samples]) if self.end == "repeat" else place

    def _order(self) -> torch.Tensor | range:
        """Return the indices of all samples in the order of this epoch."""
        if not self.shuffle:
            return range(self.samples)
        generator = torch.Generator().manual_seed(seed_of("order", self.seed, self.epoch))
        return torch.randperm(self.samples, generator=generator)
