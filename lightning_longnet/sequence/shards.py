"""The shards of a batch: layers that are called with the same documents and padding share one."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from lightning_longnet.attention.parallel.shard import SequenceShard

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from lightning_longnet.attention.parallel.comm import Traffic
    from lightning_longnet.sequence.splitter import BatchSplitter

_PLAIN_SHARDS = 64  # that are kept, one for each length


class _Made(NamedTuple):
    """A shard, and the very tensors that it was made with."""

    documents: Tensor | None
    padding: Tensor | None
    versions: tuple[int, int]
    shard: SequenceShard


class _Converted(NamedTuple):
    """A mask, and the result of a conversion of it."""

    mask: Tensor
    version: int
    into: str
    result: Tensor


class BatchShards:
    """The shards of one batch, each made at its first use."""

    def __init__(self) -> None:
        self._made: list[_Made] = []
        self._converted: list[_Converted] = []

    def of(self, documents: Tensor | None, padding: Tensor | None, make: Callable[[], SequenceShard]) -> SequenceShard:
        """Return the shard of these very tensors, which `make` makes at the first call."""
        versions = _version(documents), _version(padding)
        for made in self._made:
            same = _is_same(made.documents, documents) and _is_same(made.padding, padding)
            if same and made.versions == versions:
                return made.shard
        shard = make()
        self._made.append(_Made(documents, padding, versions, shard))
        return shard

    def once(self, mask: Tensor, into: str, convert: Callable[[], Tensor]) -> Tensor:
        """Return the result of converting this very mask, so that layers which convert it share a shard.

        `into` names the conversion.
        """
        for known in self._converted:
            if _is_same(known.mask, mask) and (known.version, known.into) == (_version(mask), into):
                return known.result
        result = convert()
        self._converted.append(_Converted(mask, _version(mask), into, result))
        return result


class ShardCache:
    """Makes the shards of a rank, and counts what all of them send in one `Traffic`.

    A shard without documents and padding depends on the length alone, and serves all batches of that length; other
    shards last as long as their batch.
    """

    def __init__(self, splitter: BatchSplitter, traffic: Traffic) -> None:
        self._splitter, self._traffic = splitter, traffic
        self._plain: dict[int, SequenceShard] = {}

    def of(self, documents: Tensor | None, key_padding_mask: Tensor | None) -> SequenceShard:
        """Return the shard of the current batch with these documents and this padding."""
        splitter, length = self._splitter, self._splitter.current.length
        assert length is not None
        if documents is not None or key_padding_mask is not None:
            return splitter.current.shards.of(
                documents, key_padding_mask, lambda: self._made(documents, key_padding_mask)
            )
        if length not in self._plain:
            if len(self._plain) == _PLAIN_SHARDS:
                self._plain.clear()
            self._plain[length] = self._made(None, None)
        shard = self._plain[length]
        shard.begin_batch(splitter.number)
        return shard

    def _made(self, documents: Tensor | None, key_padding_mask: Tensor | None) -> SequenceShard:
        splitter = self._splitter
        assert splitter.position.sequence_group is not None
        shard = SequenceShard(
            splitter.position.sequence_group, splitter.local_length, splitter.placement, documents, key_padding_mask
        )
        # all ranks make a shard together: the time that they waited for each other counts, too
        self._traffic.waited_seconds += shard.comm.traffic.waited_seconds
        self._traffic.flight_seconds += shard.comm.traffic.flight_seconds
        shard.comm.traffic = self._traffic
        return shard


def _version(x: Tensor | None) -> int:
    """Return how often a tensor was changed in place, or -1 for a tensor of inference mode, which does not count."""
    return -1 if x is None or x.is_inference() else x._version


def _is_same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors are views of the same memory.  Values must not decide, as they differ between ranks."""
    if a is None or b is None:
        return a is b
    return a is b or (a.dtype == b.dtype and a.is_set_to(b))
