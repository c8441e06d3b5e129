"""The order of an epoch's samples: by seed and epoch alone, whoever is handed them."""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch.utils.data import DistributedSampler

if TYPE_CHECKING:
    from collections.abc import Iterator

End = Literal["drop", "ignore", "repeat", "ragged"]


def seed_of(*words: Any) -> int:
    """A number that depends on all of these."""
    return int.from_bytes(sha256(repr(words).encode()).digest()[:7], "big")


class GlobalOrder(DistributedSampler[int]):
    """One order for all, of which each data-parallel rank takes every so many-th sample.

    What a step of all ranks together works on depends on how many samples that are, and not on how many ranks share
    them, nor on worker processes.  Lightning takes it as it is, and tells it the epoch.

    Args:
        samples: how many there are.
        batch_size: samples of a step on each rank.
        replicas: ranks that are handed different samples; see `sequence_context(module).data_parallel_size`.
        rank: this one among them.
        seed: of the order.
        shuffle: False: as they stand.
        end: what becomes of those that are left over.  "drop": they fill no batch of all ranks, and are left out.
            "ignore": ranks that have none are handed a number past the last, for a sample that does not count.
            "repeat": or one of the first again.  "ragged": or nothing.
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
        together = batch_size * replicas
        if end == "drop" and samples < together:
            raise ValueError(
                f"batch_size must leave a batch for each of the {replicas} groups of ranks: there are {samples} "
                f"samples, got {batch_size}"
            )
        super().__init__(range(samples), replicas, rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.samples, self.end, self._skipped = samples, end, 0
        if end == "drop":
            self.total_size = samples // together * together
        elif end == "ragged":
            self.total_size = samples
        else:
            self.total_size = -(-samples // replicas) * replicas
        self.num_samples = len(range(rank, self.total_size, replicas))

    def __len__(self) -> int:
        return self.num_samples

    def skip_samples(self, samples: int) -> None:
        """The next pass leaves out so many of this rank's: a run goes on where it was, without reading them."""
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
        if not self.shuffle:
            return range(self.samples)
        generator = torch.Generator().manual_seed(seed_of("order", self.seed, self.epoch))
        return torch.randperm(self.samples, generator=generator)
