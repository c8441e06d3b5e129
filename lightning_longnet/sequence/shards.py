"""Caches of `SequenceShard`: layers that are called with the same documents and padding share one."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from lightning_longnet.attention.parallel.shard import SequenceShard

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from lightning_longnet.attention.parallel.comm import Traffic
    from lightning_longnet.sequence.splitter import BatchSplitter

_PLAIN_SHARDS = 64  # the most that are kept, one for each length


class _MaskVersion(NamedTuple):
    """A mask (a tensor or None) as it was at one time, to find out later whether it is unchanged.

    Torch counts the in-place changes of a tensor in `_version`, but not those of an inference tensor: its values are
    copied and compared.

    Attributes:
        tensor: the mask itself, which is kept alive, so that no other tensor gets its memory.
        version: its `_version`; 0 if there is none.
        values: a copy of an inference tensor; None for others.
    """

    tensor: Tensor | None
    version: int
    values: Tensor | None

    @classmethod
    def of(cls, x: Tensor | None) -> _MaskVersion:
        """Return the version of a mask as it is now."""
        if x is None or not x.is_inference():
            return cls(x, 0 if x is None else x._version, None)
        return cls(x, 0, x.clone())

    def is_unchanged(self, x: Tensor | None) -> bool:
        """Return whether x is the tensor of this version, or a view of all of it, and has not been changed since."""
        if self.tensor is None or x is None:
            return self.tensor is x
        if x is not self.tensor and not (x.dtype == self.tensor.dtype and x.is_set_to(self.tensor)):
            return False
        if self.values is not None or x.is_inference():
            return self.values is not None and torch.equal(self.values, x)
        return x._version == self.version


class _CachedShard(NamedTuple):
    """A shard, with the versions of the documents and of the padding that it was made with."""

    documents: _MaskVersion
    padding: _MaskVersion
    shard: SequenceShard


class _CachedConversion(NamedTuple):
    """The result of a conversion of a mask, for `BatchShards.once`; `into` names the conversion."""

    mask: _MaskVersion
    into: str
    result: Tensor


class BatchShards:
    """The shards of one batch that have documents or padding, each made by all ranks together at its first use.

    The `CurrentBatch` of a context has one; `ShardCache` asks it for shards, and `SequenceContext.once` for masks.
    """

    def __init__(self) -> None:
        self._shards: list[_CachedShard] = []
        self._conversions: list[_CachedConversion] = []

    @property
    def count(self) -> int:
        """The number of shards that were made, for tests."""
        return len(self._shards)

    def get(self, documents: Tensor | None, padding: Tensor | None, make: Callable[[], SequenceShard]) -> SequenceShard:
        """Return the cached shard of these masks as they are now, or make one if some rank has none.

        All ranks of the sequence group call it together, by `ShardCache.get`.  Outside of inference mode a mask that
        the program changes has another version on all of them.  In inference mode each rank compares the values of its
        own tokens, which may have changed where another's have not; so they exchange the indices of their shards, and
        make one together unless these are equal.

        Args:
            documents, padding: the masks of this rank's tokens; at most one of them is None.
            make: makes the shard, together with the other ranks.
        """
        index = self._index_of(documents, padding)
        compares = any(x is not None and x.is_inference() for x in (documents, padding))
        if self._shards and compares:  # this holds on all ranks or on none
            indices = self._shards[0].shard.exchange_value(index, "looks a shard up")
            if any(other != index for other in indices):
                index = -1
        if index >= 0:
            return self._shards[index].shard
        shard = make()
        self._shards.append(_CachedShard(_MaskVersion.of(documents), _MaskVersion.of(padding), shard))
        return shard

    def _index_of(self, documents: Tensor | None, padding: Tensor | None) -> int:
        """Return the index of the latest shard of this rank for these masks; -1 if there is none."""
        for index in reversed(range(len(self._shards))):
            cached = self._shards[index]
            if cached.documents.is_unchanged(documents) and cached.padding.is_unchanged(padding):
                return index
        return -1

    def once(self, mask: Tensor, into: str, convert: Callable[[], Tensor]) -> Tensor:
        """Return `convert()`, cached for this mask and the name of the conversion, `into`.

        Layers that convert one mask then hold one and the same tensor, and so share a shard.
        `SequenceContext.once` calls it.
        """
        for cached in self._conversions:
            if cached.into == into and cached.mask.is_unchanged(mask):
                return cached.result
        result = convert()
        self._conversions.append(_CachedConversion(_MaskVersion.of(mask), into, result))
        return result


class ShardCache:
    """Makes and caches the shards of a `SequenceContext`, and counts what all of them send in one `Traffic`.

    A shard without documents and padding depends on the length alone, and serves all batches of that length.  Other
    shards are cached in the `BatchShards` of their batch.
    """

    def __init__(self, splitter: BatchSplitter, traffic: Traffic) -> None:
        self._splitter, self._traffic = splitter, traffic
        self._plain: dict[int, SequenceShard] = {}

    def get(self, documents: Tensor | None, key_padding_mask: Tensor | None) -> SequenceShard:
        """Return the shard of the current, split batch for these documents and this padding.

        `SequenceContext.shard_of` calls it, on all ranks of the sequence group together.
        """
        splitter, length = self._splitter, self._splitter.current.length
        assert length is not None
        if documents is not None or key_padding_mask is not None:
            return splitter.current.shards.get(
                documents, key_padding_mask, lambda: self.make(documents, key_padding_mask)
            )
        if length not in self._plain:
            if len(self._plain) == _PLAIN_SHARDS:
                self._plain.clear()
            self._plain[length] = self.make(None, None)
        shard = self._plain[length]
        shard.begin_batch(splitter.number)
        return shard

    def make(self, documents: Tensor | None, key_padding_mask: Tensor | None) -> SequenceShard:
        """Make and return a shard of the current batch, without looking for one in the cache.

        All ranks of the sequence group call it together: `get` for masks that layers are given, and the property
        `ContextAttention.shard` for those of the batch.
        """
        splitter = self._splitter
        assert splitter.position.sequence_group is not None
        assert splitter.current.length is not None
        kind = splitter.kind_of(splitter.current.length)
        shard = SequenceShard(
            splitter.position.sequence_group, splitter.local_length, kind, documents, key_padding_mask
        )
        # all ranks make a shard together: the time that they waited for each other counts, too
        self._traffic.waited_seconds += shard.comm.traffic.waited_seconds
        self._traffic.flight_seconds += shard.comm.traffic.flight_seconds
        shard.comm.traffic = self._traffic
        return shard
